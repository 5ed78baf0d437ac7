"""What every step of a random model has: it is built for a shape, and runs on the tensor and the saved ones."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import nn

Shape = tuple[int, ...]


class Inapplicable(Exception):
    """The step cannot stand behind a tensor of this shape; it is left out."""


class Step(nn.Module):
    """One step. Sizes that the forward uses are attributes or read from shapes, as in users' code."""

    #: Number of dimensions of the tensors it takes.
    ranks: tuple[int, ...] = (2, 3, 4)

    def __init__(self, shape: Shape, pick: random.Random) -> None:
        super().__init__()
        if len(shape) not in self.ranks:
            raise Inapplicable
        self.build(shape, pick)

    def build(self, shape: Shape, pick: random.Random) -> None:
        raise NotImplementedError

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError


STEPS: dict[str, type[Step]] = {}


def step(name: str) -> Callable[[type[Step]], type[Step]]:
    """Register a step under a name."""

    def decorate(cls: type[Step]) -> type[Step]:
        STEPS[name] = cls
        return cls

    return decorate


def channels(shape: Shape) -> int:
    """Number of channels: dimension 1 of images, the last dimension of tokens and vectors."""
    return shape[1] if len(shape) == 4 else shape[-1]


def channel_dim(shape: Shape) -> int:
    """The dimension that ``channels`` counts."""
    return 1 if len(shape) == 4 else len(shape) - 1


def with_channels(shape: Shape, number: int) -> Shape:
    """``shape`` with another number of channels."""
    dim = channel_dim(shape)
    return (*shape[:dim], number, *shape[dim + 1 :])


def width(pick: random.Random) -> int:
    """A number of channels for a new layer."""
    return pick.choice([4, 6, 8, 12, 16])


def dense(shape: Shape, out: int, pick: random.Random) -> nn.Module:
    """A linear layer or 1x1 convolution from the channels of ``shape`` to ``out``."""
    bias = pick.random() < 0.7
    if len(shape) == 4:
        return nn.Conv2d(shape[1], out, 1, bias=bias)
    return nn.Linear(shape[-1], out, bias=bias)


def require(condition: bool) -> None:
    """Leave the step out unless ``condition`` holds."""
    if not condition:
        raise Inapplicable


def divisors(number: int) -> list[int]:
    """Divisors of ``number`` other than 1 and itself."""
    return [d for d in range(2, number) if number % d == 0]


def choose(items: list[int], pick: random.Random) -> int:
    """One of ``items``; the step is left out when there are none."""
    require(bool(items))
    return pick.choice(items)
