"""Measures what candidates cost against the original: time in runtimes, in turn, and everything that can be counted."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dwindle.config.errors import require
from dwindle.measure.activations import peak_activation_bytes
from dwindle.measure.macs import count_macs_by_module
from dwindle.measure.measuring import torch_threads
from dwindle.measure.runtime import PreparedModel, Session
from dwindle.measure.runtimes import get_runtime
from dwindle.measure.size import count_parameters
from dwindle.measure.timing import percentile, time_interleaved
from dwindle.search.auto.energy import energy_of
from dwindle.search.auto.limits import runtime_of
from dwindle.search.latency_prediction.whole_models import clock_for

__all__ = ["Workbench"]

#: Seconds for each model after which no further round of timing begins.
_SECONDS = 0.75

#: Costs that need a file.
_FILES = {"bytes", "peak_memory", "energy"}


class Workbench:
    """The original, opened in every runtime that is asked about, and what measures others beside it.

    Args:
        original: The model that candidates are compared with.
        inputs: Positional example inputs: the batch whose latency counts.
        kwargs: Keyword inputs.
        costs: What is measured, names of :data:`dwindle.search.auto.limits.COSTS`.
        threads: Threads of one pass; None is each runtime's own choice.
        repeats: Timed rounds.

    Attributes:
        whole: What the original costs, by name.
    """

    def __init__(
        self,
        original: nn.Module,
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any],
        costs: Sequence[str],
        *,
        threads: int | None = None,
        repeats: int = 40,
    ) -> None:
        self.inputs, self.kwargs = tuple(inputs), dict(kwargs)
        self.threads, self.repeats = threads, repeats
        self.costs = tuple(dict.fromkeys(costs))
        self._folder = tempfile.TemporaryDirectory(prefix="dwindle-auto-", ignore_cleanup_errors=True)
        self._made = 0
        self._sessions = self._latest = self._open(original)
        self.whole = self._counted(original, self._sessions, integers=False, float_layers=())
        for cost, times in self._times({"original": self._sessions}).items():
            self.whole[cost] = times["original"]

    def measure(
        self, model: nn.Module, small: nn.Module, *, integers: bool, float_layers: Sequence[str] = ()
    ) -> dict[str, float]:
        """Return what a model costs, by name; a latency is its ratio to the original's, times what that had first.

        Args:
            model: As it will be exported: a float model, or one that :func:`dwindle.quantize` made.
            small: The same in float, in which operators are counted.
            integers: Whether it is int8.
            float_layers: Layers of it that are not.
        """
        sessions = self._latest = self._open(model)
        found = self._counted(small, sessions, integers=integers, float_layers=float_layers)
        for cost, times in self._times({"original": self._sessions, "model": sessions}).items():
            found[cost] = self.whole[cost] * times["model"] / times["original"]
        return found

    def time_file(self, file: Any, feed: Mapping[str, Any]) -> dict[str, float]:
        """Return the milliseconds of an ONNX model in every runtime of the costs, as :meth:`measure` does.

        Args:
            file: The model, as ``onnx`` holds it.
            feed: Arrays by input name.
        """
        onnx = require("onnx", "onnx")
        tensors = {name: torch.from_numpy(array) for name, array in feed.items()}
        path = Path(self._folder.name) / "file.onnx"
        onnx.save(file, str(path))
        found = {}
        calls: dict[str, Callable[[], Any]] = {}
        for cost in self.costs:
            name = runtime_of(cost)
            if name is not None:
                calls[cost] = get_runtime(name, threads=self.threads).session(path).prepare(**tensors)
        for cost, times in self._times({"original": self._sessions}, {"file": calls}).items():
            found[cost] = self.whole[cost] * times["file"] / times["original"]
        return found

    def sessions(self) -> dict[str, Session]:
        """Return the model that was measured last, opened in each runtime, by the runtime's name."""
        return {name: own for cost, own in self._latest.items() if (name := runtime_of(cost))}

    def shares(self, costs: Mapping[str, float]) -> dict[str, float]:
        """Return costs as shares of the original's."""
        return {name: value / self.whole[name] for name, value in costs.items()}

    def _open(self, model: nn.Module) -> dict[str, Session]:
        """Open a model in every runtime; the files of the latest stay until the next is opened."""
        self._made += 1
        folder = Path(self._folder.name) / str(self._made)
        folder.mkdir()
        prepared = PreparedModel(model, self.inputs, self.kwargs, folder)
        sessions = {}
        for cost in self.costs:
            name = runtime_of(cost)
            if name is not None:
                sessions[cost] = get_runtime(name, threads=self.threads).open(prepared)
        if _FILES & set(self.costs) and not any(own.bytes_on_disk for own in sessions.values()):
            sessions["bytes"] = get_runtime("onnxruntime", threads=self.threads).open(prepared)
        return sessions

    def _counted(
        self,
        model: nn.Module,
        sessions: Mapping[str, Session],
        *,
        integers: bool,
        float_layers: Sequence[str],
    ) -> dict[str, float]:
        wanted = set(self.costs)
        found: dict[str, float] = {}
        if wanted & {"bytes", "peak_memory", "energy"}:
            found["bytes"] = float(
                next(own.bytes_on_disk or 0 for own in sessions.values() if own.bytes_on_disk)
            )
        if wanted & {"macs", "bit_operations", "energy"}:
            counted = count_macs_by_module(model, self.inputs, self.kwargs)
            in_float = (
                sum(counted.by_module.get(name, 0) for name in float_layers) if integers else counted.total
            )
            found["macs"] = float(counted.total)
            found["bit_operations"] = float((counted.total - in_float) * 8 * 8 + in_float * 32 * 32)
            if "energy" in wanted:
                found["energy"] = energy_of(counted.total - in_float, in_float, found["bytes"])
        if "params" in wanted:
            found["params"] = float(count_parameters(model).total)
        if "peak_memory" in wanted:
            bytes_of_activations = peak_activation_bytes(model, self.inputs, self.kwargs)
            found["peak_memory"] = found["bytes"] + bytes_of_activations / (4.0 if integers else 1.0)
        return {name: value for name, value in found.items() if name in wanted}

    def _times(
        self,
        models: Mapping[str, Mapping[str, Session]],
        others: Mapping[str, Mapping[str, Callable[[], Any]]] | None = None,
    ) -> dict[str, dict[str, float]]:
        """Return the median milliseconds of each model by cost; all are called in turn.

        With one thread it is processor time, which other programs on the machine do not disturb.
        """
        calls: dict[tuple[str, str], Callable[[], Any]] = {}
        for name, sessions in models.items():
            for cost, session in sessions.items():
                if runtime_of(cost) is not None:
                    calls[cost, name] = session.prepare(*self.inputs, **self.kwargs)
        for name, functions in (others or {}).items():
            calls.update({(cost, name): function for cost, function in functions.items()})
        if not calls:
            return {}
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch_threads(self.threads))
            stack.enter_context(torch.inference_mode())
            times = time_interleaved(
                calls,
                warmup=5,
                repeats=self.repeats,
                max_seconds=_SECONDS * len(calls),
                clock=clock_for(self.threads),
            )
        found: dict[str, dict[str, float]] = {}
        for (cost, name), milliseconds in times.items():
            found.setdefault(cost, {})[name] = percentile(milliseconds, 0.5)
        return found
