"""Two processes, each with half of every batch: the same masks in both, and those of one process with all of it."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dwindle.pruning import (
    ADMMPruner,
    AGPPruner,
    L0Pruner,
    MagnitudePruner,
    MovementPruner,
    RBPruner,
    RigLPruner,
    SlimPruner,
    SRSTEPruner,
)
from dwindle.training import compress
from pruning.training_runs import classes

STEPS = 12
CONFIG: list[dict[str, Any]] = [{"op_names": ["0", "2"], "sparse_ratio": 0.5}]
GROUP: list[dict[str, Any]] = [{"op_names": ["0", "2"], "sparse_ratio": 0.5, "global_group_id": 1}]
SPAN: dict[str, Any] = {"training_steps": 10}

PRUNERS: dict[str, Callable[[nn.Module], Any]] = {
    "movement": lambda model: MovementPruner(model, CONFIG, **SPAN, warmup_steps=2, learning_rate=0.5),
    "slim": lambda model: SlimPruner(model, GROUP, **SPAN, regular_scale=0.01),
    "rb": lambda model: RBPruner(model, CONFIG, **SPAN, learning_rate=1.0),
    "l0": lambda model: L0Pruner(model, CONFIG, **SPAN, learning_rate=1.0),
    "admm": lambda model: ADMMPruner(model, CONFIG, **SPAN, interval_steps=3, rho=0.1),
    "sr-ste": lambda model: SRSTEPruner(model, CONFIG, **SPAN),
    "rigl": lambda model: RigLPruner(model, CONFIG, **SPAN, interval_steps=2, end_share=1.0),
    "magnitude": lambda model: AGPPruner(MagnitudePruner(model, GROUP), 2, 4),
}


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def run_one(
    name: str, part: slice, wrap: Callable[[nn.Module], nn.Module], *, late: bool
) -> dict[str, Tensor]:
    """Train with one pruner; return the masks of every step and what is left at the end."""
    model = network()
    pruner = PRUNERS[name](model)
    x, y = classes()
    x, y = x.double()[part], y[part]
    wrapped = None if late else wrap(model)  # before the scores exist, or after
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    seen: dict[str, Tensor] = {}
    with compress(model, [pruner]) as run:
        wrapped = wrapped or wrap(model)
        run.add_parameters_to(optimizer)
        for step in range(STEPS):
            optimizer.zero_grad()
            (functional.cross_entropy(wrapped(x), y) + run.loss()).backward()
            optimizer.step()
            run.step()
            for module in (0, 2):
                seen[f"{step} {module}"] = (model[module].weight == 0).detach()  # type: ignore[index]
        for position, parameter in enumerate(pruner.parameters()):
            seen[f"own {position}"] = parameter.detach().clone()
    return seen | {key: value.clone() for key, value in model.state_dict().items()}


def worker(rank: int, port: int, directory: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # so few steps: scores stay behind
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        half = slice(32 * rank, 32 * rank + 32)
        for name in PRUNERS:
            torch.manual_seed(100 + rank)  # the processes' own generators differ
            for late in (False, True):
                seen = run_one(name, half, nn.parallel.DistributedDataParallel, late=late)
                torch.save(seen, Path(directory) / f"{name} {late} {rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("two processes")
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = int(opened.getsockname()[1])
    torch.multiprocessing.spawn(worker, (port, str(directory)), nprocs=2)
    return directory


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("name", list(PRUNERS))
def test_two_processes_equal_one(name: str, trained: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = run_one(name, slice(None), lambda model: model, late=False)
    gone = sum(int(alone[f"{STEPS - 1} {module}"].sum()) for module in (0, 2))
    assert gone == (128 + 256) // 2
    for late in (False, True):
        first, second = (torch.load(trained / f"{name} {late} {rank}.pt") for rank in range(2))
        assert list(first) == list(second) == list(alone)
        for key, value in first.items():
            assert torch.equal(value, second[key]), key  # to the last bit
            if value.dtype == torch.bool:
                assert torch.equal(value, alone[key]), key
            else:
                torch.testing.assert_close(value, alone[key], rtol=1e-4, atol=1e-5, msg=key)
