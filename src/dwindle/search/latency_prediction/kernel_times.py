"""Times what a runtime computes inside of a small file: by the runtime's own profiler, operator by operator.

Wall time of a file that takes some microseconds is mostly the call. Profilers of runtimes tell the time of each kernel,
and they tell apart what only happens at the border: bringing an input into the layout that kernels want, and a result
out of it. In a whole model that is not done between two layers that want the same layout.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dwindle.config.errors import ConfigError, did_you_mean, require
from dwindle.measure.runtime import Runtime
from dwindle.measure.runtimes import OnnxRuntime, OpenVinoRuntime
from dwindle.search.latency_prediction.partition import BORDER

__all__ = ["KernelTime", "KernelTimer", "has_kernel_timer", "kernel_timer"]

#: Runs that are timed, and seconds after which no further one begins (but three are done); short ones more often.
RUNS, SECONDS = 15, 0.25
MOST_RUNS, LEAST_SECONDS = 60, 0.02
#: A run that lost more of its time to other programs is not counted, where there are enough others.
DISTURBED = 0.04


@dataclass(frozen=True, slots=True)
class KernelTime:
    """Time of one run of a small file, in seconds.

    Attributes:
        inside: All kernels but those of the border.
        enter: Bringing inputs into the layout of the kernels.
        leave: Bringing results out of it.
    """

    inside: float
    enter: float = 0.0
    leave: float = 0.0


class KernelTimer(Protocol):
    """Times files in one runtime."""

    #: What measurements depend on, besides machine and file: runtime, version, threads, precision.
    identity: Mapping[str, Any]

    def __call__(self, model: Any, feed: Mapping[str, np.ndarray]) -> KernelTime:
        """Time an ONNX model on inputs."""


class OnnxRuntimeTimer:
    """Times the kernels of ONNX Runtime.

    Args:
        runtime: With its threads.
    """

    def __init__(self, runtime: OnnxRuntime) -> None:
        self.runtime = runtime
        library = require("onnxruntime", "onnx")
        self.identity: Mapping[str, Any] = {
            "runtime": runtime.label,
            "version": library.__version__,
            "threads": runtime.threads,
        }

    def __call__(self, model: Any, feed: Mapping[str, np.ndarray]) -> KernelTime:
        """Time an ONNX model on inputs."""
        library = require("onnxruntime", "onnx")
        with tempfile.TemporaryDirectory(prefix="dwindle-profile-") as folder:
            options = self.runtime.options()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = library.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            lost = _repeat(lambda: session.run(None, dict(feed)))
            events = json.loads(Path(session.end_profiling()).read_text())
        return _typical(_runs_of(events), lost)


def _runs_of(events: Sequence[Mapping[str, Any]]) -> list[KernelTime]:
    """Return the kernel times of each run that a profile of ONNX Runtime holds."""
    runs = sorted((own["ts"], own["ts"] + own["dur"]) for own in events if own["name"] == "model_run")
    sums = [{"inside": 0.0, "enter": 0.0, "leave": 0.0} for _ in runs]
    place = 0
    kernels = [own for own in events if own.get("cat") == "Node" and own["name"].endswith("_kernel_time")]
    for event in sorted(kernels, key=lambda own: own["ts"]):
        if event["name"].startswith(BORDER):
            continue
        while place + 1 < len(runs) and event["ts"] > runs[place][1]:
            place += 1
        part = {"ReorderInput": "enter", "ReorderOutput": "leave"}.get(event["args"]["op_name"], "inside")
        sums[place][part] += event["dur"] * 1e-6
    return [KernelTime(**own) for own in sums]


class OpenVinoTimer:
    """Times the kernels of OpenVINO.

    Args:
        runtime: With its threads and precision.
    """

    def __init__(self, runtime: OpenVinoRuntime) -> None:
        self.runtime = runtime
        library = require("openvino", "openvino")
        self.identity: Mapping[str, Any] = {
            "runtime": runtime.label,
            "version": library.__version__,
            "threads": runtime.threads,
        }
        self._core = library.Core()

    def __call__(self, model: Any, feed: Mapping[str, np.ndarray]) -> KernelTime:
        """Time an ONNX model on inputs."""
        settings = {**self.runtime.settings(), "PERF_COUNT": True}
        read = self._core.read_model(model.SerializeToString())
        compiled = self._core.compile_model(read, "CPU", settings)
        request = compiled.create_infer_request()
        given = {port.any_name for port in compiled.inputs}
        inputs = {name: array for name, array in feed.items() if name in given}
        borders = {name for port in (*compiled.inputs, *compiled.outputs) for name in port.names}
        averages: list[KernelTime] = []

        def run() -> None:
            request.infer(inputs, share_inputs=True, share_outputs=True)

        def note() -> None:
            averages.append(_of_counters(request.get_profiling_info(), borders))

        return _mean_of_quiet(averages, _repeat(run, note))


def _of_counters(counters: Sequence[Any], borders: set[str]) -> KernelTime:
    """Return the kernel times that OpenVINO's counters tell: averages over all runs so far."""
    sums = {"inside": 0.0, "enter": 0.0, "leave": 0.0}
    for counter in counters:
        if counter.node_name.startswith(BORDER) and counter.node_type != "Reorder":
            continue
        part = "inside"
        if counter.node_type == "Reorder":  # named after the result that is brought into another layout
            begins = counter.node_name.startswith((BORDER, *(f"{name}_" for name in borders)))
            part = "enter" if begins else "leave"
        sums[part] += counter.real_time.total_seconds()
    return KernelTime(**sums)


