"""The pruners of NNI 3.0, with their signatures."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dwindle import pruning
from dwindle.compat.nni.compressor import UNTIL_THE_END, Pruner
from dwindle.compat.nni.evaluator import Evaluator
from dwindle.config.errors import ConfigError

ConfigList = Sequence[Mapping[str, Any]]


class _OneShotPruner(Pruner):
    """A pruner that needs the weights alone."""

    kind: type[pruning.Pruner]

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        existed_wrappers: Any | None = None,
    ) -> None:
        super().__init__(model, config_list, evaluator, existed_wrappers)
        self.inner = self.kind(model, config_list, **self.coupled)


class LevelPruner(_OneShotPruner):
    """Single weights with the smallest absolute value go."""

    kind = pruning.LevelPruner


class L1NormPruner(_OneShotPruner):
    """Blocks with the smallest L1 norm go."""

    kind = pruning.L1NormPruner


class L2NormPruner(_OneShotPruner):
    """Blocks with the smallest L2 norm go."""

    kind = pruning.L2NormPruner


class FPGMPruner(_OneShotPruner):
    """Blocks nearest to the geometric median of their layer go."""

    kind = pruning.FPGMPruner


class SlimPruner(Pruner):
    """Blocks whose trained factor is smallest go; the mean of the targets' L1 norms is penalized.

    Args:
        model: The model.
        config_list: The config.
        evaluator: Trains.
        training_steps: Steps with the penalty; then the masks come.
        regular_scale: Weight of the penalty.
        existed_wrappers: Not needed.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator,
        training_steps: int,
        regular_scale: float = 1.0,
        existed_wrappers: Any | None = None,
    ) -> None:
        super().__init__(model, config_list, evaluator, existed_wrappers)
        inner = pruning.SlimPruner(
            model,
            config_list,
            training_steps=training_steps,
            regular_scale=regular_scale,
            learning_rate=1e-2,
            **self.coupled,
        )
        inner.regular_scale = regular_scale / max(len(inner.plan.goals), 1)
        self.inner, self.own_steps = inner, training_steps


class TaylorPruner(Pruner):
    """Blocks whose weights have the smallest first order effect on the loss go.

    Args:
        model: The model.
        config_list: The config.
        evaluator: Trains.
        training_steps: Steps whose gradients count; then the masks come.
        existed_wrappers: Not needed.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator,
        training_steps: int,
        existed_wrappers: Any | None = None,
    ) -> None:
        super().__init__(model, config_list, evaluator, existed_wrappers)
        self.inner = pruning.TaylorPruner(model, config_list, training_steps=training_steps, **self.coupled)
        self.own_steps = training_steps


class _MovementOfBlocks(pruning.MovementPruner):
    """Output channels unless the config says else."""

    default_granularity: str | None = "out_channel"  # type: ignore[assignment]


class MovementPruner(Pruner):
    """Blocks whose weights moved towards zero go; masks follow their scores until the training ends.

    Args:
        model: The model.
        config_list: The config; a ratio is hard movement, a threshold soft.
        evaluator: Trains.
        warmup_step: Steps before the ratio rises.
        cooldown_begin_step: The step from which on it is the goal.
        regular_scale: Weight of the penalty of soft movement.
        existed_wrappers: Not needed.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator,
        warmup_step: int,
        cooldown_begin_step: int,
        regular_scale: float = 1.0,
        existed_wrappers: Any | None = None,
    ) -> None:
        super().__init__(model, config_list, evaluator, existed_wrappers)
        if not 0 <= warmup_step < cooldown_begin_step:
            raise ConfigError(
                f"warmup_step {warmup_step} must be below cooldown_begin_step {cooldown_begin_step}"
            )
        self.cooldown_begin_step = cooldown_begin_step
        self.inner = _MovementOfBlocks(
            model,
            config_list,
            training_steps=UNTIL_THE_END,
            warmup_steps=warmup_step,
            cooldown_steps=UNTIL_THE_END - cooldown_begin_step,
            regular_scale=regular_scale,
            learning_rate=1e-2,
            **self.coupled,
        )
        self.own_steps = cooldown_begin_step

    def _end(self, steps: int) -> None:
        if steps < self.cooldown_begin_step:
            raise ConfigError(
                f"the training ended after {steps} steps, before cooldown_begin_step {self.cooldown_begin_step}; "
                "nothing is masked"
            )
        super()._end(steps)


class _ScheduledPruner(Pruner):
    """Wraps another pruner."""

    kind: type[pruning.LinearPruner] | type[pruning.AGPPruner]

    def __init__(
        self, pruner: Pruner, interval_steps: int, total_times: int, evaluator: Evaluator | None = None
    ) -> None:
        if not isinstance(pruner, Pruner) or not isinstance(pruner.inner, pruning.Pruner):
            raise ConfigError(
                f"pruner must be a pruner that is under no schedule, got a {type(pruner).__name__}"
            )
        if pruner.evaluator is not None and evaluator is not None:
            warnings.warn("the pruner has an evaluator already; the new one is not used", stacklevel=2)
        super().__init__(pruner.bound_model, pruner.config_list, pruner.evaluator or evaluator)
        self.fused_compressors = pruner.fused_compressors
        inner = pruner.inner
        if isinstance(inner, pruning.ObservingPruner):
            inner.training_steps = None  # the schedule decides
        elif isinstance(inner, pruning.TrainingPruner):
            inner.training_steps = interval_steps * total_times
        self.inner = self.kind(inner, interval_steps, total_times)
        self.own_steps = interval_steps * total_times

    @classmethod
    def from_compressor(cls, *args: Any, **kwargs: Any) -> Any:
        """Not possible; wrap a pruner that was made from a compressor.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(f"{cls.__name__} wraps a pruner; make that one from the compressor")

    def compress(
        self, max_steps: int | None = None, max_epochs: int | None = None
    ) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
        """Train; the pruner's ratios grow."""
        if max_steps is not None and self.own_steps is not None and max_steps < self.own_steps:
            raise ConfigError(
                f"max_steps {max_steps} is less than interval_steps times total_times, {self.own_steps}"
            )
        return super().compress(max_steps, max_epochs)


class LinearPruner(_ScheduledPruner):
    """The ratios of another pruner grow in a straight line."""

    kind = pruning.LinearPruner


class AGPPruner(_ScheduledPruner):
    """The ratios of another pruner grow as ``1 - (1 - k / total_times)**3``."""

    kind = pruning.AGPPruner
