"""What tests of training pruners share: a small task, a loop, and the proof that a run can be resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dwindle.pruning import Pruner
from dwindle.training import TrainingOptions, compress, fit


def classes(count: int = 64, width: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs and the class that a fixed random layer gives them."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, width, generator=generator)
    return x, (x @ torch.randn(width, 4, generator=generator)).argmax(1)


def network(width: int = 8, hidden: int = 16) -> nn.Sequential:
    """Two linear layers and a norm; always the same values."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.Linear(hidden, 4),
    )


def train(
    model: nn.Module,
    pruner: Pruner,
    steps: int,
    *,
    batch: tuple[Tensor, Tensor] | None = None,
    rate: float = 0.1,
    watch: Callable[[int], Any] | None = None,
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
) -> list[float]:
    """Train inside ``dw.compress``; return the losses, the pruner's included. ``watch`` sees each step's number."""
    x, y = classes() if batch is None else batch
    updater = optimizer(model.parameters(), lr=rate)
    losses = []
    with compress(model, [pruner]) as run:
        run.add_parameters_to(updater)
        for step in range(1, steps + 1):
            loss = functional.cross_entropy(model(x), y) + run.loss()
            updater.zero_grad()
            loss.backward()
            updater.step()
            run.step()
            losses.append(float(loss.detach()))
            if watch is not None:
                watch(step)
    return losses


def check_resume(
    make: Callable[[nn.Module], Pruner],
    path: Path,
    epochs: int = 6,
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
) -> None:
    """A run that is killed after half of its epochs and taken up again ends bit by bit like one that is not."""
    x, y = classes()
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]

    class Killed(Exception):
        pass

    def run(checkpoint: Path | None, kill_at: int | None) -> dict[str, Tensor]:
        model = network()
        updater = optimizer(model.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.LambdaLR(updater, lambda step: 1 / (1 + 0.1 * step))
        calls = 0

        def evaluate(_: nn.Module) -> float:
            nonlocal calls
            calls += 1
            if calls == kill_at:
                raise Killed
            return 0.0

        fit(
            model,
            batches,
            updater,
            epochs=epochs,
            schedule=schedule,
            compressors=[make(model)],
            evaluate=evaluate,
            options=TrainingOptions(progress=False),
            checkpoint=checkpoint,
        )
        return {key: value.clone() for key, value in model.state_dict().items()}

    whole = run(None, None)
    with pytest.raises(Killed):
        run(path, epochs // 2 + 1)
    resumed = run(path, None)
    assert list(whole) == list(resumed)
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


def zeros(model: nn.Module, name: str) -> int:
    """Number of zeros in a parameter."""
    return int((dict(model.named_parameters())[name] == 0).sum())
