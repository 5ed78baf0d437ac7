"""How much each part of a weight matters: pure functions of one tensor.

Every function takes a weight and a dimension and gives one score for each index of that dimension, larger is
more important; with ``dim=None`` it gives one score for each element. Scores of ``l1`` and ``l2`` are sums
(of absolute values and of squares), so that they add up over parameters which go together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dwindle.config.errors import ConfigError

#: Scores of the indices of one dimension of a weight (or of its elements, with None).
Importance = Callable[[Tensor, "int | None"], Tensor]

#: Rows of the distance matrix that are held at once.
_ROWS_AT_ONCE = 1024


def rows(weight: Tensor, dim: int) -> Tensor:
    """Return the weight as a matrix with one row for each index of ``dim``."""
    if weight.dim() == 0:
        return weight.reshape(1, 1)
    return weight.movedim(dim, 0).reshape(weight.shape[dim], -1)


def l1(weight: Tensor, dim: int | None) -> Tensor:
    """Sum of absolute values (Li et al., "Pruning Filters for Efficient ConvNets", arXiv:1608.08710).

    Args:
        weight: A floating point tensor of any shape.
        dim: Dimension whose indices are scored; None scores each element.

    Returns:
        ``[weight.shape[dim]]``, or the weight's own shape.
    """
    magnitude = weight.detach().abs()
    return magnitude if dim is None else rows(magnitude, dim).sum(1)


def l2(weight: Tensor, dim: int | None) -> Tensor:
    """Sum of squares: the square of the L2 norm, which adds up over coupled parameters.

    Args:
        weight: A floating point tensor of any shape.
        dim: Dimension whose indices are scored; None scores each element.

    Returns:
        ``[weight.shape[dim]]``, or the weight's own shape.
    """
    squared = weight.detach().square()
    return squared if dim is None else rows(squared, dim).sum(1)


def row_distances(matrix: Tensor) -> Tensor:
    """Return for each row the sum of its Euclidean distances to all rows.

    The distances come from a Gram matrix in float64 (the cancellation that makes this unsafe in float32 is
    then far below the differences that matter), a block of rows at a time so that memory stays bounded.

    Args:
        matrix: ``[n, width]``, floating point.

    Returns:
        ``[n]``, float64.
    """
    wide = matrix.detach().to(torch.float64)
    wide = wide - wide.mean(0, keepdim=True)
    squares = wide.square().sum(1)
    sums = []
    for start in range(0, wide.shape[0], _ROWS_AT_ONCE):
        block = wide[start : start + _ROWS_AT_ONCE]
        squared = squares[start : start + _ROWS_AT_ONCE, None] + squares[None] - 2 * block @ wide.T
        own = torch.arange(block.shape[0], device=wide.device)
        squared[own, own + start] = 0  # the distance of a row to itself is exactly zero
        sums.append(squared.clamp_(min=0).sqrt_().sum(1))
    return torch.cat(sums) if sums else squares


def fpgm(weight: Tensor, dim: int | None) -> Tensor:
    """Sum of the distances to all other filters (He et al., FPGM, arXiv:1811.00250).

    A filter near the geometric median of its layer can be replaced by the others.

    Args:
        weight: A floating point tensor of any shape.
        dim: Dimension whose indices are scored.

    Returns:
        ``[weight.shape[dim]]``, in the weight's dtype.

    Raises:
        ConfigError: ``dim`` is None: single elements have no geometric median.
    """
    if dim is None:
        raise ConfigError("fpgm compares whole filters; it has no scores for single elements")
    return row_distances(rows(weight, dim)).to(weight.dtype)


def random(weight: Tensor, dim: int | None, generator: torch.Generator | None = None) -> Tensor:
    """Uniform random scores in [0, 1), the baseline that a criterion must beat.

    Args:
        weight: Gives shape and device only.
        dim: Dimension whose indices are scored; None scores each element.
        generator: A CPU generator for scores that can be repeated; None uses torch's own.

    Returns:
        ``[weight.shape[dim]]``, or the weight's own shape; float32.
    """
    shape = weight.shape if dim is None else (weight.shape[dim],)
    return torch.rand(shape, generator=generator).to(weight.device)


IMPORTANCES: dict[str, Importance] = {"l1": l1, "l2": l2, "fpgm": fpgm, "random": random}
"""Criteria of one weight by name."""
