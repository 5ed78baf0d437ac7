"""HQQ: scales and zero points without data, by half-quadratic splitting. Pure functions.

The error ``|W - W'|^p`` with p < 1 forgives outliers. An extra variable ``E`` takes them on (the shrinkage below), and
the zero point that is best for the rest is a mean (Badri and Shaji, "Half-Quadratic Quantization", 2023, equations 4
to 7). Zero points are whole numbers here, so that zero stays exact; a scale step of the same kind, least squares on
what the shrinkage leaves, makes up for that and serves symmetric groups too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dwindle.quantization.weight_only.groups import GroupFormat, from_levels, group_parameters, to_levels


def shrinkage(error: Tensor, beta: float, power: float) -> Tensor:
    """Return the proximal step of ``|e|^p / beta``: ``sign(e) * max(|e| - |e|^(p-1) / beta, 0)``.

    Args:
        error: Any shape.
        beta: Weight of the quadratic part.
        power: p, below 1.
    """
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-30).pow(power - 1) / beta).clamp(min=0.0)


def zero_step(groups: Tensor, outliers: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    """Return the zero points of least squares, not rounded: the mean of ``level - (w - e) / scale``.

    Args:
        groups: ``[..., width]``.
        outliers: E, the same shape.
        levels: The same shape.
        scale: ``[...]``.
    """
    return (levels - (groups - outliers) / scale.unsqueeze(-1)).mean(-1)


def scale_step(groups: Tensor, outliers: Tensor, levels: Tensor, zero_point: Tensor, scale: Tensor) -> Tensor:
    """Return the scales of least squares for given levels; the old one where all levels are zero.

    Args:
        groups: ``[..., width]``.
        outliers: E, the same shape.
        levels: The same shape.
        zero_point: ``[...]``.
        scale: The old scales.
    """
    steps = levels - zero_point.unsqueeze(-1)
    found = ((groups - outliers) * steps).sum(-1) / steps.square().sum(-1)
    usable = found.isfinite() & (found.abs() > torch.finfo(torch.float32).tiny)
    return torch.where(usable, found, scale).float().to(groups)


def hqq(
    groups: Tensor,
    form: GroupFormat,
    *,
    power: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
    steps: int = 20,
) -> tuple[Tensor, Tensor]:
    """Return the scale and the zero point of each group.

    Each group keeps the best that it met, so none is worse than with plain rounding.

    Args:
        groups: ``[..., width]``, floating.
        form: The levels.
        power: p of the error; 0.7 is the authors'.
        beta: First weight of the quadratic part, relative to groups scaled to a largest value of 1.
        growth: The weight is multiplied by this after each step.
        steps: How many.

    Returns:
        Both ``[...]``, zero points whole.
    """
    largest = groups.abs().amax(-1, keepdim=True)
    unit = torch.where(largest > 0, largest, 1.0)
    scale, zero = group_parameters(groups, form)
    best_scale, best_zero = scale, zero
    best = _error(groups, scale, zero, form, power)
    for _ in range(steps):
        levels = to_levels(groups, scale, zero, form)
        error = groups - from_levels(levels, scale, zero)
        outliers = shrinkage(error / unit, beta, power) * unit
        if not form.symmetric:
            zero = zero_step(groups, outliers, levels, scale).round().clamp(0, form.highest)
            levels = to_levels(groups, scale, zero, form)
        scale = scale_step(groups, outliers, levels, zero, scale)
        found = _error(groups, scale, zero, form, power)
        better = found < best
        best = torch.where(better, found, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        beta *= growth
    return best_scale, best_zero


def _error(groups: Tensor, scale: Tensor, zero: Tensor, form: GroupFormat, power: float) -> Tensor:
    error = groups - from_levels(to_levels(groups, scale, zero, form), scale, zero)
    return error.abs().pow(power).sum(-1)
