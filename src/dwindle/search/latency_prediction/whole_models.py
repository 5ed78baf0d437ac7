"""Times whole models of a template in turn, each file made for its counts."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dwindle.config.errors import require
from dwindle.measure.runtime import Runtime
from dwindle.measure.timing import time_interleaved

__all__ = ["ModelTimer", "WholeModelTimer", "clock_for"]

#: Rounds, and seconds for each model after which no further round begins.
ROUNDS, SECONDS = 30, 1.0


class ModelTimer(Protocol):
    """Times ONNX models in turn."""

    def __call__(self, models: Sequence[Any], feeds: Sequence[Mapping[str, np.ndarray]]) -> Sequence[float]:
        """Return the seconds of each model."""


def clock_for(threads: int | None) -> Callable[[], float]:
    """Return the clock for passes on so many threads: of one processor time, which other programs do not disturb."""
    return time.process_time if threads == 1 else time.perf_counter


class WholeModelTimer:
    """Times models in a runtime, in turn, so that a disturbance meets all alike.

    Args:
        runtime: The runtime.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def __call__(self, models: Sequence[Any], feeds: Sequence[Mapping[str, np.ndarray]]) -> Sequence[float]:
        """Return the median of each model, in seconds."""
        onnx = require("onnx", "onnx")
        with tempfile.TemporaryDirectory(prefix="dwindle-models-", ignore_cleanup_errors=True) as folder:
            functions = {}
            for number, (model, feed) in enumerate(zip(models, feeds, strict=True)):
                path = Path(folder) / f"{number}.onnx"
                if isinstance(model, (str, Path)):
                    path = Path(model)
                else:
                    onnx.save(model, str(path))
                functions[number] = self._function(path, feed)
            times = time_interleaved(
                functions,
                warmup=2,
                repeats=ROUNDS,
                max_seconds=SECONDS * len(functions),
                clock=clock_for(self.runtime.threads),
            )
        return [statistics.median(times[number]) / 1e3 for number in functions]

    def _function(self, path: Path, feed: Mapping[str, np.ndarray]) -> Any:
        runtime, handle = self.runtime, self.runtime.load(path)
        arrays = runtime.feed(handle, {name: torch.from_numpy(array) for name, array in feed.items()})
        return lambda: runtime.run(handle, arrays)
