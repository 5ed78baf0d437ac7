"""Pruners that take small weights for unimportant ones."""

from __future__ import annotations

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
