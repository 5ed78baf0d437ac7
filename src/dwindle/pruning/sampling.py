"""Masks that are drawn anew for every optimizer step, the same ones in all processes.

The noise is a function of a seed, the number of the step and the name of the target: nothing is exchanged, a run
that is resumed draws what the uninterrupted one would have drawn, and within a step every forward sees one mask
(shared layers, gradient checkpointing, accumulated batches).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from dwindle.config import Granularity, Target
from dwindle.config.errors import ConfigError
from dwindle.pruning.plan import PlannedTarget
from dwindle.pruning.trained import TrainingPruner, whole_number
from dwindle.simulate.hard_concrete import logistic_noise
from dwindle.training.schedule import CubicSchedule, Schedule

__all__ = ["SampledPruner", "logistic_noise", "ranked_groups", "share_penalty"]

#: How far a logit may travel under Adam in a whole run, and the largest learning rate for it.
_TRAVEL, _LARGEST_RATE = 30.0, 0.1

#: Share of the steps over which the ratio rises by default.
_RISING = 0.6


def share_penalty(share: Tensor, ratio: float, width: float) -> Tensor:
    """Return ``((share - (1 - ratio)) / width)**2``, 0 when exactly ``ratio`` of the weights go.

    Args:
        share: Share that stays, 0-d.
        ratio: Share that should go.
        width: Distance at which the penalty is 1.
    """
    return ((share - (1 - ratio)) / width).square()


def ranked_groups(goals: Mapping[Target, PlannedTarget]) -> list[list[Target]]:
    """Return which targets share one ratio: those of a ``global_group_id`` together, all others alone."""
    groups: dict[object, list[Target]] = {}
    for target, planned in goals.items():
        group = planned.setting.global_group_id
        groups.setdefault(target if group is None else ("group", group), []).append(target)
    return list(groups.values())


class _Drawn(Protocol):
    """A simulator whose mask is drawn."""

    noise: Tensor
    sampling: bool


class SampledPruner(TrainingPruner):
    """Base of pruners whose simulators have a ``noise`` buffer, renewed at every step, and a ``sampling`` flag.

    Args:
        model: As in :class:`~dwindle.pruning.Pruner`.
        config_list: As in :class:`~dwindle.pruning.Pruner`.
        example_inputs: As in :class:`~dwindle.pruning.Pruner`.
        example_kwargs: As in :class:`~dwindle.pruning.Pruner`.
        training_steps: Optimizer steps until the masks stand.
        schedule: Share of the ratio by optimizer step, 0 to 1; None rises as ``1 - (1 - t)**3`` over the first 60 %
            of ``training_steps``.
        width: Distance of the share that stays from the level at which the penalty is 1.
        learning_rate: Of the scores; None is 30 over ``training_steps``, at most 0.1: with Adam a logit can cross its
            range a few times.
        seed: Of the noise; the same in all processes of a run.

    Raises:
        ConfigError: An argument is not valid.
    """

    works_sharded = True

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        example_inputs: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        training_steps: int,
        schedule: Schedule | None = None,
        width: float = 0.05,
        learning_rate: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model,
            config_list,
            example_inputs,
            example_kwargs,
            training_steps=training_steps,
            learning_rate=learning_rate,
        )
        if learning_rate is None:
            self.learning_rate = self.default_rate(training_steps)
        self.seed = whole_number("seed", seed)
        if not width > 0:
            raise ConfigError(f"width: {width!r} is not a positive number")
        self.width = width
        self.schedule = schedule or CubicSchedule(0.0, 1.0, steps=max(1, int(training_steps * _RISING)))

    def check(self, target: Target, granularity: Granularity) -> None:
        """Refuse thresholds and N:M patterns: the penalty needs a share.

        Raises:
            ConfigError: Saying why.
        """
        planned = self.plan.goals[target]
        if granularity.kind == "pattern" or planned.setting.sparse_threshold is not None:
            raise ConfigError(
                f"{target}: {type(self).__name__} learns which share of the blocks stays; give sparse_ratio, without a "
                "threshold and without an N:M granularity"
            )

    @staticmethod
    def default_rate(training_steps: int) -> float:
        """Return the learning rate at which Adam lets a logit cross its range a few times in so many steps."""
        return min(_LARGEST_RATE, _TRAVEL / training_steps)

    def noise_of(self, planned: PlannedTarget, device: torch.device) -> Tensor:
        """Return the noise of a target at the present step, one number for each block."""
        shape = planned.granularity.block_shape(planned.shape)
        return logistic_noise(shape, self.seed, self.steps, str(planned.target), device)

    def parameter_options(self) -> dict[str, Any]:
        """Options of the logits' group in an optimizer: they want Adam, whatever trains the weights."""
        return {**super().parameter_options(), "adaptive": True}

    def draw(self) -> None:
        """Renew the noise of every simulator."""
        for target, simulator in self.simulators.items():
            own = cast(_Drawn, simulator)
            own.noise = self.noise_of(self.plan.goals[target], own.noise.device)

    def advance(self) -> None:
        """Draw the masks of the next step."""
        self.draw()

    def freeze(self) -> None:
        """Draw no more."""
        super().freeze()
        for simulator in self.simulators.values():
            cast(_Drawn, simulator).sampling = False

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, and draw the masks of that step."""
        super().load_state_dict(state)
        self.draw()
