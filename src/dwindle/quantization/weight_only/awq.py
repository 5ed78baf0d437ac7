"""AWQ: inputs that are large get finer weights, by a scale for each input channel. Pure functions.

``W x = (W diag(s)) (diag(1/s) x)``, and with s above 1 a column is rounded more finely. s is a power of the mean size
of the channel's inputs; the power is searched for the least error of the layer's output (Lin et al., arXiv:2306.00978,
equations 4 and 5). The error is computed from ``X X'``, which holds all that it depends on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dwindle.quantization.weight_only.groups import (
    GroupFormat,
    fitted_parameters,
    from_levels,
    group_parameters,
    merge,
    split,
    to_levels,
)


def output_error(old: Tensor, new: Tensor, hessian: Tensor) -> Tensor:
    """Return ``||(W - V) X||²``, a 0-d tensor.

    Args:
        old: W, ``[rows, columns]``.
        new: V.
        hessian: ``X X'``, ``[columns, columns]``.
    """
    change = old - new
    return ((change @ hessian) * change).sum()


def channel_scale(magnitude: Tensor, power: float) -> Tensor:
    """Return ``magnitude ** power``, divided by the geometric mean of its largest and smallest value.

    Args:
        magnitude: Mean absolute input of each channel; channels without any input count as the smallest that has one.
        power: 0 gives ones.
    """
    positive = magnitude[magnitude > 0]
    if not positive.numel() or power == 0:
        return torch.ones_like(magnitude)
    scale = magnitude.clamp(min=float(positive.min())).pow(power)
    return scale / (scale.max() * scale.min()).sqrt()


def rounded(weight: Tensor, form: GroupFormat, importance: Tensor | None = None) -> Tensor:
    """Return a matrix as it is after rounding to nearest.

    Args:
        weight: ``[rows, columns]``.
        form: The levels.
        importance: Weight of each column's error in the choice of ranges; None takes whole ranges.
    """
    groups = split(weight, form)
    if importance is None:
        scale, zero = group_parameters(groups, form)
    else:
        scale, zero = fitted_parameters(groups, form, split(importance[None], form)[0])
    return merge(from_levels(to_levels(groups, scale, zero, form), scale, zero), weight.shape[1])


def awq_scale(
    weights: Sequence[Tensor],
    hessian: Tensor,
    magnitude: Tensor,
    forms: Sequence[GroupFormat],
    *,
    grid: int = 20,
) -> tuple[Tensor, float]:
    """Return the scale of each input channel that layers with one common input should have.

    Args:
        weights: The matrices, each ``[rows, columns]``.
        hessian: ``X X'`` of their input.
        magnitude: Mean absolute value of each input channel.
        forms: The levels of each.
        grid: Powers ``0, 1/grid, ...`` below 1 are tried; 0 is plain rounding, so the result is never worse.

    Returns:
        ``[columns]``, and the power.
    """
    best, best_scale, best_power = float("inf"), torch.ones_like(magnitude), 0.0
    for step in range(grid):
        scale = channel_scale(magnitude, step / grid)
        error = 0.0
        for weight, form in zip(weights, forms, strict=True):
            error += float(output_error(weight, rounded(weight * scale, form) / scale, hessian))
        if error < best:
            best, best_scale, best_power = error, scale, step / grid
    return best_scale, best_power
