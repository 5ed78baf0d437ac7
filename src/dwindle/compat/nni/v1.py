"""Pruners of NNI 1.x (and of the 2.x packages that still carried them), with their signatures.

Their ``compress()`` returns the model alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from dwindle import pruning, simulate
from dwindle.compat.nni import v2
from dwindle.compat.nni.compressor import Pruner as Handle
from dwindle.compat.nni.heads import TransformerHeadPruner
from dwindle.compat.nni.searched import NetAdaptPruner, SensitivityPruner
from dwindle.compat.nni.v2.compressor import ConfigList, Pruner
from dwindle.compat.nni.v2.evaluator import TrainerEvaluator, by_epoch
from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.pruning.plan import with_ratios
from dwindle.training import ExponentialSchedule, Rewinding

__all__ = [
    "ADMMPruner",
    "AGPPruner",
    "ActivationAPoZRankFilterPruner",
    "ActivationMeanRankFilterPruner",
    "FPGMPruner",
    "L1FilterPruner",
    "L2FilterPruner",
    "LevelPruner",
    "LotteryTicketPruner",
    "NetAdaptPruner",
    "SensitivityPruner",
    "SlimPruner",
    "TaylorFOWeightFilterPruner",
    "TransformerHeadPruner",
]

Trainer = Callable[..., Any]
_CROSS_ENTROPY = nn.CrossEntropyLoss()


class _Pruner(Pruner):
    """``compress()`` as in 1.x."""

    def compress(self) -> nn.Module:  # type: ignore[override]
        """Make the masks; return the model."""
        return super().compress()[0]


def _aware(dependency_aware: bool) -> str:
    return "dependency_aware" if dependency_aware else "normal"


class LevelPruner(_Pruner, v2.LevelPruner):
    """Single weights with the smallest absolute value go."""

    def __init__(self, model: nn.Module, config_list: ConfigList) -> None:
        super().__init__(model, config_list)


class _FilterPruner(_Pruner):
    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        dependency_aware: bool = False,
        dummy_input: Any = None,
    ) -> None:
        super().__init__(model, config_list, _aware(dependency_aware), dummy_input)  # type: ignore[arg-type]


class L1FilterPruner(_FilterPruner, v2.L1NormPruner):
    """Output channels with the smallest L1 norm go."""


class L2FilterPruner(_FilterPruner, v2.L2NormPruner):
    """Output channels with the smallest L2 norm go."""


class FPGMPruner(_FilterPruner, v2.FPGMPruner):
    """Output channels nearest to the geometric median go."""


class SlimPruner(_Pruner, v2.SlimPruner):
    """Channels whose batch norm scale an L1 penalty has pushed towards zero go; all scales are ranked together."""

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        optimizer: torch.optim.Optimizer,
        trainer: Trainer,
        criterion: Callable[..., Any],
        sparsifying_training_epochs: int = 10,
        scale: float = 0.0001,
        dependency_aware: bool = False,
        dummy_input: Any = None,
    ) -> None:
        evaluator = TrainerEvaluator(by_epoch(trainer), optimizer, criterion)
        super().__init__(model, config_list, evaluator, sparsifying_training_epochs, scale, "global")


class _BatchesPruner(_Pruner):
    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        optimizer: torch.optim.Optimizer,
        trainer: Trainer,
        criterion: Callable[..., Any],
        activation: str = "relu",
        sparsifying_training_batches: int = 1,
        dependency_aware: bool = False,
        dummy_input: Any = None,
    ) -> None:
        evaluator = TrainerEvaluator(by_epoch(trainer), optimizer, criterion)
        super().__init__(  # type: ignore[call-arg]
            model,
            config_list,
            evaluator,
            sparsifying_training_batches,
            activation,
            _aware(dependency_aware),
            dummy_input,
        )


class ActivationAPoZRankFilterPruner(_BatchesPruner, v2.ActivationAPoZRankPruner):
    """Channels whose activations are zero most often go."""


class ActivationMeanRankFilterPruner(_BatchesPruner, v2.ActivationMeanRankPruner):
    """Channels with the smallest mean activation go."""


class TaylorFOWeightFilterPruner(_Pruner, v2.TaylorFOWeightPruner):
    """Channels whose weights have the smallest first order effect on the loss go."""

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        optimizer: torch.optim.Optimizer,
        trainer: Trainer,
        criterion: Callable[..., Any],
        sparsifying_training_batches: int = 1,
        dependency_aware: bool = False,
        dummy_input: Any = None,
        global_sort: bool = False,
    ) -> None:
        evaluator = TrainerEvaluator(by_epoch(trainer), optimizer, criterion)
        mode = "global" if global_sort else _aware(dependency_aware)
        super().__init__(model, config_list, evaluator, sparsifying_training_batches, mode, dummy_input)


class ADMMPruner(_Pruner, v2.ADMMPruner):
    """Weights are pulled towards sparse ones in iterations of training; then the smallest go.

    ``base_algo`` is ``level`` (single weights) or ``l1``, ``l2``, ``fpgm`` (output channels). The optimizer is Adam
    with a rate of 1e-3.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        trainer: Trainer,
        criterion: Callable[..., Any] = _CROSS_ENTROPY,
        num_iterations: int = 30,
        epochs_per_iteration: int = 5,
        row: float = 1e-4,
        base_algo: str = "l1",
    ) -> None:
        choices = {
            "level": "fine-grained",
            "l1": "coarse-grained",
            "l2": "coarse-grained",
            "fpgm": "coarse-grained",
        }
        if base_algo not in choices:
            raise ConfigError(f"base_algo {base_algo!r} is not one of {', '.join(choices)}")
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=5e-5)
        evaluator = TrainerEvaluator(by_epoch(trainer), optimizer, criterion)
        entries = [{"rho": row, **entry} for entry in config_list]
        super().__init__(model, entries, evaluator, num_iterations, epochs_per_iteration, choices[base_algo])


