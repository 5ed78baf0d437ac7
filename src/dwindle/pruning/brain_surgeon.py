"""Optimal Brain Surgeon on one matrix: which weights go, and how the others make up for them. Pure functions.

The layer's error is ``||(W - V) X||²`` with ``H = X X'``. When the weight at column i of a row goes, the later columns
change so that the error grows least; earlier columns are settled (Frantar and Alistarh, arXiv:2301.00774). With the
upper Cholesky factor U of the inverse of H, ``U[i, i]²`` is entry (0, 0) of the inverse of ``H[i:, i:]``, and
``U[i, i:] / U[i, i]`` is that inverse's first row over its first entry: one factorization serves all rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dwindle.pruning.sparsity import pattern_keep, smallest
from dwindle.training.linear_layers import inverse_factor


@dataclass(frozen=True)
class Choice:
    """What goes from a matrix.

    Attributes:
        width: Columns of a block (of a window, for a pattern); neighbours in the matrix.
        rows: The number of the block row of each row, from 0; None when every row is one.
        removed: How many blocks go in all, beside those that may be nothing but zero anyway.
        pattern: For an N:M pattern, N: so many of every ``width`` columns stay in each row.
    """

    width: int = 1
    rows: Tensor | None = None
    removed: int = 0
    pattern: int | None = None


def block_errors(weight: Tensor, factor: Tensor, width: int) -> Tensor:
    """Return how much the error grows when each group of columns of each row goes, later columns making up for it.

    It is ``w' inv(G) w`` with G the block of the inverse Hessian of the columns that are not settled: exact for a
    block at the front, and for the others as if those before it stayed. With width 1 it is ``w² / U[i, i]²``.

    Args:
        weight: ``[rows, columns]``.
        factor: The factor's square of the same columns.
        width: Columns of a block.

    Returns:
        ``[rows, columns / width]``.
    """
    if width == 1:
        return (weight / factor.diagonal()).square()
    count = weight.shape[1] // width
    squares = torch.stack(
        [factor[i : i + width, i : i + width] for i in range(0, weight.shape[1], width)]
    )  # [count, width, width]
    parts = weight.reshape(-1, count, width).permute(1, 2, 0)
    solved = torch.linalg.solve_triangular(squares.transpose(1, 2), parts, upper=False)
    return solved.square().sum(1).t()


def reconstruct(
    weight: Tensor,
    hessian: Tensor,
    choice: Choice,
    *,
    damping: float = 0.01,
    stripe: int = 128,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose what goes and change what stays, column by column.

    Args:
        weight: ``[rows, columns]``, floating point.
        hessian: ``X X'`` of the same dtype.
        choice: What goes. The same share of what may go goes from every stripe.
        damping: See :func:`inverse_factor`.
        stripe: Columns among which is chosen at once, with the weights as they are when their turn comes.
        allowed: Entries that may be other than zero; None is all.

    Returns:
        The new matrix, zero where something went, and what stays as booleans.

    Raises:
        DwindleError: The matrix of the inputs cannot be inverted.
    """
    factor = inverse_factor(hessian, damping)
    rest = weight.clone()
    kept = torch.ones_like(weight, dtype=torch.bool)
    free = torch.ones_like(kept) if allowed is None else allowed
    count = weight.shape[1]
    step = choice.width * max(1, stripe // choice.width)
    for begin in range(0, count, step):
        stripe_columns = slice(begin, min(begin + step, count))
        own = factor[stripe_columns, stripe_columns]
        if choice.pattern is None:
            kept[:, stripe_columns] = _chosen(rest[:, stripe_columns], own, choice, free, begin)
            removed = (~(kept & free))[:, stripe_columns].t().contiguous()
            new, errors = _settle(rest[:, stripe_columns].t().contiguous(), own, removed)
        else:
            new, errors, stays = _settle_windows(
                rest[:, stripe_columns].t().contiguous(), own, choice, free[:, stripe_columns].t()
            )
            kept[:, stripe_columns] = stays.t()
        rest[:, stripe_columns] = new.t()
        later = slice(stripe_columns.stop, count)
        rest[:, later] -= errors.t() @ factor[stripe_columns, later]
    return rest, kept


def _settle(part: Tensor, factor: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
    """Set what goes to zero, column after column, while the later columns make up for it.

    Args:
        part: ``[columns, rows]`` (transposed: what is worked on lies together in memory); changed in place.
        factor: The factor's square of these columns.
        removed: What goes, ``[columns, rows]``.

    Returns:
        The new columns, and the errors that columns behind these must make up for.
    """
    errors = torch.zeros_like(part)
    for i in range(len(part)):
        errors[i] = torch.where(removed[i], part[i], 0) / factor[i, i]
        part[i].masked_fill_(removed[i], 0)
        part[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return part, errors


def _settle_windows(
    part: Tensor, factor: Tensor, choice: Choice, free: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_settle`, but what goes is chosen for each window of an N:M pattern when its turn comes.

    Returns:
        The new columns, the errors, and what stays, each ``[columns, rows]``.
    """
    errors, stays = torch.zeros_like(part), torch.ones_like(part, dtype=torch.bool)
    diagonal = factor.diagonal()[:, None]
    for first in range(0, len(part), choice.width):
        window, later = slice(first, first + choice.width), slice(first + choice.width, None)
        scores = (part[window] / diagonal[window]).square().masked_fill(~free[window], -1.0)
        stays[window] = pattern_keep(scores, 0, choice.pattern or 0, choice.width)
        removed = ~(stays[window] & free[window])
        part[window], errors[window] = _settle(part[window].clone(), factor[window, window], removed)
        part[later] -= factor[window, later].t() @ errors[window]
    return part, errors, stays


def _chosen(part: Tensor, factor: Tensor, choice: Choice, free: Tensor, begin: int) -> Tensor:
    """Return what stays of a stripe: of all blocks so many go as its share is, the rounding carried on."""
    scores = block_errors(part, factor, choice.width)
    if choice.rows is not None:
        total = scores.new_zeros(int(choice.rows.max()) + 1, scores.shape[1])
        scores = total.index_add_(0, choice.rows, scores)
    possible = free_blocks(free, choice)
    first, last = begin // choice.width, (begin + part.shape[1]) // choice.width
    scores[~possible[:, first:last]] = float("inf")
    upto = [
        choice.removed * int(possible[:, :place].sum()) // max(int(possible.sum()), 1)
        for place in (first, last)
    ]
    stays = ~smallest(scores, upto[1] - upto[0])
    if choice.rows is not None:
        stays = stays[choice.rows]
    return stays.repeat_interleave(choice.width, 1)


def free_blocks(free: Tensor, choice: Choice) -> Tensor:
    """Return which blocks hold an entry that may be other than zero, ``[block rows, columns / width]``.

    Args:
        free: Which entries may, ``[rows, columns]``.
        choice: What the blocks are.
    """
    blocks = free.reshape(len(free), -1, choice.width).any(-1)
    if choice.rows is None:
        return blocks
    counts = torch.zeros(int(choice.rows.max()) + 1, blocks.shape[1], device=free.device)
    return counts.index_add_(0, choice.rows, blocks.float()) > 0


def reconstruction_error(old: Tensor, new: Tensor, hessian: Tensor) -> float:
    """Return ``||(W - V) X||² / ||W X||²``: the share of the layer's output that is lost."""
    lost = ((old - new) @ hessian * (old - new)).sum()
    return float(lost / (old @ hessian * old).sum().clamp(min=torch.finfo(old.dtype).tiny))
