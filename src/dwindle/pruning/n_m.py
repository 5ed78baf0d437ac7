"""N:M sparsity that is trained with all gradients (SR-STE).

Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch"
(https://arxiv.org/abs/2102.04010).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle import simulate
from dwindle.config import Granularity, Target
from dwindle.config.errors import ConfigError
from dwindle.pruning.base import block_norm
from dwindle.pruning.plan import PlannedTarget
from dwindle.pruning.trained import TrainingPruner
from dwindle.training.schedule import Schedule

__all__ = ["DenseGradientMask", "SRSTEPruner", "masked_decay"]


class _DenseGradient(torch.autograd.Function):
    """A product with a mask, whose gradient goes to masked entries too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mask: Tensor) -> Tensor:
        """Return ``tensor * mask``."""
        return tensor * mask.to(tensor.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient as it came."""
        return gradients[0], None


class DenseGradientMask(simulate.MaskSimulator):
    """A mask that lets the whole gradient through to the weight (a straight-through estimator).

    Attributes:
        frozen: From then on masked entries get no gradient, as under any mask.
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask)
        self.frozen = False

    def forward(self, tensor: Tensor) -> Tensor:
        """Return the masked tensor, of the same shape and dtype."""
        if self.frozen:
            return super().forward(tensor)
        result: Tensor = _DenseGradient.apply(tensor, self.value)
        return result


def masked_decay(weight: Tensor, mask: Tensor) -> Tensor:
    """Return half the squared norm of the masked entries; its gradient is ``(1 - mask) * weight``.

    Args:
        weight: The weight, trained.
        mask: 0 and 1, any shape that broadcasts to the weight.
    """
    return ((1 - mask.to(weight.dtype)) * weight).square().sum() / 2


class SRSTEPruner(TrainingPruner):
    """Of every M neighbours the N largest act, chosen again after every step; all of them learn.

    The gradient of the masked weight goes to the whole weight (straight through), and ``decay * (1 - mask) * weight``
    is added to it, so that masked weights fade instead of competing on (sparse-refined, "SR"). The paper adds that
    term to the gradient; here ``run.loss()`` adds its integral, which gives the same gradient and goes well with
    accumulated batches and loss scaling. After ``training_steps`` the masks stand.

    The default granularity is 2:4; any N:M will do, and so will ratios of single weights, of blocks or of channels.

    Args:
        model: As in :class:`~dwindle.pruning.Pruner`.
        config_list: As in :class:`~dwindle.pruning.Pruner`.
        example_inputs: As in :class:`~dwindle.pruning.Pruner`.
        example_kwargs: As in :class:`~dwindle.pruning.Pruner`.
        training_steps: Optimizer steps until the masks stand.
        decay: The paper's lambda; 0 is the plain straight-through estimator.
        schedule: Share of the ratio by optimizer step, 0 to 1; None masks everything from the first step on, as the
            paper does. (Of the ``M - N`` that go, it takes that share, rounded down.)

    Raises:
        ConfigError: An argument is not valid.
    """

    default_granularity = "2:4"

    def sharding_problem(self) -> str | None:
        """Return why it cannot work on a model that ``fully_shard`` has cut up; None where it can."""
        return "the penalty on masked weights would be one of a part; set decay=0" if self.decay else None

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        example_inputs: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        training_steps: int,
        decay: float = 2e-4,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(model, config_list, example_inputs, example_kwargs, training_steps=training_steps)
        if not decay >= 0:
            raise ConfigError(f"decay: {decay!r} is not a number from 0 on")
        self.decay, self.schedule = decay, schedule
        self.first_progress = self._progress_at(0)

    def _progress_at(self, step: int) -> float:
        return 1.0 if self.schedule is None else float(self.schedule(step))

    def check(self, target: Target, granularity: Granularity) -> None:
        """Refuse a ratio that is not the pattern's.

        Raises:
            ConfigError: Saying what the pattern means.
        """
        goal = self.plan.goals[target].setting.goal
        if granularity.kind == "pattern" and goal is not None:
            implied = 1 - granularity.keep / granularity.window
            if abs(goal - implied) > 1e-9:
                raise ConfigError(
                    f"{target}: {granularity.keep}:{granularity.window} means sparse_ratio {implied:g}, not {goal:g}; "
                    "give the granularity that fits ('1:4', 'element', ...)"
                )

    def make_simulator(self, planned: PlannedTarget, weight: Tensor) -> nn.Module:
        """Return a mask that lets the whole gradient through."""
        return DenseGradientMask(torch.ones((), dtype=weight.dtype, device=weight.device))

    def metric(self, target: Target, weight: Tensor, granularity: Granularity) -> Tensor:
        """Return the sum of the absolute values of each block."""
        return block_norm(weight, granularity, 1)

    def advance(self) -> None:
        """Choose again."""
        self._mask(self._progress_at(self.steps))

    def penalty(self) -> Tensor | float:
        """``decay`` times half the squared norm of all masked weights."""
        if not self.decay:
            return 0.0
        modules = dict(self.model.named_modules())
        terms = []
        for target, mask in self.simulators.items():
            weight = modules[target.module]._parameters[target.name]
            if weight is not None and isinstance(mask, DenseGradientMask):
                terms.append(masked_decay(weight, mask.value))
        return self.decay * torch.stack(terms).sum() if terms else 0.0

    def freeze(self) -> None:
        """Masked weights learn no more."""
        for simulator in self.simulators.values():
            if isinstance(simulator, DenseGradientMask):
                simulator.frozen = True
