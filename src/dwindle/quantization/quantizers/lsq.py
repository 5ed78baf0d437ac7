"""Learned step size (LSQ, Esser et al. 2020, arXiv 1902.08153) and with an offset (LSQ+, Bhalgat et al. 2020,
arXiv 2004.09576).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.quantizers.learned import (
    RangeQuantizer,
    ScaledQuantizer,
    alive,
    checked,
    checked_sample,
    ending_at,
    first_scale,
    positive,
    slowed,
)
from dwindle.quantization.quantizers.range_search import least_error_range
from dwindle.quantization.quantizers.rounding import Bounds, Gradient, learned_round

_LSQ = Gradient("open")
_LSQ_PLUS = Gradient("closed")


def gradient_scale(shape: torch.Size, axis: int | None, activation: bool, highest: int) -> float:
    """Return the factor of the paper on the step's gradient, ``1 / sqrt(N * Q_P)``.

    Args:
        shape: Shape of the tensor.
        axis: The dimension with one step for each index: N then counts the values behind one step.
        activation: True when the first dimension counts samples; N is then the number of features of one.
        highest: The level Q_P.
    """
    count = math.prod(shape)
    if activation and shape:
        count //= max(shape[0], 1)
    if axis is not None:
        count //= max(shape[axis], 1)
    return 1.0 / math.sqrt(max(count, 1) * max(highest, 1))


class LsqQuantizer(ScaledQuantizer):
    """Learns the step with the gradient ``round(v) - v`` inside and the nearest level outside.

    The step starts at ``2 mean|x| / sqrt(Q_P)`` of the first tensor (at the covering scale where only a range is
    known), and its gradient is multiplied by ``1 / sqrt(N Q_P)``. Levels and positions are counted from a zero point
    that stays (see :class:`ScaledQuantizer`): 0 for weights, the lowest level after a ReLU, as in the paper.

    Attributes:
        scale: The step, a parameter; kernels take its absolute value.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, form: NumberFormat, axis: int | None = None, *, activation: bool = False) -> None:
        super().__init__(form, axis, activation=activation)
        self.learn("scale")

    def initialize(self, low: Tensor, high: Tensor, sample: Tensor | None = None) -> None:
        """Set the step of the first tensor.

        Args:
            low: Smallest values, one or one per channel.
            high: Largest values; they and ``low`` give the zero point.
            sample: A weight, or a batch of an activation.

        Raises:
            ConfigError: NaN, infinity, or no range at all.
        """
        low, high = checked(low, high)
        scale, zero_point = first_scale(low, high, self.form)
        if sample is not None:
            mean = checked_sample(sample, self.axis).abs().mean(1).reshape(low.shape)
            scale = alive(2 * mean / self.reach(zero_point).sqrt(), self.form)
        self.put(scale=scale, zero_point=zero_point)

    def end_at(self, bound: float) -> None:
        """Let no level stand for more than a bound, by a smaller step."""
        with torch.no_grad():
            most = ending_at(bound, self.reach(self.zero_point)).to(self.scale.dtype)
            self.scale.copy_(torch.minimum(positive(self.require(self.scale)), most))

    def forward(self, value: Tensor, bounds: Bounds | None = None) -> Tensor:
        """Round to the learned steps.

        Args:
            value: Any floating tensor.
            bounds: Clip to these first.
        """
        factor = gradient_scale(value.shape, self.axis, self.activation, self.form.highest)
        scale = slowed(positive(self.require(self.scale)), factor)
        return learned_round(
            value, scale, self.moved_zero, self.form, self.axis, gradient=_LSQ, bounds=bounds
        )

    def scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Return the learned step and the zero point of the start."""
        return positive(self.require(self.scale).detach()).float(), self.zero_point


class LsqPlusQuantizer(RangeQuantizer):
    """Learns the step and the offset, for activations of both signs that are not symmetric.

    ``x' = clamp(round((x - offset) / scale), lowest, highest) * scale + offset``, where the offset is brought to a
    whole number of steps so that zero stays exact and integer kernels can follow. Weights start at
    ``max(|mean - 3 sd|, |mean + 3 sd|)`` and activations at the range of least squared error, as in the paper; both
    gradients carry LSQ's factor. Symmetric levels have no offset, as the paper has it for weights. A value on the very
    edge counts as inside, so that the zeros of a ReLU say nothing about the offset.

    Attributes:
        scale: The step, a parameter; kernels take its absolute value.
        offset: What level 0 stands for, a parameter (without gradient for symmetric levels).
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, form: NumberFormat, axis: int | None = None, *, activation: bool = False) -> None:
        super().__init__(form, axis, activation=activation)
        self.learn("scale")
        self.learn("offset")
        self.offset.requires_grad_(not form.symmetric)

    def initialize(self, low: Tensor, high: Tensor, sample: Tensor | None = None) -> None:
        """Set the step and the offset.

        Args:
            low: Smallest values, one or one per channel.
            high: Largest values.
            sample: A weight, or a batch of an activation; without it the range itself is taken.

        Raises:
            ConfigError: NaN, infinity, or no range at all.
        """
        low, high = checked(low, high)
        if sample is not None:
            rows = checked_sample(sample, self.axis)
            low, high = (
                edge.reshape(low.shape)
                for edge in (
                    least_error_range(rows, self.form) if self.activation else three_deviations(rows)
                )
            )
        scale, zero_point = first_scale(low, high, self.form)
        self.put(scale=scale, offset=-zero_point * scale)

    def end_at(self, bound: float) -> None:
        """Let no level stand for more than a bound, by a smaller step; the offset stays as many steps."""
        with torch.no_grad():
            scale, zero_point = self.scale_and_zero_point()
            most = torch.minimum(scale, ending_at(bound, (self.form.highest - zero_point).clamp(min=1)))
            self.offset.mul_((most / scale).to(self.offset.dtype))
            self.scale.copy_(most)

    def forward(self, value: Tensor, bounds: Bounds | None = None) -> Tensor:
        """Round to the learned steps.

        Args:
            value: Any floating tensor.
            bounds: Clip to these first.
        """
        factor = gradient_scale(value.shape, self.axis, self.activation, self.form.highest)
        scale = slowed(positive(self.require(self.scale)), factor)
        if self.form.symmetric:
            zero = None if self.form.signed else self.scale_and_zero_point()[1]
            return learned_round(value, scale, zero, self.form, self.axis, gradient=_LSQ_PLUS, bounds=bounds)
        offset = slowed(self.offset, factor)
        zero = self.scale_and_zero_point()[1]
        return learned_round(
            value, scale, zero, self.form, self.axis, offset=offset, gradient=_LSQ_PLUS, bounds=bounds
        )

    def scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Return the learned step, and the offset as a whole number of steps."""
        scale = positive(self.require(self.scale).detach()).float()
        place = (-self.offset.detach().float() / scale).round()
        return scale, place.clamp(self.form.lowest, self.form.highest).to(torch.int32)


def three_deviations(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return LSQ+'s first range of weights, ``max(|mean - 3 sd|, |mean + 3 sd|)`` on both sides.

    Args:
        rows: Shape ``(channels, values)``.
    """
    mean, deviation = rows.mean(1), rows.std(1, correction=0)
    edge = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs())
    return -edge, edge
