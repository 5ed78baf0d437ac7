"""Pruners that take small weights for unimportant ones."""

from __future__ import annotations

import torch
from torch import Tensor

from dwindle.config import Granularity, Target
from dwindle.pruning.base import Pruner, block_norm


class L1NormPruner(Pruner):
    """Blocks (output channels by default) with the smallest L1 norm go (Li et al., arXiv:1608.08710)."""

    def metric(self, target: Target, weight: Tensor, granularity: Granularity) -> Tensor:
        """Return the sum of the absolute values of each block."""
        return block_norm(weight, granularity, 1)


class L2NormPruner(Pruner):
    """Blocks (output channels by default) with the smallest L2 norm go."""

    def metric(self, target: Target, weight: Tensor, granularity: Granularity) -> Tensor:
        """Return the Euclidean norm of each block."""
        return block_norm(weight, granularity, 2)


class LevelPruner(L1NormPruner):
    """Single weights with the smallest absolute value go; a granularity in the config makes it blocks.

    With ``granularity: "2:4"`` two of every four neighbours along the input channels stay.
    """

    default_granularity = None


class MagnitudePruner(LevelPruner):
    """Single weights with the smallest absolute value, in units of their layer's Euclidean norm, go (as in NNCF).

    The norm makes layers comparable: with one ``global_group_id`` for all targets, layers with large numbers do not
    decide alone. Without groups the order within each layer is that of :class:`LevelPruner`. Under a schedule
    (:class:`~dwindle.pruning.AGPPruner`) it is gradual magnitude pruning; with ``granularity: [16, 16]`` gradual
    block pruning (Narang et al., arXiv:1711.02782).
    """

    def metric(self, target: Target, weight: Tensor, granularity: Granularity) -> Tensor:
        """Return the sum of the absolute values of each block over the norm of the whole weight."""
        norm = weight.norm() if weight.dtype == torch.float64 else weight.float().norm()
        return block_norm(weight, granularity, 1) / norm.clamp(min=torch.finfo(norm.dtype).tiny)
