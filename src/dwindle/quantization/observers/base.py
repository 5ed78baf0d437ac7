"""What every observer does."""

from __future__ import annotations

from abc import ABC, abstractmethod

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
