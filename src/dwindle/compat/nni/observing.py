"""The inputs that a user's training loop gives a model, taken without training it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.compat.nni.evaluator import Evaluator
from dwindle.config.errors import ConfigError

Batch = tuple[Any, ...] | dict[str, Any]


class _EnoughError(BaseException):
    """All batches that were asked for went by; no loop catches it by accident."""


def observed_batches(
    model: nn.Module, evaluator: Evaluator | None, count: int, epochs: int | None = None
) -> list[Batch]:
    """Return what the model is called with while the evaluator's loop runs; everything is as before afterwards.

    NNI trains the model while it observes; here weights, buffers, optimizers, schedulers, random numbers are put back.

    Args:
        model: The model.
        evaluator: Its loop brings the data; its ``dummy_input`` is used where it cannot be run.
        count: Batches, at most.
        epochs: Passed on to the loop.

    Raises:
        ConfigError: There is neither a loop nor a ``dummy_input``, or the loop never called the model.
    """
    if evaluator is None:
        raise ConfigError("an evaluator is needed: its data give the ranges")
    found: list[Batch] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(found) >= count:
            raise _EnoughError
        own = {name: _kept(value) for name, value in kwargs.items()}
        found.append(own if own else tuple(_kept(value) for value in args))

    if evaluator.optimizers is None:
        return _dummy(evaluator)
    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with _put_back(model, evaluator):
            evaluator.run_training(model, lambda: 0.0, count, epochs)
    except _EnoughError:
        pass
    finally:
        handle.remove()
    return found or _dummy(evaluator)


def _dummy(evaluator: Evaluator) -> list[Batch]:
    given = evaluator.get_dummy_input()
    if given is None:
        raise ConfigError("the evaluator's loop never called the model, and there is no dummy_input")
    return [given if isinstance(given, tuple | dict) else (given,)]


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


@contextmanager
def _put_back(model: nn.Module, evaluator: Evaluator) -> Iterator[None]:
    """Put everything back that a training changes."""
    holders = [*_listed(evaluator.optimizers), *_listed(evaluator.lr_schedulers)]
    states = [copy.deepcopy(own.state_dict()) for own in (model, *holders)]
    gradients = [parameter.grad for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    random = torch.get_rng_state()
    try:
        yield
    finally:
        for own, state in zip((model, *holders), states, strict=True):
            own.load_state_dict(state)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        for module, training in modes:
            module.training = training
        torch.set_rng_state(random)


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) else [value]
