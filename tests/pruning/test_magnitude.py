"""Magnitude as in NNCF: one threshold over all layers, each in units of its Euclidean norm; gradual blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dwindle.pruning import AGPPruner, LevelPruner, MagnitudePruner
from pruning.training_runs import network, train, zeros


@pytest.mark.parametrize("ratio", [0.0, 0.123, 0.5, 0.77, 0.99])
def test_one_threshold_for_all_layers_to_one_weight(ratio: float) -> None:
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(100)
    names = ["0", "3", "4"]
    config = [{"op_names": names, "sparse_ratio": ratio, "global_group_id": 1, "max_sparse_ratio": 1.0}]
    weights = [model.get_submodule(name).weight.detach().double().numpy() for name in names]
    scaled = np.concatenate([(np.abs(weight) / np.sqrt((weight**2).sum())).ravel() for weight in weights])
    count = int(scaled.size * ratio)
    gone = np.zeros(scaled.size, dtype=bool)
    gone[np.argsort(scaled, kind="stable")[:count]] = True
    _, masks = MagnitudePruner(model, config).compress()
    flat = np.concatenate(
        [
            masks[name]["weight"].numpy().ravel() if count else np.ones(w.size)
            for name, w in zip(names, weights, strict=True)
        ]
    )
    assert np.array_equal(flat == 0, gone)
    assert int((flat == 0).sum()) == count


def test_large_numbers_do_not_decide() -> None:
    """Without the norm the layer with small numbers would lose everything it may."""
    masked = {}
    for kind in (LevelPruner, MagnitudePruner):
        model = network()
        with torch.no_grad():
            model[0].weight.mul_(100)
        kind(model, [{"op_names": ["0", "3"], "sparse_ratio": 0.5, "global_group_id": 1}]).compress()
        masked[kind] = zeros_of(model[0])
    assert masked[LevelPruner] <= 2
    assert 20 < masked[MagnitudePruner] < 108


def zeros_of(module: nn.Module) -> int:
    return int((module.weight == 0).sum())


def test_a_layer_of_zeros_is_no_division_by_zero() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight.zero_()
    _, masks = MagnitudePruner(
        model, [{"op_names": ["0", "3"], "sparse_ratio": 0.25, "global_group_id": 1}]
    ).compress()
    assert sum(int((mask["weight"] == 0).sum()) for mask in masks.values()) == 96


def test_gradual_block_pruning() -> None:
    model = network()
    config = [{"op_names": ["0", "3"], "sparse_ratio": 0.75, "granularity": [4, 4], "global_group_id": 1}]
    pruner = AGPPruner(MagnitudePruner(model, config), interval_steps=2, total_times=5)
    shares: list[int] = []
    train(
        model,
        pruner,  # type: ignore[arg-type]
        14,
        watch=lambda step: shares.append(zeros_of(model[0]) + zeros_of(model[3])),
    )
    blocks = [int(24 * 0.75 * (1 - (1 - min(step // 2, 5) / 5) ** 3) + 1e-9) for step in range(1, 15)]
    assert shares == [16 * count for count in blocks]
    assert zeros(model, "0.weight") + zeros(model, "3.weight") == 16 * 18
