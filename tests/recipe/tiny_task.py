"""A model and data that train in a moment, for the tests of recipes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def model(width: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(2 * width, 4),
    )


def _images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    images = torch.randn(count, 1, 6, 6, generator=generator)
    images += labels[:, None, None, None] * 1.5
    return images, labels


def labelled() -> dict[str, tuple[Tensor, Tensor]]:
    return {"train": _images(192, 0), "test": _images(96, 1)}


def unlabelled(count: int = 40) -> Tensor:
    return _images(count, 2)[0]


def add_noise(images: Tensor, generator: torch.Generator) -> Tensor:
    return images + 0.1 * torch.randn(images.shape, generator=generator)


RECIPE = """
name: tiny
seed: 3
threads: 1
model: tiny_task:model
data:
  name: tiny_task:labelled
  batch_size: 32
  augment: tiny_task:add_noise
stages:
  - train: {epochs: 4, learning_rate: 0.03}
  - prune: {ratio: 0.5}
  - finetune: {epochs: 4, learning_rate: 0.02}
  - quantize
  - measure: {runtimes: [torch, onnxruntime], repeats: 3, warmup: 1}
  - report
"""
