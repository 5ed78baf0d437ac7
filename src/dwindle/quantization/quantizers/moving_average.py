"""Ranges that follow the batches in training and stand still in evaluation (Jacob et al. 2018, arXiv 1712.05877)."""

from __future__ import annotations

import torch
from torch import Tensor

from dwindle.quantization.numbers import NumberFormat, scale_and_zero_point
from dwindle.quantization.quantizers.learned import RangeQuantizer, checked
from dwindle.quantization.quantizers.rounding import Bounds, learned_round
from dwindle.training.processes import widest_range


class MovingAverageQuantizer(RangeQuantizer):
    """Exponential moving averages of the minimum and maximum; gradients pass straight through inside the range.

    The paper follows activations slowly and takes weights as they are: use ``momentum=1`` for weights (the range
    then is that of the weight of the last training step). A batch with NaN or infinity does not move the range.

    Args:
        form: The levels.
        axis: The dimension with one scale for each index, or None for one scale.
        activation: True for activations.
        momentum: Weight of a new batch, in (0, 1].

    Attributes:
        low: Followed minimum, float32 buffer.
        high: Followed maximum.

    Raises:
        ValueError: The momentum is not in (0, 1].
    """

    low: Tensor
    high: Tensor

    def __init__(
        self, form: NumberFormat, axis: int | None = None, *, activation: bool = False, momentum: float = 0.01
    ) -> None:
        super().__init__(form, axis, activation=activation)
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum {momentum} is not in (0, 1]")
        self.momentum = momentum
        self.follow("low")
        self.follow("high")

    def initialize(self, low: Tensor, high: Tensor, sample: Tensor | None = None) -> None:
        """Start from a range; it counts like a first batch.

        Args:
            low: Smallest values, one or one per channel.
            high: Largest values.
            sample: Not needed.

        Raises:
            ConfigError: The range is not one.
        """
        low, high = checked(low, high)
        self.put(low=low, high=high)

    def forward(self, value: Tensor, bounds: Bounds | None = None) -> Tensor:
        """Round; in training, let the range follow first.

        Args:
            value: Any floating tensor.
            bounds: Clip to these first.
        """
        self.require(self.low)
        if self.training:
            together = self.activation and torch.is_grad_enabled()
            follow(self.low, self.high, value, self.axis, self.momentum, bounds, together=together)
        scale, zero_point = self.scale_and_zero_point()
        moved = None if self.form.symmetric and self.form.signed else zero_point
        return learned_round(value, scale, moved, self.form, self.axis, bounds=bounds)

    def scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Return what covers the followed range."""
        return scale_and_zero_point(self.require(self.low), self.high, self.form)


@torch.no_grad()
def follow(
    low: Tensor,
    high: Tensor,
    value: Tensor,
    axis: int | None,
    momentum: float,
    bounds: Bounds | None = None,
    *,
    together: bool = False,
) -> None:
    """Move two edges towards those of a tensor, in place; nothing is read back to the host.

    Args:
        low: Followed minimum, one value or one for each index of ``axis``.
        high: Followed maximum.
        value: The new tensor; one that is empty, or has NaN or infinity at an edge, changes nothing there.
        axis: See there.
        momentum: Weight of the new tensor.
        bounds: Clip the edges to these.
        together: The tensor is a part of one that is spread over all processes, which call this at the same time.
    """
    least, most = edges(value, axis, bounds)
    least, most = least.to(low.dtype).reshape(low.shape), most.to(high.dtype).reshape(high.shape)
    if together:
        least, most = widest_range(least, most)
    move(low, high, least, most, momentum)


@torch.no_grad()
def move(low: Tensor, high: Tensor, least: Tensor, most: Tensor, momentum: float) -> None:
    """Move two edges towards new ones of the same shape, in place; where those are not finite nothing changes."""
    sound = least.isfinite() & most.isfinite()
    low.copy_(torch.where(sound, low + momentum * (least - low), low))
    high.copy_(torch.where(sound, high + momentum * (most - high), high))


def edges(value: Tensor, axis: int | None, bounds: Bounds | None = None) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value, one or one for each index of ``axis``; infinities of an empty tensor.

    Args:
        value: Any floating tensor.
        axis: See there.
        bounds: Clip the edges to these.
    """
    value = value.detach()
    if not value.numel():
        shape = () if axis is None else (value.shape[axis],)
        return value.new_full(shape, torch.inf), value.new_full(shape, -torch.inf)
    if axis is None:
        least, most = value.aminmax()
    else:
        least, most = value.movedim(axis, 0).flatten(1).aminmax(dim=1)
    if bounds is not None:
        least, most = least.clamp(*bounds), most.clamp(*bounds)
    return least, most
