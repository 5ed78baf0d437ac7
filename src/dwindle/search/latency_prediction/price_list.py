"""Times of layer shapes, kept on the disk for this machine, and measured when they are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from dwindle.search.journal import Journal
from dwindle.search.latency_prediction.kernel_times import KernelTime, KernelTimer
from dwindle.search.latency_prediction.machine import cache_folder, fingerprint
from dwindle.search.latency_prediction.segments import Segment
from dwindle.training.progress import tracked

__all__ = ["PriceList"]

FORMAT = "dwindle layer times 3"


class PriceList:
    """Times of layer shapes in one runtime on this machine.

    Args:
        timer: Measures what is not known yet.
        folder: Where they are kept; None: the user's cache folder.

    Attributes:
        path: The file of JSON lines.
        measured: How many were measured by this object.
    """

    def __init__(self, timer: KernelTimer, folder: Path | None = None) -> None:
        self.timer = timer
        identity = {"machine": fingerprint(), **timer.identity}
        digest = hashlib.sha256(json.dumps([FORMAT, identity], sort_keys=True).encode()).hexdigest()[:12]
        folder = cache_folder() / "layer-times" if folder is None else folder
        self.path = folder / f"{identity['runtime'].replace(':', '-')}-{digest}.jsonl"
        self.journal = Journal(self.path, FORMAT, identity, "layer time")
        self.known = {
            entry["shape"]: KernelTime(entry["inside"], entry["enter"], entry["leave"])
            for entry in self.journal.earlier
        }
        self.measured = 0
        self._signatures: dict[tuple[int, tuple[int, ...]], str] = {}

    def signature(self, segment: Segment, values: tuple[int, ...]) -> str:
        """Return the name of a shape."""
        key = (id(segment), values)
        if key not in self._signatures:
            self._signatures[key] = segment.signature(values)
        return self._signatures[key]

    def time(self, segment: Segment, values: Sequence[int]) -> KernelTime:
        """Return the time of a segment with given values of its variables, measuring it when it is not known."""
        values = tuple(values)
        shape = self.signature(segment, values)
        if shape not in self.known:
            found = self.timer(segment.model(values), segment.feed(values))
            self.known[shape] = found
            self.measured += 1
            self.journal.append(
                {
                    "shape": shape,
                    "inside": found.inside,
                    "enter": found.enter,
                    "leave": found.leave,
                    "layer": segment.description(values),
                }
            )
        return self.known[shape]

    def measure(self, wanted: Iterable[tuple[Segment, tuple[int, ...]]]) -> None:
        """Measure what is not known of several shapes, with a bar."""
        missing = {
            shape: (segment, values)
            for segment, values in wanted
            if (shape := self.signature(segment, values)) not in self.known
        }
        for segment, values in tracked(list(missing.values()), "timing layers"):
            self.time(segment, values)
