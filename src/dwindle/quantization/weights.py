"""Scales of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.quantization.numbers import SMALLEST_SCALE, NumberFormat

_PAIR_LIMIT = 128
"""Two products of a uint8 (at most 255) and weights that add up to 128 fit in 16 bits: 255 * 128 < 32767."""


def weight_scale(
    weight: Tensor, axis: int | None, form: NumberFormat, *, avoid_saturation: bool = False
) -> Tensor:
    """Return symmetric scales of a weight.

    Processors without VNNI multiply uint8 by int8 with an instruction that adds two neighbouring products in
    16 bits and saturates silently, so integer kernels compute something else than they should. Which weights
    become neighbours is the kernel's affair; when the two largest of equal sign add up to at most 128 levels,
    no pair can saturate. That costs between nothing and one bit.

    Args:
        weight: Any floating tensor.
        axis: Dimension with a scale per index; None for one scale.
        form: The levels, symmetric.
        avoid_saturation: Keep pairs of weights within 16-bit sums.

    Returns:
        float64 scales: a vector of the size of ``axis``, or of one element.
    """
    rows = weight.detach().double()
    rows = rows.reshape(1, -1) if axis is None else rows.movedim(axis, 0).reshape(weight.shape[axis], -1)
    scale = rows.abs().amax(dim=1) / form.highest
    if avoid_saturation and form.highest == 127 and rows.shape[1] > 1:
        for side in (rows, -rows):
            pair = torch.topk(side, 2, dim=1).values.clamp(min=0.0).sum(dim=1)
            # Rounding may lift both weights by half a level.
            scale = torch.maximum(scale, pair / (_PAIR_LIMIT - 1))
    return scale.clamp(min=SMALLEST_SCALE)


WEIGHT_RANGES = ("minmax", "mse")
_SHRINKS = 80
"""Candidates of a clipped range, from the whole down to a fifth of it."""


def check_weight_range(name: str) -> None:
    """Raise ConfigError when there is no such way to choose the ranges of weights."""
    if name not in WEIGHT_RANGES:
        raise ConfigError(
            f"weight_range {name!r} is not known: {', '.join(WEIGHT_RANGES)}{did_you_mean(name, WEIGHT_RANGES)}"
        )


def clipped_scale(weight: Tensor, axis: int | None, form: NumberFormat, scale: Tensor) -> Tensor:
    """Return the scales, at most the given ones, with the least squared error of rounding and clipping together.

    Args:
        weight: Any floating tensor.
        axis: Dimension with a scale per index; None for one scale.
        form: The levels, symmetric.
        scale: float64 scales that clip nothing.
    """
    rows = weight.detach().double()
    rows = rows.reshape(1, -1) if axis is None else rows.movedim(axis, 0).reshape(weight.shape[axis], -1)
    best, least = scale.clone(), torch.full_like(scale, torch.inf)
    for factor in torch.linspace(1.0, 0.2, _SHRINKS, dtype=torch.float64).tolist():
        own = (scale * factor).clamp(min=SMALLEST_SCALE)[:, None]
        error = ((rows / own).round().clamp(form.lowest, form.highest) * own - rows).square().sum(1)
        best, least = torch.where(error < least, own[:, 0], best), torch.minimum(error, least)
    return best


def is_depthwise(weight: Tensor, groups: int) -> bool:
    """Say whether a convolution's weight has one input channel per group and as many groups as outputs.

    Such kernels add products one by one, in 32 bits.
    """
    return groups > 1 and weight.shape[0] == groups and weight.dim() > 2 and weight.shape[1] == 1
