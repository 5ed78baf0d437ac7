"""The pruner that removes filters which the others can replace."""

from __future__ import annotations

from torch import Tensor

from dwindle.config import Granularity, Target
from dwindle.config.errors import ConfigError
from dwindle.pruning.base import Pruner
from dwindle.pruning.importance import row_distances


class FPGMPruner(Pruner):
    """Blocks nearest to the geometric median of their layer go (He et al., arXiv:1811.00250).

    The metric of a block is the sum of its Euclidean distances to all blocks of the same target.
    """

    def check(self, target: Target, granularity: Granularity) -> None:
        """Refuse single elements and whole tensors, which have no distances.

        Raises:
            ConfigError: Saying so.
        """
        if granularity.kind not in ("channel", "blocks"):
            raise ConfigError(
                f"{target}: FPGMPruner compares blocks; give a granularity such as 'out_channel'"
            )

    def metric(self, target: Target, weight: Tensor, granularity: Granularity) -> Tensor:
        """Return the sum of distances of each block."""
        blocks = granularity.blocks(weight)
        return row_distances(blocks.reshape(-1, blocks.shape[-1])).reshape(blocks.shape[:-1]).to(weight.dtype)
