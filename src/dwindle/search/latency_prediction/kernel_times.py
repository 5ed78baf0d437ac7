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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dwindle.config.errors import ConfigError, did_you_mean, require
from dwindle.measure.runtimes import OnnxRuntime, OpenVinoRuntime, Runtime

__all__ = ["KernelTime", "KernelTimer", "kernel_timer"]

#: Runs that are timed, and seconds after which no further one begins (but three are done).
RUNS, SECONDS = 15, 0.25


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
            _repeat(lambda: session.run(None, dict(feed)))
            events = json.loads(Path(session.end_profiling()).read_text())
        return _typical(_runs_of(events))


def _runs_of(events: Sequence[Mapping[str, Any]]) -> list[KernelTime]:
    """Return the kernel times of each run that a profile of ONNX Runtime holds."""
    runs = sorted((own["ts"], own["ts"] + own["dur"]) for own in events if own["name"] == "model_run")
    sums = [{"inside": 0.0, "enter": 0.0, "leave": 0.0} for _ in runs]
    place = 0
    kernels = [own for own in events if own.get("cat") == "Node" and own["name"].endswith("_kernel_time")]
    for event in sorted(kernels, key=lambda own: own["ts"]):
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
        times: list[KernelTime] = []

        def run() -> None:
            request.infer(inputs, share_inputs=True, share_outputs=True)
            times.append(_of_counters(request.get_profiling_info(), borders))

        _repeat(run)
        return _typical(times)


def _of_counters(counters: Sequence[Any], borders: set[str]) -> KernelTime:
    """Return the kernel times of the last run, from OpenVINO's counters."""
    sums = {"inside": 0.0, "enter": 0.0, "leave": 0.0}
    for counter in counters:
        part = "inside"
        if counter.node_type == "Reorder":  # named after the result that is brought into another layout
            part = "enter" if any(counter.node_name.startswith(f"{name}_") for name in borders) else "leave"
        sums[part] += counter.real_time.total_seconds()
    return KernelTime(**sums)


def _repeat(run: Callable[[], Any]) -> None:
    """Run some times: at least three, no longer than it takes to have a typical one."""
    run()
    begin = time.perf_counter()
    for done in range(RUNS):
        if done >= 3 and time.perf_counter() - begin > SECONDS:
            return
        run()


def _typical(times: Sequence[KernelTime]) -> KernelTime:
    """Return the lower quartile over runs but the first: other programs only ever make a run slower."""
    kept = times[1:]

    def low(values: list[float]) -> float:
        return statistics.quantiles(values, n=4, method="inclusive")[0] if len(values) > 1 else values[0]

    return KernelTime(
        low([own.inside for own in kept]), low([own.enter for own in kept]), low([own.leave for own in kept])
    )


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
