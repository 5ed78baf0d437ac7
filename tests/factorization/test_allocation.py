"""The allocation against brute force, and its bound."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dwindle.config.errors import ConfigError
from dwindle.factorization import Choices, allocate


def problem(seed: int, layers: int, choices: int) -> list[Choices]:
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(layers):
        costs = np.append(generator.integers(1, 50, choices), 60).astype(float)
        losses = np.append(generator.random(choices), 0.0)  # neither sorted nor convex
        made.append(Choices(costs, losses))
    return made


@pytest.mark.parametrize("seed", range(12))
def test_nothing_within_the_budget_loses_less(seed: int) -> None:
    layers = problem(seed, 4, 6)
    least = sum(float(own.costs.min()) for own in layers)
    budget = least + 10 * seed
    best = min(
        sum(own.losses[pick] for own, pick in zip(layers, picks, strict=True))
        for picks in itertools.product(range(7), repeat=4)
        if sum(own.costs[pick] for own, pick in zip(layers, picks, strict=True)) <= budget
    )
    found = allocate(layers, budget)
    assert found.loss == pytest.approx(best, abs=1e-12)
    assert found.cost <= budget
    assert found.bound <= best + 1e-9
    assert found.cost == sum(own.costs[pick] for own, pick in zip(layers, found.choices, strict=True))


def test_all_that_is_affordable_is_bought_and_nothing_else() -> None:
    layers = problem(0, 3, 4)
    whole = allocate(layers, 1e9)
    assert whole.loss == 0
    least = sum(float(own.costs.min()) for own in layers)
    assert allocate(layers, least).cost == least
    with pytest.raises(ConfigError, match="cannot be met"):
        allocate(layers, least - 1)


def test_many_layers_come_as_near_as_the_bound_says() -> None:
    generator = np.random.default_rng(0)
    layers = []
    for _ in range(20):
        losses = np.cumsum(np.sort(generator.random(60) ** 4))[::-1]
        price = float(generator.integers(100, 9000))
        layers.append(Choices(np.append(np.arange(1, 61) * price, 36 * price), np.append(losses, 0.0)))
    found = allocate(layers, sum(float(own.costs[-1]) for own in layers) * 0.5)
    assert 0 <= found.loss - found.bound <= 0.01 * found.loss
