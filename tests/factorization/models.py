"""Small models of the tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """Convolutions, a grouped one, attention, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.conv2 = nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False)
        self.pointwise = nn.Conv2d(24, 32, 1)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.unused = nn.Linear(32, 32)
        self.head = nn.Linear(32, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.norm(self.conv1(x)))))
        x = torch.relu(self.pointwise(torch.relu(self.conv2(x)))).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.second(torch.relu(self.first(x))).mean(1))


class Reader(nn.Module):
    """Asks for the weight of a layer at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(24, 32), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.relu(self.inner(x)).to(self.outer.weight.dtype))


def perceptron(width: int = 24) -> nn.Sequential:
    """Three linear layers; makes the same model for ``dw.load``."""
    return nn.Sequential(
        nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 8)
    )


def network() -> Network:
    """The network, in evaluation mode."""
    torch.manual_seed(0)
    return Network().eval()
