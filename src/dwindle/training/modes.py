"""The training and evaluation modes of a model's modules, put back after something else set them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["modes_kept"]


@contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Whatever happens to the modes inside, afterwards every module is in the mode it was in."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
