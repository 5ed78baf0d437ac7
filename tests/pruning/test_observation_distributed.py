"""Two processes that see different batches find the same masks, those that one process finds with all of them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.pruning import (
    ActivationAPoZRankPruner,
    ActivationMeanRankPruner,
    CHIPPruner,
    HRankPruner,
    OBDPruner,
    ObservingPruner,
    SNIPPruner,
    SparseGPTPruner,
    SynFlowPruner,
    TaylorPruner,
    TransformerHeadPruner,
    WandaPruner,
)
from dwindle.training import compress
from pruning.models import Attention, Residual, lively

Batch = tuple[Tensor, Tensor]
IMAGES, TOKENS = (4, 3, 8, 8), (4, 5, 24)


class Reader(nn.Module):
    """An attention block before a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Attention(), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))


def network(shape: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(3)
    return lively(Residual() if shape is IMAGES else Reader()).double().eval()


def batches(shape: tuple[int, ...], count: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(shape, generator=generator, dtype=torch.float64),
            torch.randint(0, 5, (shape[0],), generator=generator),
        )
        for _ in range(count)
    ]


CHANNELS = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "granularity": "out_channel"}]
WEIGHTS = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.6, "granularity": "element"}]
Make = Callable[..., Any]

#: Pruners by what they run over: data that each process has its own part of.
MAKERS: dict[str, tuple[Make, list[dict[str, Any]] | float, tuple[int, ...], dict[str, Any]]] = {
    "apoz": (ActivationAPoZRankPruner, CHANNELS, IMAGES, {}),
    "mean": (ActivationMeanRankPruner, CHANNELS, IMAGES, {"activation": "gelu"}),
    "hrank": (HRankPruner, CHANNELS, IMAGES, {}),
    "chip": (CHIPPruner, CHANNELS, IMAGES, {"samples": 1}),
    "taylor": (TaylorPruner, WEIGHTS, IMAGES, {}),
    "gates": (TaylorPruner, CHANNELS, IMAGES, {"on": "gates"}),
    "outputs": (TaylorPruner, CHANNELS, IMAGES, {"on": "outputs"}),
    "fisher": (OBDPruner, WEIGHTS, IMAGES, {}),
    "snip": (SNIPPruner, WEIGHTS, IMAGES, {}),
    "wanda": (WandaPruner, WEIGHTS, IMAGES, {}),
    "sparse_gpt": (SparseGPTPruner, WEIGHTS, IMAGES, {}),
    "sparse_gpt in passes": (SparseGPTPruner, WEIGHTS, IMAGES, {"memory": 1}),
    "heads": (TransformerHeadPruner, 0.5, TOKENS, {"criterion": "taylor"}),
    "head activations": (TransformerHeadPruner, 0.5, TOKENS, {"criterion": "l2_activation"}),
}


def one_shot(name: str, data: list[Batch]) -> dict[str, Tensor]:
    kind, config, shape, options = MAKERS[name]
    model = network(shape)
    return flat(kind(model, config, (batches(shape)[0][0],), data=data, **options).compress()[1])


def flat(masks: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{module}.{name}": own.clone() for module, named in masks.items() for name, own in named.items()}


def watched(
    pruner: ObservingPruner, model: nn.Module, wrapped: nn.Module, data: list[Batch]
) -> dict[str, Tensor]:
    """Train and watch; the masks come after as many steps as there are batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with compress(model, [pruner]) as run:
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(wrapped(x), y).backward()
            optimizer.step()
            run.step()
        return flat(pruner.masks)


def trained(kind: Make, options: dict[str, Any], data: list[Batch], parallel: bool) -> dict[str, Tensor]:
    model = network(IMAGES)
    pruner = kind(model, CHANNELS, (batches(IMAGES)[0][0],), training_steps=len(data), **options)
    wrapped = nn.parallel.DistributedDataParallel(model) if parallel else model
    return watched(pruner, model, wrapped, data)


TRAINED: dict[str, tuple[Make, dict[str, Any]]] = {
    "taylor": (TaylorPruner, {}),
    "apoz": (ActivationAPoZRankPruner, {}),
}


class Forked(nn.Module):
    """Each process uses another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) if bool(x[0, 0] > 0) else self.right(x)


def forked(data: list[Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(7)
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
    return flat(ActivationMeanRankPruner(Forked(), config, data=data, activation="relu").compress()[1])


def halves() -> list[Tensor]:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    x[0, 0] = 1
    return [x, x * torch.tensor([-1.0] + [1.0] * 5)]


def failure(rank: int) -> str:
    """What each process says when the data of one of them end early."""
    model = network(IMAGES)
    pruner = TaylorPruner(model, CHANNELS, data=batches(IMAGES)[: 2 - rank], batches=2)
    try:
        pruner.compress()
    except ConfigError as error:
        return f"config: {error}"
    except DwindleError as error:
        return f"other: {error}"
    return "no error"


def worker(rank: int, port: int, directory: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        found: dict[str, Any] = {}
        for name, (_, _, shape, _) in MAKERS.items():
            found[name] = one_shot(name, batches(shape)[rank::2])
        for name, (kind, options) in TRAINED.items():
            half = slice(2 * rank, 2 * rank + 2)
            data = [(x[half], y[half]) for x, y in batches(IMAGES)]
            found[f"trained {name}"] = trained(kind, options, data, parallel=True)
        found["hutchinson"] = flat(
            OBDPruner(
                network(IMAGES), WEIGHTS, data=batches(IMAGES)[rank::2], curvature="hutchinson"
            ).compress()[1]
        )
        found["synflow"] = flat(
            SynFlowPruner(network(IMAGES), WEIGHTS, (batches(IMAGES)[0][0],), iterations=3).compress()[1]
        )
        found["forked"] = forked([halves()[rank]])
        found["failure"] = failure(rank)
        torch.save(found, Path(directory) / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    directory = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(worker, (free_port(), str(directory)), nprocs=2)
    return [torch.load(directory / f"{rank}.pt") for rank in range(2)]


def check_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert list(first) == list(second)
    assert first
    for name, mask in first.items():
        assert torch.equal(mask, second[name]), name
    assert any(bool((mask == 0).any()) for mask in first.values())


@pytest.mark.parametrize("name", MAKERS)
def test_one_shot(name: str, found: list[dict[str, Any]]) -> None:
    check_equal(found[0][name], found[1][name])
    check_equal(found[0][name], one_shot(name, batches(MAKERS[name][2])))


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_run(name: str, found: list[dict[str, Any]]) -> None:
    kind, options = TRAINED[name]
    check_equal(found[0][f"trained {name}"], found[1][f"trained {name}"])
    check_equal(found[0][f"trained {name}"], trained(kind, options, batches(IMAGES), parallel=False))


@pytest.mark.parametrize("name", ["hutchinson", "synflow"])
def test_random_directions_and_no_data(name: str, found: list[dict[str, Any]]) -> None:
    check_equal(found[0][name], found[1][name])


def test_a_layer_that_only_one_process_used(found: list[dict[str, Any]]) -> None:
    check_equal(found[0]["forked"], found[1]["forked"])
    check_equal(found[0]["forked"], forked(halves()))


def test_data_that_end_early_in_one_process_stop_both(found: list[dict[str, Any]]) -> None:
    assert (
        found[0]["failure"]
        == "other: the model could not be observed in another process; see the error there"
    )
    assert found[1]["failure"].startswith("config: data ended after 1 of 2 batches")
