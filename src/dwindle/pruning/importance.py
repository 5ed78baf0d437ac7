"""Importance criteria as plain tensor functions: scores of the indices of one dimension of one weight."""

from __future__ import annotations

from collections.abc import Callable

import torch

#: ``f(weight, dim) -> scores``, one float a index of ``dim``, larger is more important.
Importance = Callable[[torch.Tensor, int], torch.Tensor]


def _slices(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Return (size of ``dim``, everything else)."""
    return weight.detach().movedim(dim, 0).flatten(1)


def l1(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum of absolute values of each slice (Li et al., 1608.08710)."""
    return _slices(weight, dim).abs().sum(1)


def l2(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Euclidean norm of each slice."""
    return torch.linalg.vector_norm(_slices(weight, dim), dim=1)


def fpgm(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum of Euclidean distances of each slice to all others (He et al., 1811.00250).

    Slices near the geometric median can be expressed by the others and score low. Distances come from one matrix
    product in float64, without a loop.
    """
    slices = _slices(weight, dim).double()
    squares = (slices * slices).sum(1)
    gaps = squares[:, None] + squares[None, :] - 2 * slices @ slices.T
    gaps.fill_diagonal_(0)
    return gaps.clamp_min_(0).sqrt().sum(1).to(weight.dtype)


def random(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Uniform random scores: the baseline every criterion must beat. Follows torch's seed."""
    return torch.rand(weight.shape[dim], dtype=weight.dtype)


IMPORTANCES: dict[str, Importance] = {"l1": l1, "l2": l2, "fpgm": fpgm, "random": random}
