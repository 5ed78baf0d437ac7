"""How a value moves with steps: constant, linear, cubic, cosine, polynomial, exponential, in steps, by the loss.

Every schedule is a frozen value with one method, ``schedule(step) -> float``; it holds no state, so a resumed
run needs nothing but its step number. The one exception moves by the loss, and stands in
:mod:`dwindle.training.adaptive_schedule`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dwindle.config.errors import ConfigError

__all__ = [
    "ConstantSchedule",
    "CosineSchedule",
    "CubicSchedule",
    "ExponentialSchedule",
    "ExponentialWithBiasSchedule",
    "LinearSchedule",
    "MultistepSchedule",
    "PolynomialSchedule",
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


@dataclass(frozen=True)
class PolynomialSchedule(_Ramp):
    """A power of the way: fast first (concave) or slow first (convex).

    Concave is ``end + (start - end) * (1 - t)**power``, convex ``start + (end - start) * t**power``, with ``t``
    from 0 to 1. Concave with power 3 is :class:`CubicSchedule`.

    Args:
        power: The exponent, above 0.
        concave: Which of the two.
    """

    power: float = 3.0
    concave: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.power > 0:
            raise ConfigError(f"power must be above 0, got {self.power}")

    def __call__(self, step: int) -> float:
        """Return the value at ``step``."""
        way = self._progress(step)
        return self._between(1.0 - (1.0 - way) ** self.power if self.concave else way**self.power)


@dataclass(frozen=True)
class ExponentialSchedule(_Ramp):
    """What is left shrinks by the same factor at each step: ``1 - (1 - start) * ((1 - end) / (1 - start))**t``.

    For shares that go (sparsities); both ends are at least 0 and below 1. Over rounds in place of steps this is
    the lottery ticket's schedule: each round takes the same share of what is left.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, share in (("start", self.start), ("end", self.end)):
            if not 0 <= share < 1:
                raise ConfigError(
                    f"{name}: {share} is not at least 0 and below 1; what is left never shrinks to 0"
                )

    def __call__(self, step: int) -> float:
        """Return the value at ``step``."""
        way = self._progress(step)
        if way in (0.0, 1.0):
            return self._between(way)
        return 1.0 - (1.0 - self.start) * ((1.0 - self.end) / (1.0 - self.start)) ** way


@dataclass(frozen=True)
class ExponentialWithBiasSchedule(_Ramp):
    """``a * exp(-k * t) + b`` through ``start``, ``end``, and three quarters of ``end`` at one eighth of the way.

    He et al., "Asymptotic soft filter pruning" (https://arxiv.org/abs/1808.07471). Such a curve exists when
    ``start`` is below 5/7 of ``end``.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.start < self.end * 5 / 7:
            raise ConfigError(
                f"start {self.start} must be at least 0 and below 5/7 of end {self.end}: the curve reaches 3/4 of end "
                "at 1/8 of the way"
            )

    def __call__(self, step: int) -> float:
        """Return the value at ``step``."""
        way = self._progress(step)
        decay = _decay_of_an_eighth((0.75 * self.end - self.start) / (self.end - self.start))
        return self._between((1.0 - decay ** (8.0 * way)) / (1.0 - decay**8))


@functools.lru_cache(maxsize=64)
def _decay_of_an_eighth(share: float) -> float:
    """Return ``u = exp(-k / 8)`` for which ``(1 - u) / (1 - u**8)`` is ``share`` (1/8 to 1), by bisection.

    The quotient is ``1 / (1 + u + ... + u**7)``, which falls from 1 to 1/8 as ``u`` goes from 0 to 1.
    """
    low, high = 0.0, 1.0
    for _ in range(80):
        middle = (low + high) / 2.0
        if sum(middle**power for power in range(8)) * share < 1.0:
            low = middle
        else:
            high = middle
    return (low + high) / 2.0


@dataclass(frozen=True)
class MultistepSchedule:
    """Constant between given steps: ``values[0]`` before ``steps[0]``, ``values[1]`` from there on, and so on.

    Args:
        values: One more than there are steps.
        steps: Where the value changes, in rising order.
    """

    values: tuple[float, ...]
    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        object.__setattr__(self, "steps", tuple(self.steps))
        if len(self.values) != len(self.steps) + 1:
            raise ConfigError(
                f"{len(self.steps)} steps divide the way into {len(self.steps) + 1} parts, but there are "
                f"{len(self.values)} values"
            )
        if any(later <= sooner for sooner, later in zip(self.steps, self.steps[1:], strict=False)):
            raise ConfigError(f"steps must rise, got {list(self.steps)}")

    def __call__(self, step: int) -> float:
        """Return the value at ``step``."""
        return self.values[sum(step >= border for border in self.steps)]


def value_at(value: float | Schedule, step: int) -> float:
    """Return ``value`` itself when it is a number, else what the schedule says at ``step``."""
    return float(value(step)) if callable(value) else float(value)
