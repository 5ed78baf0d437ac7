"""Two processes that see different batches score axes as one process does that sees all of them."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.graph import analyse
from dwindle.pruning import Activation, AxisImportance, Fisher, Hessian, Outputs, Taylor
from dwindle.pruning.shared_axes import shared_axes

IMPORTANCES: dict[str, AxisImportance] = {
    "taylor": Taylor(normalize="none"),
    "fisher": Fisher(normalize="none"),
    "hessian": Hessian(normalize="none"),
    "activation": Activation(normalize="none"),
    "outputs": Outputs(normalize="none"),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    return nn.Sequential(layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double().eval()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(2, 2, 6, 6, generator=generator, dtype=torch.float64),
            torch.randint(3, (2,), generator=generator),
        )
        for _ in range(5)
    ]


def scores(data: list[tuple[Tensor, Tensor]]) -> dict[str, list[Tensor]]:
    """Scores of every axis by every importance."""
    model = network()
    analysis = analyse(model, (data[0][0],))
    axes = shared_axes(model, analysis, analysis.selected())
    tensors = {name: own.detach() for name, own in model.named_parameters()}
    found = {}
    for name, importance in IMPORTANCES.items():
        importance.measure(model, axes, data, nn.functional.cross_entropy)
        found[name] = [importance.of_axis(axis, tensors) for axis in axes]
    return found


def work(number: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=number, world_size=2)
    try:
        # three batches here, two there
        torch.save(scores(batches()[number::2]), Path(folder) / f"{number}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(work, args=(port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(2))
    whole: dict[str, Any] = scores(batches())
    for name in IMPORTANCES:
        for ours, theirs, wanted in zip(first[name], second[name], whole[name], strict=True):
            assert torch.equal(ours, theirs)
            if name != "outputs":  # whose random directions are others in each process
                torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-15)
    assert all(len(own) == 2 for own in whole.values())