def _mean_of_quiet(averages: Sequence[KernelTime], lost: Sequence[float]) -> KernelTime:
    """Return the mean over the runs that were left alone, but the first ones, from averages over all runs so far.

    Args:
        averages: After each run, the first (that warms up) included.
        lost: How disturbed each but the first was.
    """
    limit = _limit(lost)
    totals = [[number * value for value in astuple(own)] for number, own in enumerate(averages, 1)]
    warm = min(2, len(lost) - 1)
    quiet = [number for number, share in enumerate(lost, 1) if share <= limit and number > warm]
    quiet = quiet or [len(lost)]
    sums = [
        sum(totals[number][part] - totals[number - 1][part] for number in quiet) / len(quiet)
        for part in range(3)
    ]
    return KernelTime(*(max(0.0, own) for own in sums))


def _limit(lost: Sequence[float]) -> float:
    """Up to which disturbance runs count: the usual one, or so that a quarter of all do."""
    return max(DISTURBED, sorted(lost)[len(lost) // 4])


def _repeat(run: Callable[[], Any], note: Callable[[], None] = lambda: None) -> list[float]:
    """Run some times, and return how disturbed each run was: the share of its wall time without processor time.

    It goes on until enough runs were left alone, or for three times as long as it would take otherwise.

    Args:
        run: Is timed.
        note: Called after each run.
    """
    run()
    note()
    lost: list[float] = []
    begin = time.perf_counter()
    while True:
        wall, busy = time.perf_counter(), time.process_time()
        run()
        wall, busy = time.perf_counter() - wall, time.process_time() - busy
        lost.append(max(0.0, 1 - busy / wall))
        note()
        quiet, spent = sum(own < DISTURBED for own in lost), time.perf_counter() - begin
        enough = (quiet >= RUNS and spent > LEAST_SECONDS) or (quiet >= 3 and spent > SECONDS)
        if enough or len(lost) >= MOST_RUNS or (len(lost) >= 3 and spent > 3 * SECONDS):
            return lost


def _typical(times: Sequence[KernelTime], lost: Sequence[float]) -> KernelTime:
    """Return the median over the runs that were left alone (but the first); where there are none, over the best half.

    Args:
        times: Of each run, the first (that warms up) included.
        lost: How disturbed each but the first was.
    """
    limit = _limit(lost)
    kept = [own for own, share in zip(times[1:], lost, strict=True) if share <= limit]
    return KernelTime(*(statistics.median(column) for column in zip(*map(astuple, kept), strict=True)))


def has_kernel_timer(runtime: Runtime) -> bool:
    """Whether the kernels of a runtime can be timed."""
    return isinstance(runtime, OnnxRuntime | OpenVinoRuntime)


def kernel_timer(runtime: Runtime) -> KernelTimer:
    """Return what times kernels in a runtime.

    Raises:
        ConfigError: It is not one whose kernels can be timed.
    """
    if isinstance(runtime, OnnxRuntime):
        return OnnxRuntimeTimer(runtime)
    if isinstance(runtime, OpenVinoRuntime):
        return OpenVinoTimer(runtime)
    names = (OnnxRuntime.name, OpenVinoRuntime.name)
    raise ConfigError(
        f"latency is predicted from layers in {', '.join(names)}, not in {runtime.label!r}"
        f"{did_you_mean(runtime.label, names)}"
    )
