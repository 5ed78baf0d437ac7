"""Evaluators of NNI 2.10, and the three arguments that came before them."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.compat.nni.evaluator import Evaluator
from dwindle.config.errors import ConfigError, did_you_mean

Criterion = Callable[..., Any]


class TorchEvaluator(Evaluator):
    """NNI 2.10's evaluator: its loop is given a criterion.

    Args:
        training_func: ``f(model, optimizers, criterion, lr_schedulers, max_steps, max_epochs)``.
        optimizers: One, or a list.
        criterion: The loss.
        lr_schedulers: One, a list, or None.
        dummy_input: Example inputs of the model.
        evaluating_func: ``f(model)`` gives a number, or a dict with the key ``default``.
    """

    def __init__(
        self,
        training_func: Callable[..., Any] | None,
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
        criterion: Criterion | None,
        lr_schedulers: Any | None = None,
        dummy_input: Any | None = None,
        evaluating_func: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        super().__init__(optimizers, lr_schedulers, dummy_input, evaluating_func)
        self.training_func, self.criterion = training_func, criterion

    def run_training(
        self, model: nn.Module, extra: Callable[[], Tensor | float], steps: int | None, epochs: int | None
    ) -> None:
        """Call the user's loop with a criterion that adds ``extra``."""
        if self.training_func is None:
            raise ConfigError("this evaluator has no training_func")
        criterion = _added(self, self.criterion, extra)
        self.training_func(model, self.optimizers, criterion, self.lr_schedulers, steps, epochs)


class TrainerEvaluator(Evaluator):
    """What NNI 2.0 to 2.8 asked for: a function that trains one epoch, an optimizer, a criterion.

    Args:
        trainer: ``f(model, optimizer, criterion)``.
        traced_optimizer: The optimizer.
        criterion: The loss.
    """

    def __init__(
        self, trainer: Callable[..., Any], traced_optimizer: torch.optim.Optimizer, criterion: Criterion
    ) -> None:
        super().__init__(traced_optimizer)
        self.trainer, self.criterion = trainer, criterion

    def run_training(
        self, model: nn.Module, extra: Callable[[], Tensor | float], steps: int | None, epochs: int | None
    ) -> None:
        """Train epoch by epoch, until there were enough steps or epochs."""
        criterion, done = _added(self, self.criterion, extra), 0
        while done < (epochs if epochs is not None else 1 if steps is None else 2**62):
            before = self.steps
            self.trainer(model, self.optimizer, criterion)
            done += 1
            if steps is not None and (self.steps >= steps or self.steps == before):
                return


def _added(
    evaluator: Evaluator, criterion: Criterion | None, extra: Callable[[], Tensor | float]
) -> Criterion:
    if criterion is None:
        raise ConfigError("training needs a criterion")

    def both(*args: Any, **kwargs: Any) -> Any:
        loss = criterion(*args, **kwargs)
        return (loss if evaluator.origin_weight == 1.0 else evaluator.origin_weight * loss) + extra()

    return both


def by_epoch(trainer: Callable[..., Any]) -> Callable[..., Any]:
    """Return a trainer that is told the number of the epoch, where it takes one.

    Args:
        trainer: ``f(model, optimizer, criterion)`` or ``f(model, optimizer, criterion, epoch)``.
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if sum(parameter.kind in kinds for parameter in inspect.signature(trainer).parameters.values()) < 4:
        return trainer
    epochs = itertools.count()

    def with_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Criterion) -> Any:
        return trainer(model, optimizer, criterion, next(epochs))

    return with_epoch


def read_arguments(
    new: Sequence[str],
    old: Sequence[str] | None,
    defaults: Mapping[str, Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the arguments of a pruner by their names in 2.10, whichever of its two forms was used.

    Args:
        new: Names in the order of 2.10, ``evaluator`` among them.
        old: Names in the order of 2.0 to 2.8; ``trainer``, ``traced_optimizer`` and ``criterion`` become an evaluator,
            and ``training_batches`` is ``training_steps``. None where there is one form only.
        defaults: Values of what may be left out.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Raises:
        ConfigError: An argument is missing, unknown or given twice.
    """
    names = list(new)
    if old is not None:
        place = new.index("evaluator")
        given = kwargs.get("evaluator", args[place] if len(args) > place else None)
        names = list(new if isinstance(given, Evaluator) else old)
    if len(args) > len(names):
        raise ConfigError(f"{len(args)} arguments, but there are {len(names)}: {', '.join(names)}")
    found = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in names:
            raise ConfigError(f"there is no argument {name!r}{did_you_mean(name, names)}")
        if name in found:
            raise ConfigError(f"{name} is given twice")
        found[name] = value
    missing = [name for name in names if name not in found and name not in defaults]
    if missing:
        raise ConfigError(f"missing: {', '.join(missing)}")
    found = {**defaults, **found}
    if "trainer" in found:
        made = [found.pop(name) for name in ("trainer", "traced_optimizer", "criterion")]
        found["evaluator"] = TrainerEvaluator(*made)
        warnings.warn("trainer, traced_optimizer and criterion: NNI 2.10 takes an evaluator", stacklevel=4)
    if "training_batches" in found:
        found["training_steps"] = found.pop("training_batches")
    return found


def judges(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return who trains and who scores an iterative pruner, out of arguments in either form.

    Args:
        given: What :func:`read_arguments` returned: 2.10's ``evaluator`` trains and scores; in 2.0 to 2.8 that name
            was a function that scores, beside a ``finetuner``.
    """
    evaluator = given["evaluator"]
    modern = isinstance(evaluator, Evaluator)
    return {
        "evaluator": evaluator if modern else None,
        "scorer": None if modern else evaluator,
        "finetuner": given.get("finetuner"),
        "dummy_input": given.get("dummy_input"),
    }
