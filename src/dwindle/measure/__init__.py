"""Measurements: parameters, MACs, bytes, activations, latency in each runtime, accuracy.

The package is callable: ``dwindle.measure(model, (x,))`` is :func:`dwindle.measure.measuring.measure`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwindle.measure.activations import peak_activation_bytes
    from dwindle.measure.macs import MacCount, count_macs, count_macs_by_module
    from dwindle.measure.measurement import Comparison, Measurement
    from dwindle.measure.measuring import measure
    from dwindle.measure.runtime import Runtime, Session
    from dwindle.measure.runtimes import RUNTIMES, OnnxRuntime, OpenVinoRuntime, TorchRuntime, get_runtime
    from dwindle.measure.size import count_parameters, state_bytes
    from dwindle.measure.timing import Latency, time_interleaved

_HOMES = {
    "Comparison": "measurement",
    "Latency": "timing",
    "MacCount": "macs",
    "Measurement": "measurement",
    "OnnxRuntime": "runtimes",
    "OpenVinoRuntime": "runtimes",
    "RUNTIMES": "runtimes",
    "Runtime": "runtime",
    "Session": "runtime",
    "TorchRuntime": "runtimes",
    "count_macs": "macs",
    "count_macs_by_module": "macs",
    "count_parameters": "size",
    "get_runtime": "runtimes",
    "measure": "measuring",
    "peak_activation_bytes": "activations",
    "state_bytes": "size",
    "time_interleaved": "timing",
}

__all__ = [
    "RUNTIMES",
    "Comparison",
    "Latency",
    "MacCount",
    "Measurement",
    "OnnxRuntime",
    "OpenVinoRuntime",
    "Runtime",
    "Session",
    "TorchRuntime",
    "count_macs",
    "count_macs_by_module",
    "count_parameters",
    "get_runtime",
    "measure",
    "peak_activation_bytes",
    "state_bytes",
    "time_interleaved",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used; the runtimes and the writers need each other's files."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Callable(ModuleType):
    """Lets ``dwindle.measure(...)`` be the function although ``dwindle.measure`` is this package."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.measure(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
