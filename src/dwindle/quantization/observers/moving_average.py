"""A range that follows the batches slowly (Jacob et al. 2018, arXiv 1712.05877, section 3.1)."""

from __future__ import annotations

from torch import Tensor

from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.observers.base import Observer, finite_range


class MovingAverageObserver(Observer):
    """Exponential moving averages of the batches' smallest and largest finite value.

    Args:
        momentum: Weight of a new batch, in (0, 1]. The first batch counts fully.
    """

    def __init__(self, momentum: float = 0.1) -> None:
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum {momentum} is not in (0, 1]")
        self.momentum = momentum
        self.low: float | None = None
        self.high: float | None = None

    def update(self, value: Tensor) -> None:
        """Move the range towards the tensor's own."""
        seen = finite_range(value)
        if seen is None:
            return
        low, high = seen
        if self.low is None or self.high is None:
            self.low, self.high = low, high
        else:
            self.low += self.momentum * (low - self.low)
            self.high += self.momentum * (high - self.high)

    def range(self, form: NumberFormat) -> tuple[float, float]:
        """Return the averaged range, widened to contain zero."""
        if self.low is None or self.high is None:
            raise ValueError("nothing was observed")
        return min(self.low, 0.0), max(self.high, 0.0)
