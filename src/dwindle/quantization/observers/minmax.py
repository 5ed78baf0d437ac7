"""The whole range ever seen."""

from __future__ import annotations

import math

from torch import Tensor

from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.observers.base import Observer


class MinMaxObserver(Observer):
    """Range from the smallest to the largest value of all batches."""

    def __init__(self) -> None:
        self.low = math.inf
        self.high = -math.inf

    def update(self, value: Tensor) -> None:
        """Widen the range to the tensor's own."""
        if value.numel():
            low, high = value.detach().aminmax()
            self.low = min(self.low, float(low))
            self.high = max(self.high, float(high))

    def range(self, form: NumberFormat) -> tuple[float, float]:
        """Return the range, widened to contain zero."""
        if self.low > self.high:
            raise ValueError("nothing was observed")
        return min(self.low, 0.0), max(self.high, 0.0)
