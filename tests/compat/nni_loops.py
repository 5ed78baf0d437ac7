"""Models, data and training loops as NNI's documents have them, at the size of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Padded(nn.Module):
    """Padded convolutions with norms, a residual sum: like a small ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(12)
        self.conv3 = nn.Conv2d(12, 12, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.relu(self.bn2(self.conv2(x)))
        x = functional.relu(x + self.bn3(self.conv3(x)))
        return self.fc(x.mean((2, 3)))


def padded(seed: int = 0) -> Padded:
    torch.manual_seed(seed)
    model = Padded()
    with torch.no_grad():
        for norm in (model.bn1, model.bn2, model.bn3):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
            norm.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr, operator]
    return model


def batches(
    shape: tuple[int, ...] = (3, 8, 8), classes: int = 4
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        yield (
            torch.randn(4, *shape, generator=generator),
            torch.randint(0, classes, (4,), generator=generator),
        )


DUMMY = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def training_step(batch: Any, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    x, y = batch
    return functional.cross_entropy(model(x), y)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    training_step: Callable[..., Any],
    lr_scheduler: Any,
    max_steps: int | None,
    max_epochs: int | None,
) -> None:
    """NNI 3.0's training function."""
    model.train()
    steps = 0
    for _ in range(max_epochs or (10**6 if max_steps else 2)):
        for batch in batches():
            optimizer.zero_grad()
            loss = training_step(batch, model)
            loss.backward()
            optimizer.step()
            steps += 1
            if max_steps and steps >= max_steps:
                return
        if lr_scheduler is not None:
            lr_scheduler.step()


def training_func(
    model: nn.Module,
    optimizers: torch.optim.Optimizer,
    criterion: Callable[..., torch.Tensor],
    lr_schedulers: Any = None,
    max_steps: int | None = None,
    max_epochs: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """NNI 2.10's training function."""
    train(
        model,
        optimizers,
        lambda batch, model: criterion(model(batch[0]), batch[1]),
        lr_schedulers,
        max_steps,
        max_epochs,
    )


def trainer(
    model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Callable[..., torch.Tensor]
) -> None:
    """The trainer of NNI 2.0 to 2.8: one epoch."""
    training_func(model, optimizer, criterion, max_epochs=1)


def finetuner(model: nn.Module) -> None:
    trainer(model, torch.optim.SGD(model.parameters(), lr=0.01), functional.cross_entropy)


def evaluate(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches())
    return 100.0 * hits / 24
