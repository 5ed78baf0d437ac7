"""Quantization-aware training in two processes: both have the same model and the same ranges in the end."""

import os
import socket
from pathlib import Path

import pytest
import torch
from torch import nn

import dwindle as dw
from dwindle.quantization import QuantizationStages, TrainingQuantizer

METHODS = ("qat", "lsq", "lsq_plus")


def train(method: str, rank: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
    data = torch.randn(6, 4, 2, 6, 6, generator=torch.Generator().manual_seed(rank))
    stages = QuantizationStages(activations=2, watch=2)
    quantizer = TrainingQuantizer(
        model, calibration_data=list(data[:1]), method=method, bits=4, stages=stages
    )
    with dw.compress(model, [quantizer]) as run:
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        run.add_parameters_to(optimizer)
        for batch in data:
            optimizer.zero_grad()
            wrapped(batch).square().mean().backward()
            optimizer.step()
            run.step()
    return {
        key: value
        for key, value in model.state_dict().items()
        if "running" not in key and "num_batches" not in key
    }


def worker(rank: int, port: int, directory: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for method in METHODS:
            torch.save(train(method, rank), Path(directory) / f"{method} {rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_agree(tmp_path: Path) -> None:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = int(opened.getsockname()[1])
    torch.multiprocessing.spawn(worker, (port, str(tmp_path)), nprocs=2)
    for method in METHODS:
        first, second = (torch.load(tmp_path / f"{method} {rank}.pt") for rank in range(2))
        assert any("_dwindle.quantization" in key for key in first)
        for key, value in first.items():
            assert torch.equal(value, second[key]), key
