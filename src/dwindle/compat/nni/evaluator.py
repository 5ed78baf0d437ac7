"""``TorchEvaluator``: the user's own training loop as an object, driven by a pruner.

The loop gets the user's model and optimizer themselves. Its loss gets the pruners' losses added, and a hook on the
optimizer tells the pruners of each step; both are gone afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.training import CompressionRun, Compressor


class Evaluator:
    """What all evaluators have: training for a time, with compressors taking part, and an evaluation.

    Args:
        optimizers: One, or a list; steps of the first are counted.
        lr_schedulers: One, a list, or None.
        dummy_input: Example inputs of the model.
        evaluating_func: ``f(model)`` gives a number, or a dict with the key ``default``.

    Attributes:
        steps: Optimizer steps of the newest training.
        batch: The batch that the user's loop is at, where it says so; else None.
        origin_weight: Weight of the task's own loss.
    """

    def __init__(
        self,
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
        lr_schedulers: Any | None = None,
        dummy_input: Any | None = None,
        evaluating_func: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        self.optimizers = optimizers
        self.lr_schedulers = lr_schedulers
        self.dummy_input = dummy_input
        self.evaluating_func = evaluating_func
        self.steps = 0
        self.batch: Any = None
        self.origin_weight = 1.0

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer whose steps count.

        Raises:
            ConfigError: There is none.
        """
        first = self.optimizers if isinstance(self.optimizers, torch.optim.Optimizer) else None
        if first is None and isinstance(self.optimizers, Sequence) and self.optimizers:
            first = self.optimizers[0]
        if not isinstance(first, torch.optim.Optimizer):
            raise ConfigError("the evaluator needs an optimizer to train")
        return first

    def get_dummy_input(self) -> Any:
        """Return the example inputs, or None."""
        return self.dummy_input

    def evaluate(self, model: nn.Module) -> Any:
        """Return what the user's evaluation gives for a model; None without one."""
        return None if self.evaluating_func is None else self.evaluating_func(model)

    def score(self, model: nn.Module) -> float | None:
        """Return the evaluation as one number; None without one."""
        value = self.evaluate(model)
        if isinstance(value, dict):
            value = value["default"]
        return None if value is None else float(value)

    def run_training(
        self, model: nn.Module, extra: Callable[[], Tensor | float], steps: int | None, epochs: int | None
    ) -> None:
        """Call the user's loop.

        Args:
            model: What is trained.
            extra: What is added to each loss.
            steps: Optimizer steps; None leaves it to the epochs.
            epochs: Epochs; None leaves it to the loop.
        """
        raise NotImplementedError

    def train(
        self,
        model: nn.Module,
        compressors: Sequence[Compressor] = (),
        max_steps: int | None = None,
        max_epochs: int | None = None,
        *,
        origin_weight: float = 1.0,
    ) -> None:
        """Train with attached compressors.

        Args:
            model: The model.
            compressors: Told of each step; their losses are added, their parameters trained.
            max_steps: Optimizer steps.
            max_epochs: Epochs.
            origin_weight: Weight of the task's own loss beside the compressors'.

        Raises:
            ConfigError: The optimizer does not hold the model's parameters.
        """

        def extra() -> Tensor | float:
            total: Tensor | float = 0.0
            for compressor in compressors:
                total = total + compressor.loss()
            return total

        self.origin_weight = origin_weight
        try:
            with self._watched(model, compressors):
                self.run_training(model, extra, max_steps, max_epochs)
        finally:
            self.batch, self.origin_weight = None, 1.0

    def finetune(self, model: nn.Module) -> None:
        """Train for as long as the user's loop does by itself."""
        self.train(model)

    @contextlib.contextmanager
    def _watched(self, model: nn.Module, compressors: Sequence[Compressor]) -> Iterator[None]:
        optimizer = self.optimizer
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(parameter) in held for parameter in model.parameters()):
            raise ConfigError(
                "the evaluator's optimizer holds none of the model's parameters; make it with model.parameters() "
                "of the model that is pruned"
            )
        groups = len(optimizer.param_groups)
        CompressionRun(model, compressors).add_parameters_to(optimizer)
        self.steps = 0

        def stepped(*_: Any) -> None:
            self.steps += 1
            for compressor in compressors:
                compressor.step()

        handle = optimizer.register_step_post_hook(stepped)
        try:
            yield
        finally:
            handle.remove()
            for group in optimizer.param_groups[groups:]:
                for parameter in group["params"]:
                    optimizer.state.pop(parameter, None)
            del optimizer.param_groups[groups:]


class TorchEvaluator(Evaluator):
    """NNI 3.0's evaluator for a plain PyTorch loop.

    Args:
        training_func: ``f(model, optimizers, training_step, lr_schedulers, max_steps, max_epochs)``, which calls
            ``training_step(batch, model)`` for the loss and stops after ``max_steps`` or ``max_epochs``.
        optimizers: One, or a list.
        training_step: ``f(batch, model, ...)`` gives a loss, a tuple or list that begins with it, or a dict with
            ``loss``.
        lr_schedulers: One, a list, or None.
        dummy_input: Example inputs of the model.
        evaluating_func: ``f(model)`` gives a number, or a dict with the key ``default``.
    """

    def __init__(
        self,
        training_func: Callable[..., Any],
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        training_step: Callable[..., Any],
        lr_schedulers: Any | None = None,
        dummy_input: Any | None = None,
        evaluating_func: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        super().__init__(optimizers, lr_schedulers, dummy_input, evaluating_func)
        self.training_func, self.training_step = training_func, training_step

    def run_training(
        self, model: nn.Module, extra: Callable[[], Tensor | float], steps: int | None, epochs: int | None
    ) -> None:
        """Call the user's loop with a step whose loss has ``extra`` added."""

        def training_step(batch: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.batch = batch
            return _with_added(self.training_step(batch, model, *args, **kwargs), extra, self.origin_weight)

        self.training_func(model, self.optimizers, training_step, self.lr_schedulers, steps, epochs)


def _with_added(result: Any, extra: Callable[[], Tensor | float], weight: float) -> Any:
    """Weigh the loss in what a training step returned, and add to it."""

    def total(loss: Any) -> Any:
        return (loss if weight == 1.0 else weight * loss) + extra()

    if isinstance(result, dict):
        return {**result, "loss": total(result["loss"])}
    if isinstance(result, tuple | list):
        return type(result)([total(result[0]), *result[1:]])
    return total(result)


def checked_evaluator(evaluator: Evaluator | None) -> Evaluator | None:
    """Return an evaluator, if it is one.

    Raises:
        ConfigError: It is something else.
    """
    if evaluator is not None and not isinstance(evaluator, Evaluator):
        raise ConfigError(f"evaluator must be an evaluator, got a {type(evaluator).__name__}")
    return evaluator
