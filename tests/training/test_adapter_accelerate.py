"""The adapter for Accelerate, on the real library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dwindle as dw
from dwindle.config.errors import ConfigError, FileFormatError
from dwindle.pruning import MovementPruner
from support.counting_compressor import Counting

pytest.importorskip("accelerate")

from accelerate import Accelerator

from dwindle.training import Staged
from dwindle.training.adapters import follow_accelerator


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def batches() -> Any:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long()), batch_size=4)


def train(
    model: nn.Module,
    compressor: Any,
    folder: Path,
    *,
    accumulation: int = 1,
    save: bool = False,
    skip: int = 0,
) -> Any:
    """The loop of Accelerate's own documentation, with the three lines of the adapter."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    with dw.compress(model, [compressor]) as run:
        followed = follow_accelerator(accelerator, run, optimizer, schedule)
        prepared, ready, loader, steps = accelerator.prepare(model, optimizer, batches(), schedule)
        if skip:
            accelerator.load_state(str(folder))
        for number, (x, y) in enumerate(loader):
            if number < skip:
                continue
            with accelerator.accumulate(prepared):
                loss = nn.functional.cross_entropy(prepared(x), y) + followed.loss()
                accelerator.backward(loss)
                ready.step()
                steps.step()
                ready.zero_grad()
                followed.step()
            if save and number == 3:
                accelerator.save_state(str(folder))
    return optimizer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_loss_parameters_and_steps(accumulation: int, tmp_path: Path) -> None:
    model = network()
    counting = Counting(model)
    optimizer = train(model, counting, tmp_path, accumulation=accumulation)
    assert counting.steps == 8 // accumulation
    assert counting.losses == 8
    assert sum(counting.gradients[:accumulation]) == pytest.approx(1.0)
    assert float(counting.scale.detach()) < 1
    assert optimizer.param_groups[1]["lr"] == optimizer.param_groups[0]["lr"] < 0.1


@pytest.mark.parametrize("begin", [0, 2])
def test_a_resumed_training_ends_with_the_same_bits(tmp_path: Path, begin: int) -> None:
    def pruner(model: nn.Module) -> Staged:
        config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
        return Staged(MovementPruner(model, config, training_steps=6, learning_rate=0.05), start=begin)

    whole, resumed = network(), network()
    train(whole, pruner(whole), tmp_path, save=True)
    train(resumed, pruner(resumed), tmp_path, skip=4)
    assert all(
        torch.equal(mine, other) for mine, other in zip(whole.parameters(), resumed.parameters(), strict=True)
    )
    assert int((whole[0].weight == 0).sum()) == 16


def test_what_cannot_work_says_so(tmp_path: Path) -> None:
    model, other = network(), network()
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = dw.compress(model, [Counting(model)])
    with pytest.raises(ConfigError, match="enter the run first"):
        follow_accelerator(accelerator, run, optimizer)
    with run, pytest.raises(ConfigError, match="none of the 1 optimizers"):
        follow_accelerator(accelerator, run, torch.optim.SGD(other.parameters(), 0.1))
    prepared = accelerator.prepare(network())
    accelerator.save_state(str(tmp_path))
    with dw.compress(model, [Counting(model)]) as entered:
        follow_accelerator(accelerator, entered, optimizer)
        accelerator.prepare(prepared)
        with pytest.raises(FileFormatError, match="written without these compressors"):
            accelerator.load_state(str(tmp_path))
