"""How a value moves with steps: constant, linear, cubic, cosine.

Every schedule is a frozen value with one method, ``schedule(step) -> float``; it holds no state, so a resumed
run needs nothing but its step number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dwindle.config.errors import ConfigError

__all__ = [
    "ConstantSchedule",
    "CosineSchedule",
    "CubicSchedule",
    "LinearSchedule",
    "Schedule",
    "value_at",
]


@runtime_checkable
class Schedule(Protocol):
    """A value as a function of the step number (0 is before the first step)."""

    def __call__(self, step: int) -> float:
        """Return the value at ``step``."""


@dataclass(frozen=True)
class ConstantSchedule:
    """The same value at every step."""

    value: float

    def __call__(self, step: int) -> float:
        """Return the value."""
        return self.value


@dataclass(frozen=True)
class _Ramp:
    """From ``start`` to ``end`` between two steps; constant before and after.

    Args:
        start: The value until ``begin_step``.
        end: The value from ``begin_step + steps`` on.
        steps: How many steps the way takes (at least 1).
        begin_step: The step at which it begins.
    """

    start: float
    end: float
    steps: int
    begin_step: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")
        if self.begin_step < 0:
            raise ConfigError(f"begin_step must not be negative, got {self.begin_step}")

    def _progress(self, step: int) -> float:
        return min(max((step - self.begin_step) / self.steps, 0.0), 1.0)

    def _between(self, share: float) -> float:
        """Weighted so that share 0 gives exactly ``start`` and share 1 exactly ``end``."""
        return self.start * (1.0 - share) + self.end * share


@dataclass(frozen=True)
class LinearSchedule(_Ramp):
    """A straight line: ``start + (end - start) * t`` with ``t`` from 0 to 1."""

    def __call__(self, step: int) -> float:
        """Return the value at ``step``."""
        return self._between(self._progress(step))


@dataclass(frozen=True)
class CubicSchedule(_Ramp):
    """Automated gradual pruning: fast first, slow at the end, ``end + (start - end) * (1 - t)**3``.

    Zhu and Gupta, "To prune, or not to prune" (https://arxiv.org/abs/1710.01878, equation 1).
    """

    def __call__(self, step: int) -> float:
        """Return the value at ``step``."""
        return self._between(1.0 - (1.0 - self._progress(step)) ** 3)


@dataclass(frozen=True)
class CosineSchedule(_Ramp):
    """Half a cosine wave: slow at both ends, ``end + (start - end) * (1 + cos(pi * t)) / 2``."""

    def __call__(self, step: int) -> float:
        """Return the value at ``step``."""
        return self._between((1.0 - math.cos(math.pi * self._progress(step))) / 2.0)


def value_at(value: float | Schedule, step: int) -> float:
    """Return ``value`` itself when it is a number, else what the schedule says at ``step``."""
    return float(value(step)) if callable(value) else float(value)
