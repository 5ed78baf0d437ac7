"""SR-STE against the paper's update, step by step in NumPy; N:M and blocks that are exact after every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import dwindle as dw
from dwindle.config.errors import ConfigError
from dwindle.pruning import SRSTEPruner
from dwindle.training import LinearSchedule, compress
from pruning.models import Residual, lively
from pruning.training_runs import check_resume, network, train, zeros


def pattern(weight: np.ndarray, keep: int, window: int) -> np.ndarray:
    """Of every ``window`` neighbours in a row the ``keep`` largest."""
    mask = np.zeros_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], window):
            order = np.argsort(-np.abs(weight[row, start : start + window]), kind="stable")
            mask[row, start + order[:keep]] = 1
    return mask


@pytest.mark.parametrize(("keep", "window"), [(2, 4), (4, 8), (1, 4)])
def test_every_step_in_numpy(keep: int, window: int) -> None:
    """``W -= rate * (g(W * mask) + decay * (1 - mask) * W)`` with the mask of the present W, in float64."""
    steps, decay, rate = 20, 0.1, 0.3
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(40, 16)), generator.normal(size=(40, 5))
    weight = generator.normal(size=(5, 16))
    model = nn.Linear(16, 5, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(weight))
    config = [{"op_types": ["Linear"], "granularity": f"{keep}:{window}"}]
    pruner = SRSTEPruner(model, config, training_steps=steps, decay=decay)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    moved = 0
    with compress(model, [pruner]) as run:
        mask = pattern(weight, keep, window)
        for step in range(1, steps + 5):
            if step <= steps + 1:
                mask = pattern(weight, keep, window)
            assert np.array_equal(pruner.masks[""]["weight"].numpy(), mask)
            optimizer.zero_grad()
            (functional.mse_loss(model(torch.from_numpy(x)), torch.from_numpy(y)) + run.loss()).backward()
            optimizer.step()
            run.step()
            gradient = 2 * (x @ (weight * mask).T - y).T @ x / y.size
            if step <= steps:
                weight = weight - rate * (gradient + decay * (1 - mask) * weight)
            else:  # the masks stand: fine-tuning
                weight = weight - rate * gradient * mask
            raw = model._parameters["weight"]
            assert raw is not None
            np.testing.assert_allclose(raw.detach().numpy(), weight, rtol=1e-10, atol=1e-12)
            moved += int((pattern(weight, keep, window) != mask).sum())
    assert moved > 0
    assert pruner.finished
    assert zeros(model, "weight") == 80 * (window - keep) // window


@pytest.mark.parametrize("granularity", ["2:4", [4, 4], "element"])
def test_ratios_are_exact_after_every_step(granularity: Any) -> None:
    model = network()
    config = [{"op_names": ["0", "3"], "sparse_ratio": 0.5, "granularity": granularity}]
    schedule = None if granularity == "2:4" else LinearSchedule(0.0, 1.0, steps=10)
    pruner = SRSTEPruner(model, config, training_steps=20, schedule=schedule)
    size = 16 if granularity == [4, 4] else 1

    def watch(step: int) -> None:
        share = 1.0 if schedule is None else min(step / 10, 1.0)
        expected = int(256 / size * 0.5 * share + 1e-9) * size
        assert int((model[3].weight == 0).sum()) == expected

    losses = train(model, pruner, 25, watch=watch)
    assert losses[-1] < losses[0]
    assert zeros(model, "0.weight") == 64
    if granularity == "2:4":
        assert bool(((model[3].weight.reshape(16, 4, 4) != 0).sum(-1) == 2).all())


def test_channels_are_realized_with_proof() -> None:
    model = lively(Residual())
    x = torch.randn(8, 3, 6, 6)
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "granularity": "out_channel"}]
    pruner = SRSTEPruner(model, config, (x,), training_steps=4)
    train(model, pruner, 6, batch=(x, torch.arange(8) % 5), rate=0.02)
    result = dw.realize(model, (x,))
    assert result.verification.max_difference < 1e-9
    assert result.model.expand.out_channels == 8


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    config = [{"op_names": ["0", "3"], "granularity": "2:4"}]
    check_resume(lambda model: SRSTEPruner(model, config, training_steps=20, decay=1e-3), tmp_path / "state")


def test_errors() -> None:
    config = [{"op_names": ["0"], "granularity": "2:4"}]
    with pytest.raises(ConfigError, match="decay"):
        SRSTEPruner(network(), config, training_steps=5, decay=-1.0)
    with pytest.raises(ConfigError, match="multiple of 4"):
        SRSTEPruner(network(width=6), config, training_steps=5)
    with pytest.raises(ConfigError, match=r"2:4 means sparse_ratio 0\.5, not 0\.75"):
        SRSTEPruner(network(), [{"op_names": ["0"], "sparse_ratio": 0.75}], training_steps=5)
