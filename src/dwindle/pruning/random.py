"""The baseline: blocks chosen by chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config import Granularity, Target
from dwindle.config.errors import ConfigError
from dwindle.pruning.base import Pruner


class RandomPruner(Pruner):
    """Random blocks (output channels by default) go.

    Args:
        model: As in :class:`Pruner`.
        config_list: As in :class:`Pruner`.
        example_inputs: As in :class:`Pruner`.
        example_kwargs: As in :class:`Pruner`.
        seed: The same seed gives the same masks, in every process of a distributed run too.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        example_inputs: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ConfigError(f"seed: {seed!r} is not a whole number")
        super().__init__(model, config_list, example_inputs, example_kwargs)
        self.seed = seed

    def collect(self) -> dict[Target, Tensor]:
        """Start the random numbers anew, so that a renewed mask is the same one."""
        self._generator = torch.Generator().manual_seed(self.seed)
        return super().collect()

    def metric(self, target: Target, weight: Tensor, granularity: Granularity) -> Tensor:
        """Return a random number for each block."""
        shape = granularity.block_shape(weight.shape)
        return torch.rand(shape, generator=self._generator).to(weight.device)
