"""A compressor that writes down what a framework does with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Counting:
    """Its loss is ``strength * scale**2`` of one parameter of its own, which an optimizer therefore moves."""

    def __init__(self, model: nn.Module, strength: float = 0.5) -> None:
        self.model, self.strength = model, strength
        self.scale = nn.Parameter(torch.ones(()))
        self.steps, self.losses = 0, 0
        self.gradients: list[float] = []
        self.scale.register_hook(lambda gradient: self.gradients.append(float(gradient)))

    def step(self) -> None:
        self.steps += 1

    def loss(self) -> Tensor:
        self.losses += 1
        return self.strength * self.scale.square()

    def parameters(self) -> Iterator[nn.Parameter]:
        yield self.scale

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "scale": self.scale.detach().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        with torch.no_grad():
            self.scale.copy_(state["scale"])

    def detach(self) -> None:
        pass
