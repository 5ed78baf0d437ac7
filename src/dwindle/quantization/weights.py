"""Scales of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.quantization.levels import as_blocks
from dwindle.quantization.numbers import SMALLEST_SCALE, NumberFormat, scale_and_zero_point
from dwindle.quantization.quantizers.rounding import round_to_levels

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
    rows = _rows(weight, axis)
    scale = rows.abs().amax(dim=1) / form.highest
    if avoid_saturation and form.highest == 127 and rows.shape[1] > 1:
        for side in (rows, -rows):
            pair = torch.topk(side, 2, dim=1).values.clamp(min=0.0).sum(dim=1)
            # Rounding may lift both weights by half a level.
            scale = torch.maximum(scale, pair / (_PAIR_LIMIT - 1))
    return scale.clamp(min=SMALLEST_SCALE)


def weight_levels(
    weight: Tensor,
    axis: int | None,
    form: NumberFormat,
    block: int | None = None,
    *,
    avoid_saturation: bool = False,
    clip: bool = False,
    least: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the scales and zero points of a weight.

    Args:
        weight: Any floating tensor.
        axis: Dimension with a scale per index; None for one scale.
        form: The levels.
        block: So many neighbours along the other dimension of a matrix share a scale.
        avoid_saturation: Keep pairs of 8-bit weights within 16-bit sums (see :func:`weight_scale`).
        clip: Clip where that loses least; not with ``avoid_saturation``, which has enlarged the scale for a reason.
        least: Smallest scales allowed, of the shape of the scales.

    Returns:
        ``scale`` float32 and ``zero_point`` int32, one-dimensional: one value, one for each index of ``axis``, or one
        for each block, channel after channel.

    Raises:
        ConfigError: The weight is not made of whole blocks, or holds values that are not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise ConfigError("it holds values that are not finite")
    if block is not None:
        assert axis is not None
        size = weight.shape[1 - axis % 2]
        if size % block:
            raise ConfigError(f"its {size} inputs are not a multiple of the group size {block}")
        weight, axis = as_blocks(weight, axis, block), 0
    narrowed = avoid_saturation and form.bits == 8
    if form.symmetric and form.signed:
        wide = weight_scale(weight, axis, form, avoid_saturation=avoid_saturation)
        if clip and not narrowed:
            wide = clipped_scale(weight, axis, form, wide)
        scale = wide if least is None else torch.maximum(wide, least)
        return scale.float().reshape(-1), torch.zeros(scale.numel(), dtype=torch.int32, device=scale.device)
    rows = _rows(weight, axis)
    low, high = rows.amin(1).clamp(max=0.0), rows.amax(1).clamp(min=0.0)
    # No two levels within a quarter of the whole range around the middle add up to more than 128.
    levels = NumberFormat(form.lowest + 64, form.highest - 64, form.symmetric) if narrowed else form
    if clip and not narrowed:
        low, high = clipped_range(rows, low, high, form)
    scale, zero_point = scale_and_zero_point(low, high, levels)
    if least is not None and bool((least > scale).any()):
        scale = torch.maximum(scale.double(), least).float()
        if not form.symmetric:
            zero_point = (levels.lowest - low / scale.double()).round().clamp(levels.lowest, levels.highest)
    return scale, zero_point.to(torch.int32)


def clipped_range(rows: Tensor, low: Tensor, high: Tensor, form: NumberFormat) -> tuple[Tensor, Tensor]:
    """Return the ranges, within the given ones, with the least squared error of rounding and clipping together.

    Args:
        rows: float64, ``[scales, values]``.
        low: Smallest value of each row, at most 0.
        high: Largest value, at least 0.
        form: The levels.
    """
    best, least = (low, high), torch.full_like(low, torch.inf)
    for factor in torch.linspace(1.0, 0.2, _SHRINKS, dtype=torch.float64).tolist():
        scale, zero_point = scale_and_zero_point(low * factor, high * factor, form)
        rounded = round_to_levels(rows, scale, zero_point, form, 0)
        error = (rounded - rows).square().sum(1)
        better = error < least
        best = torch.where(better, low * factor, best[0]), torch.where(better, high * factor, best[1])
        least = torch.minimum(error, least)
    return best


def _rows(weight: Tensor, axis: int | None) -> Tensor:
    """Return a weight in float64 with a row for each scale."""
    rows = weight.detach().double()
    return rows.reshape(1, -1) if axis is None else rows.movedim(axis, 0).reshape(weight.shape[axis], -1)


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
    rows = _rows(weight, axis)
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
