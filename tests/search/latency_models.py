"""A small net, and clocks that compute times of ONNX models by a law instead of measuring them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from dwindle.search.latency_prediction.kernel_times import KernelTime


class Net(nn.Module):
    """Convolutions with a residual addition and a concatenation, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 48, 3, padding=1)
        self.norm = nn.BatchNorm2d(48)
        self.inner = nn.Conv2d(48, 32, 3, padding=1)
        self.outer = nn.Conv2d(32, 48, 3, padding=1)
        self.side = nn.Conv2d(48, 24, 1)
        self.both = nn.Conv2d(72, 40, 1)
        self.hidden = nn.Linear(40, 64)
        self.last = nn.Linear(64, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.norm(self.first(images)))
        features = features + self.outer(torch.relu(self.inner(features)))
        features = torch.cat([features, torch.relu(self.side(features))], 1)
        features = torch.relu(self.both(features)).mean((2, 3))
        return self.last(torch.relu(self.hidden(features)))


def net() -> Net:
    """Return the net with random weights, in evaluation mode."""
    torch.manual_seed(0)
    return Net().eval()


def images(batch: int = 2) -> torch.Tensor:
    """Return random images."""
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


#: Seconds from output channels, input channels and positions of a convolution or product.
Law = Callable[[int, int, int], float]


def by_macs(outputs: int, inputs: int, positions: int) -> float:
    """A nanosecond for each multiply-accumulate."""
    return 1e-9 * outputs * inputs * positions


def in_blocks(outputs: int, inputs: int, positions: int) -> float:
    """Blocks of 16 channels, and twice as slow for widths that are no multiple of 4."""
    blocks = math.ceil(outputs / 16) * math.ceil(inputs / 16) * 256
    return 1e-9 * blocks * positions * (2 if outputs % 4 or inputs % 4 else 1)


def seconds_of(model: Any, law: Law) -> float:
    """Return the time of an ONNX model by a law, from the weights of its convolutions and products."""
    weights = {entry.name: list(entry.dims) for entry in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in weights:
            weights[node.output[0]] = weights[node.input[0]]
    total = 0.0
    for node in model.graph.node:
        dims = weights.get(node.input[1]) if len(node.input) > 1 else None
        if node.op_type == "Conv" and dims:
            total += law(dims[0], dims[1], 64 * dims[2] * dims[3])
        elif node.op_type == "Gemm" and dims:
            total += law(dims[0], dims[1], 1)
        elif node.op_type == "MatMul" and dims:
            total += law(dims[1], dims[0], 1)
    return total


class LawfulLayers:
    """Times layers by a law, and counts how many."""

    def __init__(self, law: Law) -> None:
        self.law = law
        self.calls = 0
        self.identity = {"runtime": "law", "version": "1", "threads": 1}

    def __call__(self, model: Any, feed: Mapping[str, np.ndarray]) -> KernelTime:
        onnx.checker.check_model(model)
        self.calls += 1
        return KernelTime(seconds_of(model, self.law))


class LawfulModels:
    """Times whole models by the law: what layers take, 1.3 times, and a constant."""

    def __init__(self, law: Law, constant: float = 1e-5) -> None:
        self.law, self.constant = law, constant

    def __call__(self, models: Sequence[Any], feeds: Sequence[Mapping[str, np.ndarray]]) -> list[float]:
        return [self.constant + 1.3 * seconds_of(model, self.law) for model in models]
