"""What all pruners under NNI's names have: ``compress``, ``unwrap_model``, masks, chains of compressors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle import pruning, simulate
from dwindle.compat.nni.chain import Chained, run_chain
from dwindle.compat.nni.dependency import example_inputs_of
from dwindle.compat.nni.evaluator import Evaluator, checked_evaluator
from dwindle.config import Target
from dwindle.config.errors import ConfigError
from dwindle.pruning.trained import TrainingPruner
from dwindle.training import Compressor

Inner = pruning.Pruner | pruning.ScheduledPruner
Masks = dict[str, dict[str, Tensor]]

#: Longer than any training: the pruner ends when the training does.
UNTIL_THE_END = 2**62


class Pruner(Chained):
    """A pruner of dwindle with the calls of NNI's.

    Args:
        model: The model; masked in place.
        config_list: As in NNI 3.0, or a list of 2.x, which is translated.
        evaluator: Trains and evaluates; not needed by one-shot pruners.
        existed_wrappers: Taken and not needed: masks of several pruners share a target by themselves.

    Attributes:
        inner: The pruner of dwindle.
    """

    inner: Inner

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: Any | None = None,
    ) -> None:
        self.bound_model, self.config_list = model, config_list
        self.evaluator = checked_evaluator(evaluator)
        self._masks: Masks = {}

    @property
    def coupled(self) -> dict[str, Any]:
        """The example inputs that :func:`auto_set_denpendency_group_ids` left in the config, as an argument."""
        inputs = example_inputs_of(self.config_list)
        return {} if inputs is None else {"example_inputs": inputs}

    @property
    def trains(self) -> bool:
        """Whether a training is needed for the masks."""
        return isinstance(self.inner, TrainingPruner | pruning.ScheduledPruner) or (
            isinstance(self.inner, pruning.ObservingPruner) and self.inner.data is None
        )

    def compress(
        self, max_steps: int | None = None, max_epochs: int | None = None
    ) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
        """Make the masks, with training where they need it; several compressors share one training.

        Args:
            max_steps: Optimizer steps of the training; None is what the pruners ask for.
            max_epochs: Epochs of the training.

        Returns:
            The model, masked, and the masks ``{module: {target: mask}}``.

        Raises:
            ConfigError: There is no evaluator, or its training ended before the masks stood; nothing is masked then.
        """
        self._work(max_steps, max_epochs)
        return self.bound_model, self._masks

    def _work(self, max_steps: int | None, max_epochs: int | None) -> None:
        """Make the masks of the whole chain."""
        run_chain([*self.fused_compressors, self], max_steps, max_epochs)

    def _start(self, evaluator: Evaluator) -> Compressor:
        self.inner.attach()
        return self.inner

    def _withdraw(self) -> None:
        self.inner.detach(keep_values=False)

    def _alone(self) -> None:
        self.inner.compress()

    def _finished(self) -> None:
        self._masks = self.inner.masks

    def _end(self, steps: int) -> None:
        """The training is over: see that the masks stand."""
        inner = self.inner
        if isinstance(inner, TrainingPruner) and not inner.finished and inner.training_steps == UNTIL_THE_END:
            inner.finish()
        unfinished = not getattr(inner, "finished", True)
        if isinstance(inner, pruning.ObservingPruner) and inner.training_steps is not None:
            unfinished = inner.steps < inner.training_steps
        if unfinished:
            raise ConfigError(
                f"the training ended after {steps} steps, before {type(self).__name__} had what it needs; nothing is "
                "masked"
            )

    def wrap_model(self) -> None:
        """Put the masks back on the model."""
        _innermost(self.inner).mask_again()

    def unwrap_model(self) -> nn.Module:
        """Take the masks off; masked weights have their dense values again. Learned gates are folded into weights."""
        inner = _innermost(self.inner)
        if isinstance(inner, TrainingPruner) and inner.stage == "gate":
            simulate.detach(self.bound_model, keep_values=True, targets=list(inner.simulators), stage="gate")
        self.inner.detach(keep_values=False)
        return self.bound_model

    def get_masks(self) -> Masks:
        """Return the masks, ``{module: {target: mask}}``."""
        return self._masks or self.inner.masks

    def update_masks(self, masks: Mapping[str, Mapping[str, Tensor | None]]) -> None:
        """Mask the model as given."""
        for module, targets in masks.items():
            for name, mask in targets.items():
                if mask is not None:
                    simulate.attach_mask(self.bound_model, Target(module, name), mask)
        self._masks = simulate.masks_as_nested(self.bound_model)

    def track_forward(self, *args: Any, **kwargs: Any) -> None:
        """Run the model once."""
        with torch.no_grad():
            self.bound_model(*args, **kwargs)

    def report(self) -> pruning.PruningReport:
        """Return what was asked and what was done."""
        return self.inner.report()


def _innermost(inner: Inner) -> pruning.Pruner:
    return inner.pruner if isinstance(inner, pruning.ScheduledPruner) else inner
