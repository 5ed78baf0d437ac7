"""Models that the tests of the config select from."""

from __future__ import annotations

import torch
from torch import nn


class SubLinear(nn.Linear):
    """A subclass, as people write them."""


class Scaled(nn.Module):
    """A module with parameters of its own names."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.mixing = nn.Parameter(torch.ones(4, 4))
        self.register_buffer("offset", torch.zeros(4))

    def forward(self, x, scale=None, *, shift=None):
        return x


class Small(nn.Module):
    """NNI's SimpleTorchModel in small."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 8, 3, groups=4)
        self.up = nn.ConvTranspose2d(8, 6, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6, bias=index < 2), nn.ReLU()) for index in range(12)
        )
        self.fc1 = SubLinear(6, 5)
        self.fc2 = nn.Linear(5, 3)
        self.scaled = Scaled()

    def forward(self, x):
        return x


class Shared(nn.Module):
    """One module object under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.body = nn.Sequential(nn.Linear(3, 3), self.first)

    def forward(self, x):
        return self.body(self.first(x))
