"""What NNI 2.x lets the user leave out: the optimizer that trains a model, and a first batch of data."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from dwindle.compat.nni.observing import Batch
from dwindle.training import CompressionRun, Compressor

__all__ = ["at_first_call", "follow_optimizer"]


def at_first_call(model: nn.Module, begin: Callable[[Batch], None]) -> RemovableHandle:
    """Call a function with the arguments of the model's next call, before its forward runs.

    Args:
        model: The model.
        begin: Told the positional arguments, or the keyword arguments if there are any.

    Returns:
        A handle that calls it off.
    """

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handle.remove()
        begin(dict(kwargs) if kwargs else args)

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    return handle


def follow_optimizer(
    model: nn.Module, compressor: Compressor, optimizer: torch.optim.Optimizer | None
) -> None:
    """Tell a compressor of each step of an optimizer.

    Args:
        model: What the compressor works on.
        compressor: Told of the steps.
        optimizer: It; the compressor's own parameters are added to it. None takes the first one that makes a step and
            holds a parameter of the model.
    """
    if optimizer is None:
        _FirstOptimizer(model, compressor)
        return
    CompressionRun(model, [compressor]).add_parameters_to(optimizer)
    optimizer.register_step_post_hook(lambda *_: compressor.step())


class _FirstOptimizer:
    """Waits for the first step of an optimizer that trains a model; then it follows that one.

    While it waits the model holds it, and nobody else: a model that is never trained goes, and this goes with it.
    """

    def __init__(self, model: nn.Module, compressor: Compressor) -> None:
        self.model, self.compressor = model, compressor
        self.found = False
        self.hold = model.register_forward_pre_hook(self.nothing)
        own = weakref.ref(self)

        def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            waiting = own()
            if waiting is not None:
                waiting.look(optimizer)

        self.handle = register_optimizer_step_pre_hook(look)
        weakref.finalize(self, self.handle.remove)

    def nothing(self, module: nn.Module, args: Any) -> None:
        """What holds it does nothing."""

    def look(self, optimizer: torch.optim.Optimizer) -> None:
        """Follow the optimizer if it trains the model."""
        own = {id(parameter) for parameter in self.model.parameters()}
        held = (parameter for group in optimizer.param_groups for parameter in group["params"])
        if not self.found and any(id(parameter) in own for parameter in held):
            self.found = True
            self.hold.remove()
            optimizer.register_step_post_hook(self.stepped)

    def stepped(self, *_: Any) -> None:
        """The optimizer has made a step."""
        self.handle.remove()  # not earlier: while they are called, the list of hooks must stay as it is
        self.compressor.step()
