"""Network slimming: an L1 penalty on the scales of channels, then the channels with the smallest scales go.

Liu et al., "Learning Efficient Convolutional Networks through Network Slimming" (https://arxiv.org/abs/1708.06519).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle import simulate
from dwindle.config import Granularity, Target
from dwindle.config.errors import ConfigError
from dwindle.pruning.plan import PlannedTarget
from dwindle.pruning.trained import TrainingPruner

__all__ = ["SlimPruner", "l1_penalty"]


def l1_penalty(scales: Sequence[Tensor]) -> Tensor:
    """Return the sum of the absolute values of all tensors, 0-d; its gradient is the sign (0 at 0).

    Args:
        scales: At least one tensor.
    """
    return torch.stack([scale.abs().sum() for scale in scales]).sum()


class SlimPruner(TrainingPruner):
    """Channels whose scale an L1 penalty has pushed towards zero go.

    Two forms, by target, and both in one config_list if wished:

    - The scale of a norm (``{"op_types": ["BatchNorm2d"], ...}``: its weight has one dimension) is penalized itself,
      as in the paper. With ``example_inputs`` the layers around the norm are masked with it.
    - Any other parameter gets a *gate*, one trained factor for each of its blocks (output channels by default) that
      begins at 1. The gates are the pruner's own parameters: ``run.add_parameters_to(optimizer)``. Leaving the run
      folds them into the weights, so nothing that was learned is lost. A layer with a norm behind it takes no notice
      of its gates (the norm divides them away); give the norm as target there.

    ``regular_scale * sum(|scale|)`` is added to the loss until ``training_steps``; then the masks come, and what
    follows in the same run is fine-tuning without the penalty. The paper ranks all scales together: give the targets
    one ``global_group_id``.

    Args:
        model: As in :class:`~dwindle.pruning.Pruner`.
        config_list: As in :class:`~dwindle.pruning.Pruner`.
        example_inputs: As in :class:`~dwindle.pruning.Pruner`.
        example_kwargs: As in :class:`~dwindle.pruning.Pruner`.
        training_steps: Optimizer steps with the penalty, before the masks come.
        regular_scale: Weight of the penalty (the paper's lambda).
        learning_rate: Of the gates; None takes that of the user's optimizer.

    Raises:
        ConfigError: An argument is not valid.
    """

    stage = "gate"

    def sharding_problem(self) -> str | None:
        """Return why it cannot work on a model that ``fully_shard`` has cut up; None where it can."""
        scales = [str(target) for target, planned in self.plan.goals.items() if _is_scale(planned)]
        return f"the penalty on {scales[0]} would be one of a part; only gates go" if scales else None

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        example_inputs: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        training_steps: int,
        regular_scale: float = 1e-4,
        learning_rate: float | None = None,
    ) -> None:
        super().__init__(
            model,
            config_list,
            example_inputs,
            example_kwargs,
            training_steps=training_steps,
            learning_rate=learning_rate,
        )
        if not regular_scale >= 0:
            raise ConfigError(f"regular_scale: {regular_scale!r} is not a number from 0 on")
        self.regular_scale = regular_scale

    def make_simulator(self, planned: PlannedTarget, weight: Tensor) -> nn.Module | None:
        """Return a gate of ones; None for the scale of a norm, which is its own gate."""
        if _is_scale(planned):
            return None
        shape = planned.granularity.block_shape(weight.shape)
        return simulate.Gate(torch.ones(shape, device=weight.device), planned.granularity)

    def scales(self) -> Iterator[tuple[Target, Tensor]]:
        """Yield the scale of each block of each target: gates, and weights of norms."""
        modules = dict(self.model.named_modules())
        for target in self.plan.goals:
            gate = self.simulators.get(target)
            own = modules[target.module]._parameters[target.name] if gate is None else gate.factor
            if isinstance(own, Tensor):
                yield target, own

    def metric(self, target: Target, weight: Tensor, granularity: Granularity) -> Tensor:
        """Return the absolute value of each scale."""
        gate = self.simulators.get(target)
        if not isinstance(gate, simulate.Gate):
            return granularity.reduce(weight.abs(), "sum")
        return gate.factor.detach().abs()

    def penalty(self) -> Tensor | float:
        """``regular_scale`` times the sum of the absolute values of all scales."""
        return self.regular_scale * l1_penalty([scale for _, scale in self.scales()])


def _is_scale(planned: PlannedTarget) -> bool:
    return len(planned.shape) == 1 and planned.target.name == "weight"