class AGPPruner(_Pruner):
    """Prunes and trains in iterations; after iteration ``i`` ratios are ``1 - (1 - i / n)**3`` of the goal."""

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        optimizer: torch.optim.Optimizer,
        trainer: Trainer,
        criterion: Callable[..., Any],
        num_iterations: int = 10,
        epochs_per_iteration: int = 1,
        pruning_algorithm: str = "level",
    ) -> None:
        super().__init__(model, config_list, TrainerEvaluator(by_epoch(trainer), optimizer, criterion))
        kinds = {"level": v2.LevelPruner, "l1": v2.L1NormPruner, "l2": v2.L2NormPruner, "fpgm": v2.FPGMPruner}
        if pruning_algorithm not in kinds:
            raise ConfigError(
                f"pruning_algorithm {pruning_algorithm!r} is not one of {', '.join(kinds)}"
                f"{did_you_mean(pruning_algorithm, kinds)}"
            )
        made: Handle = kinds[pruning_algorithm](model, config_list)
        self.inner = made.inner
        self.num_iterations, self.epochs_per_iteration = num_iterations, epochs_per_iteration

    def compress(self) -> nn.Module:  # type: ignore[override]
        """Prune and train; return the model."""
        inner, evaluator = self.inner, self.evaluator
        assert isinstance(inner, pruning.Pruner)
        assert evaluator is not None
        inner.compress(0.0)
        for number in range(1, self.num_iterations + 1):
            inner.update(
                1.0 if number == self.num_iterations else 1.0 - (1.0 - number / self.num_iterations) ** 3
            )
            evaluator.train(self.bound_model, [], None, self.epochs_per_iteration)
        self._masks = inner.masks
        return self.bound_model


class LotteryTicketPruner(_Pruner):
    """Finds a winning ticket in rounds that the user's own loop trains.

    ``compress()``; then for each of :meth:`get_prune_iterations`: :meth:`prune_iteration_start`, and a training.

    Args:
        model: The model, untrained.
        config_list: One entry with ``prune_iterations`` and ``sparsity``.
        optimizer: Rewound with the weights.
        lr_scheduler: Rewound with the weights.
        reset_weights: Whether to go back to the weights at the beginning in each round.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: Any | None = None,
        reset_weights: bool = True,
    ) -> None:
        super().__init__(model, config_list)
        rounds = {entry.get("prune_iterations") for entry in config_list}
        if len(rounds) != 1 or not all(isinstance(own, int) and own > 0 for own in rounds):
            raise ConfigError("every entry needs the same prune_iterations, a positive number")
        self.rounds = int(next(iter(rounds)) or 0)
        self.entries = [
            {key: value for key, value in entry.items() if key != "prune_iterations"} for entry in config_list
        ]
        self.inner = pruning.LevelPruner(model, self.entries)
        self.reset_weights = reset_weights
        self.rewinding = Rewinding(model, optimizer, lr_scheduler)
        self.round = -1

    def compress(self) -> nn.Module:  # type: ignore[override]
        """Return the model; the masks come with the rounds."""
        return self.bound_model

    def get_prune_iterations(self) -> Iterator[int]:
        """Yield the rounds; the first one trains the whole model."""
        yield from range(self.rounds + 1)

    def prune_iteration_start(self) -> None:
        """Begin a round: prune what is left once more, and go back to the beginning.

        Raises:
            ConfigError: All rounds are done.
        """
        self.round += 1
        if self.round > self.rounds:
            raise ConfigError(f"all {self.rounds} rounds are done")
        if self.round == 0:
            return
        inner = pruning.LevelPruner(self.bound_model, self.entries)
        ratios = {
            target: ExponentialSchedule(0.0, planned.setting.goal or 0.0, self.rounds)(self.round)
            for target, planned in inner.plan.goals.items()
        }
        inner.plan = with_ratios(inner.plan, ratios)
        inner.compress()
        self.inner = inner
        self._masks = simulate.masks_as_nested(self.bound_model)
        if self.reset_weights:
            self.rewinding.restore()
