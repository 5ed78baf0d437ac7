"""From plain data to a model: a start, steps that fit one another, and a head."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import nn

from support.architectures.example import Example
from support.random_graphs import awkward, general, images, tokens
from support.random_graphs.step import STEPS, Inapplicable, Step, channels

STARTS = ("image", "tokens", "vector", "words")


@dataclass(frozen=True, slots=True)
class Specification:
    """A random model as plain data.

    Attributes:
        start: Layout of the input.
        steps: Names of steps, each with the seed of its choices; those that do not fit are left out.
        seed: Of the parameters.
    """

    start: str
    steps: tuple[tuple[str, int], ...]
    seed: int = 0


class RandomNetwork(nn.Module):
    """A stem, the steps, and a head; every tensor on the way can be used again later."""

    def __init__(self, stem: nn.Module, steps: list[Step], head: nn.Module) -> None:
        super().__init__()
        self.stem, self.steps, self.head = stem, nn.ModuleList(steps), head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        saved: list[torch.Tensor] = []
        for own in self.steps:
            saved.append(x)
            x = own(x, saved)
        if x.dim() == 4:
            x = x.mean((2, 3))
        return self.head(x)


def build(specification: Specification) -> Example:
    """Build the model of a specification with its inputs."""
    torch.manual_seed(specification.seed)
    pick = random.Random(specification.seed)
    size = pick.choice([8, 12])
    stem: nn.Module
    if specification.start == "image":
        stem, x = nn.Conv2d(3, size, 3, padding=1), torch.randn(2, 3, 4, 4)
    elif specification.start == "tokens":
        stem, x = nn.Linear(5, size), torch.randn(2, 6, 5)
    elif specification.start == "words":
        stem, x = nn.Embedding(11, size), torch.randint(11, (2, 6))
    else:
        stem, x = nn.Linear(7, size), torch.randn(2, 7)
    steps: list[Step] = []
    saved: list[torch.Tensor] = []
    with torch.no_grad():
        y = stem(x)
        for name, seed in specification.steps:
            try:
                own = STEPS[name](tuple(y.shape), random.Random(seed)).eval()
            except Inapplicable:
                continue
            saved.append(y)
            y = own(y, saved)
            steps.append(own)
    model = RandomNetwork(stem, steps, nn.Linear(channels(tuple(y.shape)), 3))
    _randomise(model)
    return Example(model.eval(), (x,))


def _randomise(model: nn.Module) -> None:
    """Norms and running statistics away from ones and zeros."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and bool((tensor == tensor.flatten()[0]).all()):
                tensor.add_(torch.rand_like(tensor) * 0.5 + 0.1)


__all__ = [
    "STARTS",
    "STEPS",
    "RandomNetwork",
    "Specification",
    "awkward",
    "build",
    "general",
    "images",
    "tokens",
]
