"""ADMM against the paper: the three updates in NumPy, the projection by brute force, exact ratios."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import dwindle as dw
from dwindle.config import Target
from dwindle.config.errors import ConfigError
from dwindle.pruning import ADMMPruner
from dwindle.training import compress
from pruning.models import Residual, lively
from pruning.training_runs import check_resume, network, train, zeros


def keep_largest(values: np.ndarray, count: int) -> np.ndarray:
    flat = values.ravel().copy()
    flat[np.argsort(np.abs(flat), kind="stable")[: flat.size - count]] = 0
    return flat.reshape(values.shape)


def test_every_iteration_in_numpy() -> None:
    """Exact gradients of a least-squares problem: W, Z and U after every step, in float64."""
    steps, interval, rho, rate = 24, 4, 0.05, 0.2
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(40, 6)), generator.normal(size=(40, 5))
    weight = generator.normal(size=(5, 6))
    model = nn.Linear(6, 5, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(weight))
    pruner = ADMMPruner(
        model,
        [{"op_types": ["Linear"], "sparse_ratio": 0.6}],
        training_steps=steps,
        interval_steps=interval,
        rho=rho,
    )
    split, dual = keep_largest(weight, 12), np.zeros((5, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    own = Target("", "weight")
    with compress(model, [pruner]) as run:
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            (functional.mse_loss(model(torch.from_numpy(x)), torch.from_numpy(y)) + run.loss()).backward()
            optimizer.step()
            run.step()
            gradient = 2 * (x @ weight.T - y).T @ x / y.size + rho * (weight - split + dual)
            weight = weight - rate * gradient
            if step == steps:
                break
            if step % interval == 0:
                split = keep_largest(weight + dual, 12)
                dual = dual + weight - split
            np.testing.assert_allclose(pruner.split[own].numpy(), split, rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(pruner.dual[own].numpy(), dual, rtol=1e-10, atol=1e-12)
            assert pruner.residuals()["weight"] == pytest.approx(
                np.linalg.norm(weight - split) / np.linalg.norm(weight)
            )
    np.testing.assert_allclose(model.weight.detach().numpy(), keep_largest(weight, 12), rtol=1e-10)


@pytest.mark.parametrize("granularity", ["out_channel", [2, 3], "2:4"])
def test_the_projection_is_the_nearest_sparse_point(granularity: Any) -> None:
    width = 4 if granularity == "2:4" else 6
    model = nn.Linear(width, 4)
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5, "granularity": granularity}]
    pruner = ADMMPruner(model, config, training_steps=4, interval_steps=1)
    value = torch.randn(4, width, dtype=torch.float64)
    target = Target("", "weight")
    projected = pruner.projected({target: value})[target]
    blocks = pruner.plan.goals[target].granularity
    count = blocks.block_count((4, width))
    nearest = np.inf
    for chosen in itertools.combinations(range(count), count // 2):
        keep = torch.zeros(count, dtype=torch.float64)
        keep[list(chosen)] = 1
        if granularity == "2:4" and not bool((keep.reshape(4, 4).sum(1) == 2).all()):
            continue
        mask = blocks.expand(keep.reshape(blocks.block_shape((4, width))), (4, width))
        nearest = min(nearest, float((value - value * mask).norm()))
    assert float((value - projected).norm()) == pytest.approx(nearest)
    kept = projected != 0
    assert torch.equal(projected[kept], value[kept])


def test_the_weights_become_sparse_by_themselves() -> None:
    model = network()
    config = [{"op_names": ["0", "3"], "sparse_ratio": 0.5}]
    pruner = ADMMPruner(model, config, training_steps=120, interval_steps=10, rho={"0": 1.0, "3": 1.0})
    far: list[float] = []

    def watch(step: int) -> None:
        if step in (9, 119):
            far.append(max(pruner.residuals().values()))

    losses = train(model, pruner, 130, watch=watch)
    assert far[1] < far[0] / 3
    assert zeros(model, "0.weight") == 64
    assert zeros(model, "3.weight") == 128
    assert losses[-1] < 0.5
    assert pruner.loss() == 0.0
    assert not pruner.split


def test_channels_are_realized_with_proof() -> None:
    model = lively(Residual())
    x = torch.randn(8, 3, 6, 6)
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "granularity": "out_channel"}]
    pruner = ADMMPruner(model, config, (x,), training_steps=6, interval_steps=2)
    train(model, pruner, 7, batch=(x, torch.arange(8) % 5), rate=0.02)
    result = dw.realize(model, (x,))
    assert result.verification.max_difference < 1e-9
    assert result.model.stem.out_channels == 4
    assert result.model.expand.out_channels == 8


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    def make(model: nn.Module) -> ADMMPruner:
        config = [{"op_names": ["0", "3"], "sparse_ratio": 0.5}]
        return ADMMPruner(model, config, training_steps=20, interval_steps=5, rho=0.1)

    check_resume(make, tmp_path / "state")


def test_errors() -> None:
    model = network()
    config = [{"op_names": ["0"], "sparse_ratio": 0.5}]
    with pytest.raises(ConfigError, match="no iteration"):
        ADMMPruner(model, config, training_steps=5, interval_steps=5)
    with pytest.raises(ConfigError, match=r"rho of 0\.weight"):
        ADMMPruner(model, config, training_steps=5, interval_steps=1, rho=0.0)
    with pytest.raises(ConfigError, match="no target is in '7'"):
        ADMMPruner(model, config, training_steps=5, interval_steps=1, rho={"0": 0.1, "7": 0.1})
