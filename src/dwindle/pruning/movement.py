"""Movement pruning: what moves away from zero while the model is fine-tuned stays.

Sanh, Wolf and Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning" (https://arxiv.org/abs/2005.07683); with
blocks as in Lagunas et al., "Block Pruning For Faster Transformers" (https://arxiv.org/abs/2109.04838).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle import simulate
from dwindle.config import Granularity, Target
from dwindle.config.errors import ConfigError
from dwindle.pruning.plan import PlannedTarget
from dwindle.pruning.trained import TrainingPruner, whole_number
from dwindle.training.schedule import CubicSchedule

__all__ = ["MovementPruner", "mean_sigmoid"]


def mean_sigmoid(scores: Sequence[Tensor]) -> Tensor:
    """Return the mean over all scores' means of ``sigmoid(score)``, the paper's penalty of soft movement.

    Args:
        scores: One tensor for each target, at least one.

    Returns:
        A 0-d tensor.
    """
    return torch.stack([torch.sigmoid(score).mean() for score in scores]).mean()


class MovementPruner(TrainingPruner):
    """Blocks whose scores fell go; a score falls where the gradient pulls its weights towards zero.

    Each block has a score that begins at 0. Forward the weight is ``weight * mask``; backward the score gets the
    gradient of the mask, the sum of ``gradient * weight'`` over its block, and the user's optimizer moves it
    (``run.add_parameters_to``; plain SGD gives the paper's sums). Two modes, by what the config_list says:

    - ``sparse_ratio`` is *hard* movement: the share with the lowest scores goes.
    - ``sparse_threshold`` is *soft* movement: blocks with ``sigmoid(score)`` below it go (0.5 is where all begin,
      so useful values are below), and ``regular_scale * mean(sigmoid(score))`` is added to the loss.

    The ratio, or the threshold with the penalty, rises as ``1 - (1 - t)**3`` between ``warmup_steps`` and
    ``training_steps - cooldown_steps``; the masks follow the scores until ``training_steps``, then they stand.
    The default granularity is single weights; ``[32, 32]`` or ``"out_channel"`` make it blocks.

    Args:
        model: As in :class:`~dwindle.pruning.Pruner`.
        config_list: As in :class:`~dwindle.pruning.Pruner`.
        example_inputs: As in :class:`~dwindle.pruning.Pruner`.
        example_kwargs: As in :class:`~dwindle.pruning.Pruner`.
        training_steps: Optimizer steps until the masks stand.
        warmup_steps: Steps at the beginning in which nothing is masked and the scores already move.
        cooldown_steps: Steps at the end with the full ratio, in which the masks still move.
        interval_steps: Masks are renewed after every so many steps.
        regular_scale: Weight of the penalty of soft movement.
        learning_rate: Of the scores; None takes that of the user's optimizer.

    Raises:
        ConfigError: An argument is not valid.
    """

    default_granularity = None
    works_sharded = True

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        example_inputs: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        training_steps: int,
        warmup_steps: int = 0,
        cooldown_steps: int = 0,
        interval_steps: int = 1,
        regular_scale: float = 1.0,
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
        self.warmup_steps = whole_number("warmup_steps", warmup_steps)
        cooldown = whole_number("cooldown_steps", cooldown_steps)
        self.interval_steps = whole_number("interval_steps", interval_steps, at_least=1)
        if warmup_steps + cooldown >= training_steps:
            raise ConfigError(
                f"warmup_steps {warmup_steps} and cooldown_steps {cooldown} leave none of the {training_steps} "
                "training_steps for the ratio to rise"
            )
        self.regular_scale = regular_scale
        rising = training_steps - warmup_steps - cooldown
        self.schedule = CubicSchedule(0.0, 1.0, steps=rising, begin_step=warmup_steps)

    def make_simulator(self, planned: PlannedTarget, weight: Tensor) -> nn.Module:
        """Return a mask with a score of 0 for each block."""
        shape = planned.granularity.block_shape(weight.shape)
        return simulate.ScoredMask(torch.zeros(shape, device=weight.device), planned.granularity)

    def metric(self, target: Target, weight: Tensor, granularity: Granularity) -> Tensor:
        """Return the score of each block, or where it is held against a threshold its sigmoid."""
        score = self.scores()[target].detach()
        return score if self.plan.goals[target].setting.sparse_threshold is None else torch.sigmoid(score)

    def scores(self) -> dict[Target, Tensor]:
        """Return the scores of each target, as they are trained."""
        return {
            target: simulator.score
            for target, simulator in self.simulators.items()
            if isinstance(simulator, simulate.ScoredMask)
        }

    def penalty(self) -> Tensor | float:
        """The penalty of the targets with a threshold: ``regular_scale * share * mean(sigmoid(score))``."""
        goals = self.plan.goals
        soft = [
            score
            for target, score in self.scores().items()
            if goals[target].setting.sparse_threshold is not None
        ]
        share = self.schedule(self.steps)
        return self.regular_scale * share * mean_sigmoid(soft) if soft and share else 0.0

    def advance(self) -> None:
        """Renew the masks from the scores."""
        if self.steps % self.interval_steps == 0:
            self._mask(self.schedule(self.steps))

    def _first_masks(self) -> int:
        return self.warmup_steps
