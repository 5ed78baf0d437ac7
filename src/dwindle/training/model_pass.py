"""One way to run a model over data and leave it exactly as it was."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.graph.modes import modes_kept
from dwindle.training.batches import logits_of, move_batch, split_batch
from dwindle.training.inputs import batches_of
from dwindle.training.progress import tracked

Item = TypeVar("Item")


@contextlib.contextmanager
def undisturbed(model: nn.Module, gradients_of: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Evaluation mode without gradients left over; afterwards flags, gradients and what requires them are as before.

    Args:
        model: The model.
        gradients_of: Parameters that get gradients inside, frozen ones too.
    """
    saved = [(own, own.grad, own.requires_grad) for own in model.parameters()]
    try:
        with modes_kept(model):
            model.eval()
            for parameter, _, _ in saved:
                parameter.grad = None
            for parameter in gradients_of:
                parameter.requires_grad_(True)
            yield
    finally:
        for parameter, gradient, wanted in saved:
            parameter.grad = gradient
            parameter.requires_grad_(wanted)


@contextlib.contextmanager
def statistics_of_batches(model: nn.Module) -> Iterator[None]:
    """BatchNorms normalize with each batch's own statistics, as in training; their buffers are as before afterwards.

    For models that were not trained yet, whose running statistics mean nothing.

    Args:
        model: A model whose flags somebody else puts back.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    saved = [(own, own.clone()) for norm in norms for own in norm.buffers(recurse=False)]
    try:
        for norm in norms:
            norm.train()
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


def device_of(model: nn.Module) -> torch.device:
    """Return where the model's parameters are."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def task_loss(model: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor], number: int) -> Tensor:
    """Return the loss of one labelled batch, a 0-d tensor with its graph.

    Args:
        model: The model.
        batch: ``(inputs, target)``, or a mapping with ``labels``.
        loss: ``loss(outputs, target)``.
        number: Which batch it is, for messages.

    Raises:
        ConfigError: The batch has no target.
        DwindleError: The loss is not finite.
    """
    args, kwargs, target = split_batch(move_batch(batch, device_of(model)))
    value = loss(logits_of(model(*args, **kwargs)), target)
    if not math.isfinite(float(value.detach())):
        raise DwindleError(f"the loss of batch {number} is {float(value.detach())}")
    return value


def batches_for(data: Any, batches: int | None, description: str) -> Iterator[Any]:
    """Yield batches, with a bar on a terminal.

    Args:
        data: Batches, or one tensor, which is one batch.
        batches: How many are wanted; None takes all.
        description: What is done with them.

    Raises:
        ConfigError: The data end before, or hold nothing.
    """
    source = batches_of(data)
    known = len(source) if isinstance(source, Sized) else None
    total = known if batches is None else batches if known is None else min(known, batches)
    seen = 0
    for batch in tracked(itertools.islice(source, batches), description, total=total):
        seen += 1
        yield batch
    if seen < (batches or 1):
        raise ConfigError(
            f"data ended after {seen} of {batches or 'its'} batches; an iterator can be used only once"
        )


def within_memory(items: Iterable[Item], size_of: Callable[[Item], int], memory: int) -> Iterator[list[Item]]:
    """Yield as many items at once as fit in the memory, in their order, one at least.

    Args:
        items: What is gathered in one pass over the data.
        size_of: Bytes that an item needs.
        memory: Bytes that there are.
    """
    group: list[Item] = []
    used = 0
    for item in items:
        size = size_of(item)
        if group and used + size > memory:
            yield group
            group, used = [], 0
        group.append(item)
        used += size
    if group:
        yield group
