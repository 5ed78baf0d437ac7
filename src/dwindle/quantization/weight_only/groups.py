"""Weights in groups: the levels, scales and zero points of runs of neighbours along a matrix's rows.

A level is stored as an unsigned number, ``0 .. 2**bits - 1``, and means ``(level - zero_point) * scale``. Zero is
always one of the levels. This is the form of ONNX Runtime's ``MatMulNBits`` and of OpenVINO's compressed constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dwindle.config.errors import ConfigError

BITS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class GroupFormat:
    """How a weight matrix is stored.

    Attributes:
        bits: Bits of a level, 2 to 8.
        group_size: Neighbours along a row that share a scale; None is the whole row. Where it does not divide the
            row, the last group is shorter.
        symmetric: The zero point is fixed in the middle (``2**(bits - 1)``). The scale then carries a sign: the
            farther end of the values gets the lowest level, so that all levels are used.

    Raises:
        ConfigError: A number is out of range.
    """

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConfigError(f"bits: {self.bits!r} is not one of {', '.join(map(str, BITS))}")
        size = self.group_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ConfigError(f"group_size: {size!r} is not a positive number (None is a whole row)")

    @property
    def highest(self) -> int:
        """The highest level."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The zero point of symmetric groups."""
        return 2 ** (self.bits - 1)

    def width(self, columns: int) -> int:
        """Return the length of a group in rows of ``columns`` entries."""
        return columns if self.group_size is None else min(self.group_size, columns)

    def count(self, columns: int) -> int:
        """Return how many groups a row of ``columns`` entries has."""
        return -(-columns // self.width(columns))

    def to_json(self) -> dict[str, Any]:
        """Return plain data for a manifest."""
        return {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}


def split(matrix: Tensor, form: GroupFormat) -> Tensor:
    """Return the groups of a matrix, the last one of a row filled up with zeros.

    Args:
        matrix: ``[rows, columns]``.
        form: The groups.

    Returns:
        ``[rows, count, width]``.
    """
    rows, columns = matrix.shape
    width, count = form.width(columns), form.count(columns)
    return functional.pad(matrix, (0, width * count - columns)).reshape(rows, count, width)


def merge(groups: Tensor, columns: int) -> Tensor:
    """Undo :func:`split`: ``[rows, count, width]`` becomes ``[rows, columns]``."""
    return groups.flatten(1)[:, :columns]


def group_parameters(
    groups: Tensor, form: GroupFormat, shrink: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the scale and the zero point that cover the values of each group.

    Args:
        groups: ``[..., width]``, floating.
        form: The levels.
        shrink: Share of the range that is covered; what lies beyond is clipped.

    Returns:
        ``scale`` and ``zero_point``, both ``[...]`` in the dtype of ``groups``; scales are numbers of float32. A group
        of zeros has scale 1.
    """
    low, high = groups.amin(-1).clamp(max=0.0) * shrink, groups.amax(-1).clamp(min=0.0) * shrink
    if form.symmetric:
        scale = torch.where(high > -low, -high, -low) / form.middle
        zero_point = torch.full_like(scale, form.middle)
    else:
        scale = (high - low) / form.highest
        zero_point = torch.zeros_like(scale)
    scale = torch.where(scale.abs() < torch.finfo(torch.float32).tiny, 1.0, scale).float().to(groups)
    if not form.symmetric:
        zero_point = (-low / scale).round().clamp(0, form.highest)
    return scale, zero_point


def to_levels(groups: Tensor, scale: Tensor, zero_point: Tensor, form: GroupFormat) -> Tensor:
    """Return the nearest level of each value (ties to even), in the dtype of ``groups``.

    Args:
        groups: ``[..., width]``.
        scale: ``[...]``.
        zero_point: ``[...]``.
        form: The levels.
    """
    levels = (groups / scale.unsqueeze(-1)).round_().add_(zero_point.unsqueeze(-1))
    return levels.clamp_(0, form.highest)


def from_levels(levels: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return ``(level - zero_point) * scale``; shapes as in :func:`to_levels`."""
    return (levels - zero_point.unsqueeze(-1)) * scale.unsqueeze(-1)


def fitted_parameters(
    groups: Tensor,
    form: GroupFormat,
    importance: Tensor | None = None,
    *,
    steps: int = 20,
    least: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point of each group whose squared rounding error is least.

    Args:
        groups: ``[rows, count, width]``.
        form: The levels.
        importance: Weight of each column's error, such as the mean square of its input, ``[count, width]``; None
            counts all alike.
        steps: How many ranges are tried, from the whole one down to the share ``least`` of it.
        least: See there.
    """
    best_scale, best_zero = group_parameters(groups, form)
    best = _squared_error(groups, best_scale, best_zero, form, importance)
    for step in range(1, steps):
        scale, zero = group_parameters(groups, form, 1.0 - (1.0 - least) * step / (steps - 1))
        error = _squared_error(groups, scale, zero, form, importance)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _squared_error(
    groups: Tensor, scale: Tensor, zero_point: Tensor, form: GroupFormat, importance: Tensor | None
) -> Tensor:
    errors = (from_levels(to_levels(groups, scale, zero_point, form), scale, zero_point) - groups).square_()
    return errors.sum(-1) if importance is None else (errors * importance).sum(-1)
