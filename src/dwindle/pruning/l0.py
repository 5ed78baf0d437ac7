"""L0 regularization with hard concrete gates.

Louizos, Welling and Kingma, "Learning Sparse Neural Networks through L0 Regularization"
(https://arxiv.org/abs/1712.01312); equation numbers are those of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle import simulate
from dwindle.config import Granularity, Target
from dwindle.config.errors import ConfigError
from dwindle.pruning.plan import PlannedTarget
from dwindle.pruning.sampling import SampledPruner, ranked_groups, share_penalty
from dwindle.simulate.hard_concrete import expected_gate, first_log_alpha, hard_concrete, open_probability
from dwindle.training.schedule import Schedule

__all__ = ["HardConcreteGate", "L0Pruner", "expected_gate", "hard_concrete", "open_probability"]

#: The gate of a block that stays although its gate of evaluation is closed.
_AJAR = 0.05


class HardConcreteGate(simulate.Gate):
    """A gate that is drawn in training and fixed in evaluation.

    Attributes:
        factor: ``log alpha`` of each block, trained; once no gate is drawn any more, the gates themselves.
        noise: Logistic noise of the present step.
        sampling: Whether gates are drawn in training.
    """

    noise: Tensor

    def __init__(self, log_alpha: Tensor, granularity: Granularity, noise: Tensor) -> None:
        super().__init__(log_alpha, granularity)
        self.register_buffer("noise", noise, persistent=False)
        self.sampling = True

    def factors(self) -> Tensor:
        """Return the gate of each block as it acts now."""
        if not self.sampling:
            return self.factor
        return hard_concrete(self.factor, self.noise) if self.training else expected_gate(self.factor)


class L0Pruner(SampledPruner):
    """Blocks whose gates are least likely to be open go.

    Every weight (or block) is multiplied by a gate that is drawn from a hard concrete distribution at every step, so
    that the expected number of open gates can be differentiated. ``run.loss()`` adds

    - with ``regular_scale`` the paper's penalty, ``regular_scale`` times the expected number of weights that stay;
    - without it ``((expected share - (1 - level)) / width)**2``, where ``level`` rises to the ratio of the
      config_list (one penalty for each ``global_group_id`` and for each target without one; the mean counts).

    After ``training_steps`` exactly the ratio with the smallest ``log alpha`` goes and no gate is drawn any more; the
    gates of the others (those of evaluation; at least 0.05, since what stays is no zero) go on being trained as plain
    factors. Leaving the run folds them into the weights.

    Every process draws the same gates.

    Args:
        model: As in :class:`~dwindle.pruning.Pruner`.
        config_list: As in :class:`~dwindle.pruning.Pruner`; with ratios, not with thresholds.
        example_inputs: As in :class:`~dwindle.pruning.Pruner`.
        example_kwargs: As in :class:`~dwindle.pruning.Pruner`.
        training_steps: Optimizer steps until the masks stand.
        regular_scale: The paper's lambda; None steers towards the ratio.
        schedule: Share of the ratio by optimizer step, 0 to 1; None rises as ``1 - (1 - t)**3`` over the first 60 %
            of ``training_steps``.
        width: Distance from the level at which the penalty is 1.
        first_closed: Probability that a gate is zero at the beginning (the paper's drop rate).
        learning_rate: Of ``log alpha``; None is 30 over ``training_steps``, at most 0.1, which suits Adam.
        seed: Of the gates that are drawn; the same in all processes of a run.

    Raises:
        ConfigError: An argument is not valid.
    """

    default_granularity = None
    stage = "gate"

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        example_inputs: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        training_steps: int,
        regular_scale: float | None = None,
        schedule: Schedule | None = None,
        width: float = 0.05,
        first_closed: float = 0.02,
        learning_rate: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model,
            config_list,
            example_inputs,
            example_kwargs,
            training_steps=training_steps,
            schedule=schedule,
            width=width,
            learning_rate=learning_rate,
            seed=seed,
        )
        if regular_scale is not None and not regular_scale >= 0:
            raise ConfigError(f"regular_scale: {regular_scale!r} is not a number from 0 on")
        if not 0 < first_closed < 1:
            raise ConfigError(f"first_closed: {first_closed!r} is not a probability between 0 and 1")
        self.regular_scale, self.first_closed = regular_scale, first_closed

    def make_simulator(self, planned: PlannedTarget, weight: Tensor) -> nn.Module:
        """Return a gate that is zero with probability ``first_closed``."""
        noise = self.noise_of(planned, weight.device)
        opened = torch.full_like(noise, first_log_alpha(self.first_closed))
        return HardConcreteGate(opened, planned.granularity, noise)

    def gates(self) -> dict[Target, HardConcreteGate]:
        """Return the gates of each target."""
        return {
            target: simulator
            for target, simulator in self.simulators.items()
            if isinstance(simulator, HardConcreteGate)
        }

    def metric(self, target: Target, weight: Tensor, granularity: Granularity) -> Tensor:
        """Return ``log alpha`` of each block."""
        return self.gates()[target].factor.detach()

    def penalty(self) -> Tensor | float:
        """The expected number of weights that stay, or its distance from the level."""
        goals = self.plan.goals
        expected = {
            target: open_probability(gate.factor).sum() * goals[target].block_size
            for target, gate in self.gates().items()
        }
        if self.regular_scale is not None:
            return self.regular_scale * torch.stack(list(expected.values())).sum()
        level = self.schedule(self.steps)
        penalties = []
        for group in ranked_groups(goals):
            total = sum(math.prod(goals[target].shape) for target in group)
            share = torch.stack([expected[target] for target in group]).sum() / total
            penalties.append(share_penalty(share, (goals[group[0]].setting.goal or 0.0) * level, self.width))
        return torch.stack(penalties).mean()

    def finish(self) -> None:
        """Make the masks final: exactly the ratio goes, and gates become plain factors.

        Raises:
            ConfigError: ``compress()`` was not called.
            DwindleError: A ``log alpha`` is not a number; everything stays as it was.
        """
        was_finished = self.finished
        super().finish()
        if not was_finished:
            with torch.no_grad():
                for gate in self.gates().values():
                    opened = expected_gate(gate.factor)
                    gate.factor.copy_(torch.where(opened == 0, _AJAR, opened))
