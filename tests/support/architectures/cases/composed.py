"""A module from a function and named parts, so that a case is a few lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from support.architectures.example import Example


class Composed(nn.Module):
    """Holds named parts (modules, parameters, buffers, numbers); ``function(self, *inputs)`` is the forward pass."""

    def __init__(self, function: Callable[..., Any], /, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def parameter(*sizes: int) -> nn.Parameter:
    """A parameter of small random numbers."""
    return nn.Parameter(torch.randn(*sizes) * 0.3)


def on_vectors(function: Callable[..., Any] | nn.Module, width: int = 6, /, **parts: Any) -> Example:
    """A case whose input is (2, width)."""
    return _example(function, parts, torch.randn(2, width))


def on_sequences(
    function: Callable[..., Any] | nn.Module, width: int = 6, length: int = 4, /, **parts: Any
) -> Example:
    """A case whose input is (2, length, width)."""
    return _example(function, parts, torch.randn(2, length, width))


def on_images(
    function: Callable[..., Any] | nn.Module, channels: int = 3, size: int = 8, /, **parts: Any
) -> Example:
    """A case whose input is (2, channels, size, size)."""
    return _example(function, parts, torch.randn(2, channels, size, size))


def _example(
    function: Callable[..., Any] | nn.Module, parts: dict[str, Any], *inputs: torch.Tensor
) -> Example:
    model = function if isinstance(function, nn.Module) else Composed(function, **parts)
    return Example(model, inputs)
