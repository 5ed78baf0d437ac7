"""Two processes, each with its part of the data: statistics are those of one process with all of it."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dwindle.training import adapt_normalization

WAYS: dict[str, dict[str, Any]] = {
    "values": {},
    "one by one": {"one_by_one": True},
    "batches": {"average": "batches"},
    "moving": {"average": 0.5},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    ).double()


def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 4, dtype=torch.float64, generator=generator) * 3 for size in (6, 9, 4, 5)]


def worker(rank: int, port: int, directory: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        found = {}
        for name, options in WAYS.items():
            model = nn.parallel.DistributedDataParallel(network())
            part = data()[:3] if rank == 0 else data()[3:]  # not the same number of batches
            adapt_normalization(model, part, **options)
            found[name] = {key: value.clone() for key, value in model.module.state_dict().items()}
        torch.save(found, Path(directory) / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = int(opened.getsockname()[1])
    torch.multiprocessing.spawn(worker, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, options in WAYS.items():
        for key, value in first[name].items():
            assert torch.equal(value, second[name][key]), (name, key)  # to the last bit
        model = network()
        if name == "moving":  # the mean of what each process comes to by itself
            parts = [network(), network()]
            for part, own in zip(parts, (data()[:3], data()[3:]), strict=True):
                adapt_normalization(part, own, **options)
            one, other = (own.state_dict() for own in parts)
            expected = {key: (one[key] + other[key]) / 2 for key in one if "running" in key}
        else:
            adapt_normalization(model, data(), **options)
            expected = {key: value for key, value in model.state_dict().items() if "running" in key}
        for key, value in expected.items():
            torch.testing.assert_close(first[name][key], value, rtol=1e-12, atol=1e-12, msg=f"{name} {key}")
