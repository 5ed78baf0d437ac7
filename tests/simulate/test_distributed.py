"""Two processes train a masked model together: same gradients as one process, masked entries stay zero."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from torch import nn

from dwindle.config import Target
from dwindle.simulate import attach_mask, detach

STEPS = 3


def network() -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    attach_mask(model, Target("0", "weight"), (torch.arange(8) % 2).reshape(8, 1))
    attach_mask(model, Target("0", "bias"), torch.arange(8) % 2)
    attach_mask(model, Target("2", "_input_0"), (torch.arange(8) % 3 > 0))
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(8, 2, generator=generator, dtype=torch.float64)


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def worker(rank: int, port: int, directory: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        model = network()
        x, y = batch()
        half = slice(4 * rank, 4 * rank + 4)
        train(nn.parallel.DistributedDataParallel(model), x[half], y[half])
        torch.save(detach(model).state_dict(), Path(directory) / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (free_port(), str(tmp_path)), nprocs=2)
    alone = network()
    train(alone, *batch())
    expected = detach(alone).state_dict()
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for state in states:
        assert list(state) == list(expected) == ["0.weight", "0.bias", "2.weight", "2.bias"]
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)
            assert torch.equal(state[name], states[0][name])
        assert torch.equal(state["0.weight"][::2], torch.zeros(4, 6, dtype=torch.float64))
        assert (state["0.weight"][1::2] != 0).all()
