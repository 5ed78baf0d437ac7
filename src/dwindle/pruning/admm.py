"""Pruning by the alternating direction method of multipliers (ADMM).

Zhang et al., "A Systematic DNN Weight Pruning Framework using Alternating Direction Method of Multipliers"
(https://arxiv.org/abs/1804.03294).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config import Granularity, Target
from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.pruning.base import block_norm
from dwindle.pruning.groups import selected, unit_sets
from dwindle.pruning.plan import PlannedTarget
from dwindle.pruning.trained import TrainingPruner, whole_number

__all__ = ["ADMMPruner", "augmented_penalty"]


def augmented_penalty(weight: Tensor, split: Tensor, dual: Tensor, rho: float) -> Tensor:
    """Return ``rho / 2 * ||W - Z + U||**2`` (the paper's equation 5), 0-d.

    Args:
        weight: W, trained.
        split: Z, the sparse copy.
        dual: U, what W and Z have differed by so far.
        rho: Weight of the term.
    """
    return rho / 2 * (weight - split + dual).square().sum()


class ADMMPruner(TrainingPruner):
    """Weights are pulled towards the nearest weights that are as sparse as asked; then the smallest go.

    Training alternates: the optimizer minimizes the task's loss plus ``rho / 2 * ||W - Z + U||**2`` of each target;
    after every ``interval_steps`` steps Z becomes the projection of ``W + U`` on what the config_list allows (its
    ratio of blocks with the smallest Euclidean norm is zero) and U grows by ``W - Z``. After ``training_steps`` the
    blocks of W with the smallest norm go: by then they are small, and their loss costs little.

    Ratios, N:M patterns, blocks, channels, groups and axes are projected on as every pruner chooses them. It has no
    parameters of its own; Z and U are kept in its state.

    Args:
        model: As in :class:`~dwindle.pruning.Pruner`.
        config_list: As in :class:`~dwindle.pruning.Pruner`.
        example_inputs: As in :class:`~dwindle.pruning.Pruner`.
        example_kwargs: As in :class:`~dwindle.pruning.Pruner`.
        training_steps: Optimizer steps until the masks stand.
        interval_steps: Optimizer steps of one iteration.
        rho: Weight of the term; one number, or one for each module name.

    Raises:
        ConfigError: An argument is not valid.
    """

    default_granularity = None

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        example_inputs: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        training_steps: int,
        interval_steps: int,
        rho: float | Mapping[str, float] = 1e-3,
    ) -> None:
        super().__init__(model, config_list, example_inputs, example_kwargs, training_steps=training_steps)
        self.interval_steps = whole_number("interval_steps", interval_steps, at_least=1)
        if interval_steps >= training_steps:
            raise ConfigError(
                f"interval_steps {interval_steps}: there is no iteration before the end of {training_steps} "
                "training_steps"
            )
        self.rho = {target: _rho_of(target, rho) for target in self.plan.goals}
        if isinstance(rho, Mapping):
            names = [target.module for target in self.plan.goals]
            for name in rho:
                if name not in names:
                    raise ConfigError(f"rho: no target is in {name!r}{did_you_mean(name, names)}")
        self.split: dict[Target, Tensor] = {}
        self.dual: dict[Target, Tensor] = {}

    def make_simulator(self, planned: PlannedTarget, weight: Tensor) -> None:
        """Targets have a plain mask; it is all ones until the end."""

    def prepare(self) -> None:
        """Analyse the model; Z begins as the projection of W, U as zero."""
        super().prepare()
        weights = self.collect()
        self.split = self.projected(weights)
        self.dual = {target: torch.zeros_like(weight) for target, weight in weights.items()}

    def metric(self, target: Target, weight: Tensor, granularity: Granularity) -> Tensor:
        """Return the Euclidean norm of each block: keeping the largest is the nearest sparse point."""
        return block_norm(weight, granularity, 2)

    def projected(self, values: Mapping[Target, Tensor]) -> dict[Target, Tensor]:
        """Return the nearest values of which as much is zero as the config_list asks.

        Args:
            values: One tensor for each target, of its parameter's shape.
        """
        goals = self.plan.goals
        metrics = {
            target: self._behind(target, self.metric(target, value, goals[target].granularity))
            for target, value in values.items()
        }
        sets, _ = unit_sets(goals, metrics, coupling=self._coupling)
        keep, _ = selected(sets, goals, metrics, coupling=self._coupling)
        return {
            target: value * goals[target].granularity.compact(keep[target].to(value), value.shape)
            for target, value in values.items()
        }

    def advance(self) -> None:
        """After every iteration renew Z and U."""
        if self.steps % self.interval_steps:
            return
        weights = self.collect()
        self.split = self.projected(
            {target: weight + self.dual[target] for target, weight in weights.items()}
        )
        for target, weight in weights.items():
            self.dual[target] = self.dual[target] + weight - self.split[target]

    def penalty(self) -> Tensor | float:
        """The sum over targets of ``rho / 2 * ||W - Z + U||**2``."""
        modules = dict(self.model.named_modules())
        terms = []
        for target, rho in self.rho.items():
            weight = modules[target.module]._parameters[target.name]
            if weight is not None:
                terms.append(augmented_penalty(weight, self.split[target], self.dual[target], rho))
        return torch.stack(terms).sum() if terms else 0.0

    def freeze(self) -> None:
        """The masks stand: Z and U are not needed any more."""
        self.split.clear()
        self.dual.clear()

    def residuals(self) -> dict[str, float]:
        """Return ``||W - Z|| / ||W||`` of each target: how far the weights are from sparse ones."""
        weights = self.collect()
        return {
            str(target): float((weights[target] - split).norm() / weights[target].norm())
            for target, split in self.split.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on, Z and U included."""
        own = {
            "split": {str(target): value for target, value in self.split.items()},
            "dual": {str(target): value for target, value in self.dual.items()},
        }
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ConfigError: A key is missing.
        """
        missing = {"split", "dual"} - set(state)
        if missing:
            raise ConfigError(f"the state of {type(self).__name__} needs {', '.join(sorted(missing))}")
        modules = dict(self.model.named_modules())
        for name, kept in (("split", self.split), ("dual", self.dual)):
            kept.clear()
            for path, value in state[name].items():
                target = Target.parse(path)
                like = modules[target.module]._parameters[target.name]
                kept[target] = value if like is None else value.to(like.device)
        super().load_state_dict(state)


def _rho_of(target: Target, rho: float | Mapping[str, float]) -> float:
    value = rho.get(target.module, 0.0) if isinstance(rho, Mapping) else rho
    if not value > 0:
        raise ConfigError(f"rho of {target}: {value!r} is not a positive number")
    return float(value)
