"""What a compressed model may cost: limits such as 0.25 of the latency, ``"8 ms"`` or ``"500 kB"``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.measure.runtimes import get_runtime

__all__ = ["COSTS", "Limit", "parse_limits", "runtime_of"]

COSTS = {
    "latency": "milliseconds of one forward pass in a runtime (latency:onnxruntime, latency:openvino)",
    "bytes": "bytes of the file that the runtime reads",
    "params": "parameters",
    "macs": "multiply-accumulates of one forward pass",
    "bit_operations": "multiply-accumulates times the bits of both factors",
    "peak_memory": "bytes of the weights and of the activations that live at the same time",
    "energy": "picojoules of arithmetic and of reading weights, from a table",
}
"""What can be limited, and its unit."""

_FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30}
_SECONDS = {"s": 1e3, "ms": 1.0, "us": 1e-3, "µs": 1e-3, "ns": 1e-6}
_NAMES = {
    "bytes": ("b", "byte", "bytes"),
    "peak_memory": ("b", "byte", "bytes"),
    "params": ("", "params", "parameters"),
    "macs": ("", "macs", "mac"),
    "bit_operations": ("", "bops", "bit_operations"),
    "energy": ("pj",),
}


@dataclass(frozen=True)
class Limit:
    """The most that one cost may be.

    Attributes:
        cost: A name of :data:`COSTS`; latencies with their runtime, ``"latency:onnxruntime"``.
        value: A share of the original's cost, or a number in the unit of the cost.
        absolute: Which of the two it is.
    """

    cost: str
    value: float
    absolute: bool

    def allowed(self, original: float) -> float:
        """Return the limit in the unit of the cost.

        Args:
            original: What the original costs.
        """
        return self.value if self.absolute else self.value * original

    def __str__(self) -> str:
        return f"{self.cost} {self.value:g}" + ("" if self.absolute else " of the original's")


def runtime_of(cost: str) -> str | None:
    """Return the runtime of a latency; None for other costs."""
    return cost.partition(":")[2] if cost.startswith("latency:") else None


def parse_limits(budget: Mapping[str, float | str]) -> tuple[Limit, ...]:
    """Read a budget.

    Args:
        budget: By cost: a share above 0 and up to 1 of the original's, or words with a unit (``"8 ms"``, ``"500 kB"``,
            ``"40 MMACs"``, ``"1e6"``).

    Raises:
        ConfigError: A cost or a value is not known; the message names the nearest.
        MissingDependencyError: The library of a runtime is not installed.
    """
    if not isinstance(budget, Mapping) or not budget:
        raise ConfigError('budget: give at least one limit, such as {"latency:onnxruntime": 0.25}')
    return tuple(_limit(cost, value) for cost, value in budget.items())


def _limit(cost: str, value: float | str) -> Limit:
    kind, _, runtime = cost.partition(":")
    if kind not in COSTS or (runtime and kind != "latency"):
        raise ConfigError(f"budget: {cost!r} is not one of {', '.join(COSTS)}{did_you_mean(kind, COSTS)}")
    if kind == "latency":
        if not runtime:
            raise ConfigError(
                "budget: name the runtime of the latency: 'latency:onnxruntime', 'latency:openvino' or 'latency:torch'"
            )
        get_runtime(runtime)
    if isinstance(value, str):
        return Limit(cost, _with_unit(cost, kind, value), True)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ConfigError(
            f"budget: {cost} = {value!r} is not a share above 0 and up to 1; absolute limits are words with a unit, "
            f"such as {_example(kind)!r}"
        )
    return Limit(cost, float(value), False)


def _example(kind: str) -> str:
    return {"latency": "8 ms", "bytes": "500 kB", "peak_memory": "4 MB", "energy": "2e6 pJ"}.get(kind, "40 M")


def _with_unit(cost: str, kind: str, text: str) -> float:
    found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([^\W\d]*)\s*", text, re.IGNORECASE)
    unit = found[2].lower() if found else ""
    factor: float | None = None
    if found and kind == "latency":
        factor = _SECONDS.get(unit)
    elif found:
        name = next((own for own in sorted(_NAMES[kind], key=len, reverse=True) if unit.endswith(own)), None)
        if name is not None or unit in _FACTORS:
            factor = _FACTORS.get(unit.removesuffix(name or ""))
    if found is None or factor is None:
        raise ConfigError(f"budget: {cost} = {text!r} is no number with a unit, such as {_example(kind)!r}")
    number = float(found[1]) * factor
    if number <= 0:
        raise ConfigError(f"budget: {cost} = {text!r} is not above 0")
    return number
