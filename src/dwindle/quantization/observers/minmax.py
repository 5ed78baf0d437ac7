"""The whole range ever seen."""

from __future__ import annotations

import math

from torch import Tensor

from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.observers.base import Observer, finite_range


class MinMaxObserver(Observer):
    """Range from the smallest to the largest finite value of all batches."""

    def __init__(self) -> None:
        self.low = math.inf
        self.high = -math.inf

    def update(self, value: Tensor) -> None:
        """Widen the range to the tensor's own."""
        seen = finite_range(value)
        if seen is not None:
            self.low, self.high = min(self.low, seen[0]), max(self.high, seen[1])

    def range(self, form: NumberFormat) -> tuple[float, float]:
        """Return the range, widened to contain zero."""
        if self.low > self.high:
            raise ValueError("nothing was observed")
        return min(self.low, 0.0), max(self.high, 0.0)
