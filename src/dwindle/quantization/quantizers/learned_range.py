"""Learned ranges as NNCF trains them (Kozlov et al. 2020, arXiv 2002.08679): symmetric, and asymmetric."""

from __future__ import annotations

import torch
from torch import Tensor

from dwindle.quantization.numbers import SMALLEST_SCALE, NumberFormat
from dwindle.quantization.quantizers.learned import (
    RangeQuantizer,
    ScaledQuantizer,
    checked,
    first_scale,
    positive,
    straight,
)
from dwindle.quantization.quantizers.rounding import Bounds, Gradient, learned_round

_RANGE = Gradient("closed")


class SymmetricRangeQuantizer(ScaledQuantizer):
    """Learns the highest value; the lowest follows in proportion to the levels.

    The gradient of ``edge`` is ``(x' - x) / width`` inside, 1 above and ``lowest / highest`` below, levels counted from
    the zero point. As in NNCF the rounding error is divided by the width of the range, which for signed levels is about
    half of the derivative (:class:`LsqQuantizer` has all of it).

    Attributes:
        edge: The value of the highest level, a parameter; kernels take its absolute value.
    """

    edge: Tensor
    zero_point: Tensor

    def __init__(self, form: NumberFormat, axis: int | None = None, *, activation: bool = False) -> None:
        super().__init__(form, axis, activation=activation)
        self.learn("edge")
        middle = (form.lowest + form.highest + 1) // 2 if form.symmetric else form.lowest
        self.gradient = Gradient("closed", (form.highest - middle) / (form.highest - form.lowest))

    def initialize(self, low: Tensor, high: Tensor, sample: Tensor | None = None) -> None:
        """Set the edge of a range.

        Args:
            low: Smallest values, one or one per channel.
            high: Largest values.
            sample: Not needed.

        Raises:
            ConfigError: NaN, infinity, or no range at all.
        """
        low, high = checked(low, high)
        scale, zero_point = first_scale(low, high, self.form)
        self.put(edge=scale * self.reach(zero_point), zero_point=zero_point)

    def forward(self, value: Tensor, bounds: Bounds | None = None) -> Tensor:
        """Round to the learned range.

        Args:
            value: Any floating tensor.
            bounds: Clip to these first.
        """
        return learned_round(
            value, self._scale(), self.moved_zero, self.form, self.axis, gradient=self.gradient, bounds=bounds
        )

    def scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Return the step of the learned range and the zero point of the start."""
        return self._scale().detach().float(), self.zero_point

    def _scale(self) -> Tensor:
        return positive(self.require(self.edge) / self.reach(self.zero_point))


class AsymmetricRangeQuantizer(RangeQuantizer):
    """Learns the lowest value and the width of the range.

    Before rounding, the range is widened to contain zero, and one edge is moved outwards so that zero falls on a
    level; gradients pass through that unchanged. The width's gradient is ``(x' - x) / width`` inside, 1 above and 0
    below; that of the lowest value is 1 outside and 0 inside.

    Attributes:
        low: Lowest value, a parameter.
        width: Highest value minus lowest, a parameter; its absolute value is taken.
    """

    low: Tensor
    width: Tensor

    def __init__(self, form: NumberFormat, axis: int | None = None, *, activation: bool = False) -> None:
        super().__init__(form, axis, activation=activation)
        self.learn("low")
        self.learn("width")

    def initialize(self, low: Tensor, high: Tensor, sample: Tensor | None = None) -> None:
        """Set the range.

        Args:
            low: Smallest values, one or one per channel.
            high: Largest values.
            sample: Not needed.

        Raises:
            ConfigError: NaN, infinity, or no range at all.
        """
        low, high = checked(low, high)
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale, _ = first_scale(low, high, self.form)
        width = torch.where(high > low, high - low, scale * (self.form.highest - self.form.lowest))
        self.put(low=low, width=width)

    def forward(self, value: Tensor, bounds: Bounds | None = None) -> Tensor:
        """Round to the learned range.

        Args:
            value: Any floating tensor.
            bounds: Clip to these first.
        """
        tuned, zero_point = self.scale_and_zero_point()
        scale = straight(tuned, self.width.abs() / (self.form.highest - self.form.lowest))
        offset = self.low - self.form.lowest * scale
        return learned_round(
            value, scale, zero_point, self.form, self.axis, offset=offset, gradient=_RANGE, bounds=bounds
        )

    def scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Return the step and zero point of the tuned range."""
        low, width = self.require(self.low).detach().double(), self.width.detach().double().abs()
        levels = self.form.highest - self.form.lowest
        low, width = tune_range(low, width, levels)
        scale = (width / levels).clamp(min=SMALLEST_SCALE)
        zero_point = self.form.lowest + (-low / scale).round()
        return scale.float(), zero_point.clamp(self.form.lowest, self.form.highest).to(torch.int32)


def tune_range(low: Tensor, width: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Widen ranges to contain zero, and then so that zero is a level, by moving the edge that widens most.

    Args:
        low: Lowest values, float64.
        width: Widths of the ranges, not negative.
        levels: Number of steps, one less than the number of levels.

    Returns:
        The new lowest values and widths.
    """
    high = (low + width).clamp(min=0)
    low = low.clamp(max=0)
    zero = (-low * levels / (high - low).clamp(min=SMALLEST_SCALE)).round()
    moved_low = torch.where(zero < levels, zero / (zero - levels).clamp(max=-1) * high, low)
    moved_high = torch.where(zero > 0, (zero - levels) / zero.clamp(min=1) * low, high)
    move_low = high - moved_low > moved_high - low
    low, high = torch.where(move_low, moved_low, low), torch.where(move_low, high, moved_high)
    return low, high - low
