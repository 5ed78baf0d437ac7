"""Small models with what pruning must respect: residual adds, groups, depthwise convolutions, heads, norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Simple(nn.Module):
    """The model of NNI's pruner tests, with fewer pixels: two branches that are added, one of them grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, groups=4)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(16, 32, 3)
        self.bn3 = nn.BatchNorm2d(32)
        self.fc1 = nn.Linear(32 * 4 * 4, 100)
        self.fc2 = nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.relu(self.bn2(self.conv2(x)) + self.bn3(self.conv3(x)))
        x = x.reshape(x.shape[0], -1)
        return functional.log_softmax(self.fc2(functional.relu(self.fc1(x))), -1)


class Residual(nn.Module):
    """A residual block between a stem and a head, with depthwise convolution inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.expand = nn.Conv2d(8, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.depthwise_norm = nn.BatchNorm2d(16)
        self.project = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        inner = functional.relu(self.depthwise_norm(self.depthwise(functional.relu(self.expand(x)))))
        x = functional.relu(x + self.project(inner))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Four heads of width six, a feed-forward pair, two LayerNorms."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = 4, 6
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.query, self.key, self.value = (nn.Linear(24, 24) for _ in range(3))
        self.out = nn.Linear(24, 24)
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        y = self.norm1(x)
        shape = (batch, length, self.heads, self.width)
        split = [m(y).reshape(shape).transpose(1, 2) for m in (self.query, self.key, self.value)]
        attended = functional.scaled_dot_product_attention(*split)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, self.heads * self.width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


def lively(model: nn.Module) -> nn.Module:
    """Give norms numbers that no mistake can hide behind: shifts, scales and statistics unlike 0 and 1."""
    generator = torch.Generator().manual_seed(11)
    for module in model.modules():
        for name in ("running_mean", "running_var", "weight", "bias"):
            value = getattr(module, name, None)
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm) and isinstance(value, Tensor):
                with torch.no_grad():
                    value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return model
