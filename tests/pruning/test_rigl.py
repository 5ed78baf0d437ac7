"""RigL against the paper: ERK, the cosine, drop and grow step by step in NumPy, and counts that never change."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import dwindle as dw
from dwindle.config.errors import ConfigError
from dwindle.pruning import LevelPruner, RigLPruner
from dwindle.pruning.rigl import erdos_renyi_kernel, moved_share, regrown
from dwindle.training import compress
from pruning.training_runs import check_resume, network, train, zeros

CONFIG: list[dict[str, Any]] = [{"op_names": ["0", "3", "4"], "sparse_ratio": 0.7}]


def test_erk_is_proportional_until_a_layer_is_dense() -> None:
    shapes = [(64, 3, 3, 3), (128, 64, 3, 3), (10, 128), (16, 4)]
    sizes = [math.prod(shape) for shape in shapes]
    densities = erdos_renyi_kernel(shapes, 0.1)
    assert sum(d * n for d, n in zip(densities, sizes, strict=True)) == pytest.approx(0.1 * sum(sizes))
    dense = [d == 1 for d in densities]
    assert dense == [False, False, True, True]
    factors = [
        d * math.prod(shape) / sum(shape)
        for d, shape, full in zip(densities, shapes, dense, strict=True)
        if not full
    ]
    assert factors == pytest.approx([factors[0]] * 2)
    assert erdos_renyi_kernel(shapes, 1.0) == pytest.approx([1.0] * 4)
    assert erdos_renyi_kernel(shapes, 0.0) == [0.0] * 4


def test_the_share_that_moves() -> None:
    assert [moved_share(step, 80, 0.3) for step in (0, 40, 80, 90)] == pytest.approx([0.3, 0.15, 0, 0])
    assert moved_share(20, 80, 0.3) == pytest.approx(0.15 * (1 + math.sqrt(0.5)))


def reference_update(
    magnitude: np.ndarray, gradient: np.ndarray, active: np.ndarray, count: int
) -> np.ndarray:
    """One update, index by index."""
    ranked = sorted(np.flatnonzero(active), key=lambda i: (magnitude[i], i))
    kept = set(ranked[count:])
    others = sorted((i for i in range(active.size) if i not in kept), key=lambda i: (-gradient[i], i))
    return np.array([i in kept or i in others[:count] for i in range(active.size)])


def test_drop_and_grow() -> None:
    generator = np.random.default_rng(0)
    for count in (0, 1, 5, 9):
        active = generator.permutation(30) < 12
        magnitude, gradient = generator.random(30), generator.random(30)
        expected = reference_update(magnitude, gradient, active, count)
        tensors = [torch.from_numpy(array) for array in (magnitude, gradient, active)]
        result = regrown(*tensors, count)
        assert np.array_equal(result.numpy(), expected)
        assert int(result.sum()) == 12


def test_a_run_step_by_step() -> None:
    """A linear layer under a squared error: masks and weights after every step as in a float64 reference."""
    steps, interval, rate = 40, 4, 0.3
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(50, 12)), generator.normal(size=(50, 8))
    weight = generator.normal(size=(8, 12))
    model = nn.Linear(12, 8, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(weight))
    pruner = RigLPruner(
        model,
        [{"op_types": ["Linear"], "sparse_ratio": 0.7}],
        training_steps=steps,
        interval_steps=interval,
        end_share=0.75,
    )
    inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
    with compress(model, [pruner]) as run:
        mask = pruner.masks[""]["weight"].numpy().copy()
        assert int((mask == 0).sum()) == int(96 * 0.7)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
            run.step()
            gradient = 2 * ((x @ (weight * mask).T) - y).T @ x / y.size
            weight = weight - rate * gradient * mask
            if step % interval == 0 and step < 30:
                share = 0.15 * (1 + math.cos(math.pi * step / 30))
                active = mask.ravel() > 0
                count = int(share * active.sum())
                after = reference_update(
                    np.abs(weight).ravel(), np.abs(gradient).astype(np.float32).ravel(), active, count
                )
                weight = np.where((after & ~active).reshape(8, 12), 0, weight)
                mask = after.reshape(8, 12).astype(float)
            assert np.array_equal(pruner.masks[""]["weight"].numpy(), mask), step
            raw = model._parameters["weight"]
            assert raw is not None
            np.testing.assert_allclose(raw.detach().numpy(), weight, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(model.weight.detach().numpy(), weight * mask, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("distribution", ["erk", "config"])
def test_counts_are_exact_all_the_time(distribution: Any) -> None:
    model = network()
    pruner = RigLPruner(
        model, CONFIG, training_steps=30, interval_steps=3, first_share=0.5, distribution=distribution
    )
    seen: list[list[int]] = []
    moved: list[torch.Tensor] = []

    def watch(step: int) -> None:
        seen.append([int((pruner.masks[name]["weight"] == 0).sum()) for name in ("0", "3", "4")])
        moved.append(pruner.masks["3"]["weight"].clone())

    losses = train(model, pruner, 40, watch=watch)
    assert all(counts == seen[0] for counts in seen)
    if distribution == "erk":
        densities = erdos_renyi_kernel([(16, 8), (16, 16), (4, 16)], 0.3)
        for gone, density, count in zip(seen[0], densities, (128, 256, 64), strict=True):
            assert abs(count - gone - density * count) < 1
        assert sum(seen[0]) == int(448 * 0.7)
    else:
        assert seen[0] == [int(128 * 0.7), int(256 * 0.7), int(64 * 0.7)]
    assert not torch.equal(moved[1], moved[2])  # the first update is after three steps
    assert torch.equal(moved[0], moved[1])
    assert torch.equal(moved[22], moved[-1])  # none in the last quarter
    assert losses[-1] < losses[0]
    assert zeros(model, "3.weight") == seen[0][1]


def test_blocks_and_a_trained_start() -> None:
    model = network()
    weight = model[3].weight.detach().clone()
    config = [{"op_names": ["3"], "sparse_ratio": 0.5, "granularity": [4, 4]}]
    pruner = RigLPruner(model, config, training_steps=12, interval_steps=4, start="magnitude")
    strength = weight.reshape(4, 4, 4, 4).abs().sum((1, 3))
    with compress(model, [pruner]):
        kept = pruner.active(next(iter(pruner.plan.goals)))
        assert int(kept.sum()) == 8
        assert strength[kept].min() > strength[~kept].max()
        pruner.finish()
    pruner = RigLPruner(network(), config, training_steps=12, interval_steps=4)
    train(pruner.model, pruner, 12)
    blocks = dict(pruner.model.named_parameters())["3.weight"].reshape(4, 4, 4, 4).abs().sum((1, 3))
    assert int((blocks == 0).sum()) >= 8
    assert pruner.report().rows[0].achieved == 0.5


def test_what_was_masked_before_is_never_grown() -> None:
    model = network()
    LevelPruner(model, [{"op_names": ["3"], "sparse_ratio": 0.25}]).compress()
    earlier = next(iter(dw.simulate.get_masks(model).values())) == 0
    pruner = RigLPruner(
        model,
        [{"op_names": ["3"], "sparse_ratio": 0.5}],
        training_steps=20,
        interval_steps=2,
        first_share=1.0,
    )
    train(model, pruner, 20)
    assert bool((model[3].weight[earlier] == 0).all())
    assert pruner.report().rows[0].achieved == 0.5


def test_realized_with_proof() -> None:
    """Channels that lost all their connections are cut."""
    model = network(hidden=32)
    config = [{"op_names": ["0", "3", "4"], "sparse_ratio": 0.95}]
    pruner = RigLPruner(model, config, training_steps=10, interval_steps=3, distribution="config")
    train(model, pruner, 12)
    result = dw.realize(model, (torch.randn(4, 8),))
    assert result.verification.max_difference < 1e-9
    assert result.model[3].out_features < 32


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    def make(model: nn.Module) -> RigLPruner:
        return RigLPruner(model, CONFIG, training_steps=22, interval_steps=2, end_share=0.9)

    check_resume(make, tmp_path / "state")


def test_errors() -> None:
    model = network()
    with pytest.raises(ConfigError, match="single weights or blocks"):
        RigLPruner(model, [{**CONFIG[0], "granularity": "out_channel"}], training_steps=5)
    with pytest.raises(ConfigError, match="several"):
        RigLPruner(
            model,
            [{"op_names": ["0"], "sparse_ratio": 0.3}, {"op_names": ["3"], "sparse_ratio": 0.4}],
            training_steps=5,
        )
    with pytest.raises(ConfigError, match="magnitude"):
        RigLPruner(model, CONFIG, training_steps=5, start="magnitud")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="first_share"):
        RigLPruner(model, CONFIG, training_steps=5, first_share=1.5)
    with pytest.raises(ConfigError, match="sparse_ratio"):
        RigLPruner(model, [{"op_names": ["0"], "sparse_threshold": 0.1}], training_steps=5)
