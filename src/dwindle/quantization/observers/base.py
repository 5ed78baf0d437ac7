"""What every observer does."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dwindle.quantization.numbers import NumberFormat


class Observer(ABC):
    """Watches the values of one place during calibration."""

    @abstractmethod
    def update(self, value: Tensor) -> None:
        """Take in one more tensor of values.

        Args:
            value: A floating tensor of any shape. It is not kept and not changed.
        """

    @abstractmethod
    def range(self, form: NumberFormat) -> tuple[float, float]:
        """Return the smallest and the largest value to represent, with ``low <= 0 <= high``.

        Args:
            form: The levels that will be spread over the range; some observers weigh rounding against
                clipping with it.

        Raises:
            ValueError: Nothing was observed yet.
        """


def finite_range(value: Tensor) -> tuple[float, float] | None:
    """Return the smallest and the largest finite value of a tensor, or None when it holds none.

    Args:
        value: Any floating tensor; infinities and NaN are passed over.
    """
    if not value.numel():
        return None
    low, high = (float(edge) for edge in value.detach().aminmax())
    if math.isfinite(low) and math.isfinite(high):
        return low, high
    value = value[torch.isfinite(value)]
    return finite_range(value)
