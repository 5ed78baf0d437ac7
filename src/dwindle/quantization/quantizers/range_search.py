"""The range whose rounding has the least squared error, as LSQ+ starts activations with (arXiv 2004.09576, 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from dwindle.quantization.numbers import NumberFormat, scale_and_zero_point
from dwindle.quantization.quantizers.rounding import round_to_levels

_MOST = 1 << 15
_STEPS = 20


def least_error_range(rows: Tensor, form: NumberFormat) -> tuple[Tensor, Tensor]:
    """Search both edges, one after the other (together for symmetric levels), among fractions of the whole range.

    Args:
        rows: Shape ``(channels, values)``, float32; each channel is searched by itself, on at most 32768 values
            taken evenly.
        form: The levels.

    Returns:
        Low and high edges, shape ``(channels,)``. Their squared error is at most that of the whole range.
    """
    rows = rows[:, :: max(1, rows.shape[1] // _MOST)]
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    parts = torch.linspace(1, 1 / _STEPS, _STEPS, device=rows.device)
    if form.symmetric:
        return _best(rows, form, [(part * low, part * high) for part in parts])
    whole_low, whole_high = low, high
    for _ in range(2):
        high = _best(rows, form, [(low, part * whole_high) for part in parts])[1]
        low = _best(rows, form, [(part * whole_low, high) for part in parts])[0]
    return low, high


def squared_error(rows: Tensor, low: Tensor, high: Tensor, form: NumberFormat) -> Tensor:
    """Return the mean squared error of rounding, one value per row.

    Args:
        rows: Shape ``(channels, values)``.
        low: Shape ``(channels,)``.
        high: Shape ``(channels,)``.
        form: The levels.
    """
    scale, zero_point = scale_and_zero_point(low, high, form)
    return (round_to_levels(rows, scale, zero_point, form, axis=0) - rows).square().mean(1)


def _best(rows: Tensor, form: NumberFormat, ranges: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    errors = torch.stack([squared_error(rows, low, high, form) for low, high in ranges])
    choice = errors.argmin(0)
    columns = torch.arange(rows.shape[0], device=rows.device)
    lows, highs = (torch.stack(edges) for edges in zip(*ranges, strict=True))
    return lows[choice, columns], highs[choice, columns]
