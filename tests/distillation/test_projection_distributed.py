"""Two processes, each with half of every batch: learned projections are those of one process with all of it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dwindle.distillation import Distiller
from dwindle.training import compress

CONFIG = [{"op_names": ["0"], "apply_method": "hint", "lambda": 0.5}]


def network(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).double()


def run_one(part: slice, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
    """Train with a hint; return the student and the projection."""
    model, teacher = network(5, 0), network(7, 1)
    x = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    distiller = Distiller(model, CONFIG, teacher=teacher, logits_weight=1.0, example_inputs=x)
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    with compress(model, [distiller]) as run:
        run.add_parameters_to(optimizer)
        for _ in range(6):
            optimizer.zero_grad()
            (wrapped(x[part]).square().mean() + run.loss()).backward()
            optimizer.step()
            run.step()
    own = {f"projection {number}": own.detach().clone() for number, own in enumerate(distiller.parameters())}
    return own | {key: value.clone() for key, value in model.state_dict().items()}


def worker(rank: int, port: int, directory: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        seen = run_one(slice(8 * rank, 8 * rank + 8), nn.parallel.DistributedDataParallel)
        torch.save(seen, Path(directory) / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = int(opened.getsockname()[1])
    torch.multiprocessing.spawn(worker, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = run_one(slice(None), lambda model: model)
    assert {tuple(own.shape) for name, own in alone.items() if "projection" in name} == {(7, 5), (7,)}
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name  # bit for bit across processes
        torch.testing.assert_close(first[name], value, rtol=1e-9, atol=1e-11)
