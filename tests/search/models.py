"""A small convnet with a residual block, and a score that needs no labels: how near outputs stay to the original's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class Tiny(nn.Module):
    """Five axes: stem (coupled over the residual), inner, wide, hidden, and one that no other layer shares."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, 2 * width, 3, padding=1, stride=1)
        self.back = nn.Conv2d(2 * width, width, 1)
        self.wide = nn.Conv2d(width, 3 * width, 3, padding=1, stride=2)
        self.hidden = nn.Linear(3 * width, 2 * width)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        x = functional.relu(x + self.back(functional.relu(self.inner(x))))
        x = functional.relu(self.wide(x)).mean((2, 3))
        return self.head(functional.relu(self.hidden(x)))


def tiny(seed: int = 0) -> Tiny:
    """A model whose channels differ much in importance, so that choices matter."""
    torch.manual_seed(seed)
    model = Tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                scale = torch.rand(parameter.shape[0]).square() * 2
                parameter.mul_(scale.reshape(-1, *[1] * (parameter.dim() - 1)))
    return model.eval()


def images(count: int = 16) -> Tensor:
    """Fixed random images."""
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def nearness(model: nn.Module) -> Callable[[nn.Module], float]:
    """A score in (0, 1]: 1 where outputs equal those of ``model`` as it is now."""
    data = images()
    with torch.no_grad():
        wanted = copy.deepcopy(model).eval()(data)

    def score(small: nn.Module) -> float:
        error = (small(data) - wanted).square().mean() / wanted.var(0).mean()
        return float(1 / (1 + error))

    return score
