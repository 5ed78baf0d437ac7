"""The training and evaluation modes of a model's modules, put back after something else set them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["in_mode", "modes_kept"]


@contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Whatever happens to the modes inside, afterwards every module is in the mode it was in."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Every module is in one mode inside, and afterwards in the mode it was in.

    The flags themselves are set: a ``train()`` of the user's own (that keeps norms frozen) has no say.

    Args:
        model: The model.
        training: Training mode; False is evaluation mode.
    """
    with modes_kept(model):
        for module in model.modules():
            module.training = training
        yield
