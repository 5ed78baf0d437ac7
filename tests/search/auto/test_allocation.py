"""Greedy allocation against all counts that there are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from dwindle.graph.analysis import analyse
from dwindle.graph.counts import Counts
from dwindle.realize.cost import CostModel
from dwindle.search.auto.allocation import (
    greedy_counts,
    importance_harm,
    scaled_counts,
    uniform_counts,
)
from dwindle.search.space import Space


def _space(widths: Sequence[int] = (6, 5, 4)) -> tuple[Space, CostModel]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = 3
    for width in widths:
        layers += [nn.Linear(channels, width), nn.ReLU()]
        channels = width
    model = nn.Sequential(*layers, nn.Linear(channels, 2))
    analysis = analyse(model, (torch.randn(2, 3),), {})
    return Space.of(analysis, largest_ratio=0.85), CostModel.of(analysis)


def _every_count(space: Space) -> list[Counts]:
    ranges = [range(v.least, v.size + 1) for v in space.variables]
    return [
        {v.axis: count for v, count in zip(space.variables, counts, strict=True)}
        for counts in itertools.product(*ranges)
    ]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_within_the_limits_and_near_the_best(share: float, seed: int) -> None:
    space, cost = _space()
    generator = torch.Generator().manual_seed(seed)
    scores = {v.axis: torch.rand(v.size, generator=generator, dtype=torch.float64) for v in space.variables}
    harm = importance_harm(scores)
    limit = share * cost.macs({})

    def over(counts: Counts) -> list[float]:
        return [cost.macs(counts) / limit]

    def total(counts: Counts) -> float:
        return sum(harm(v, counts[v.axis]) for v in space.variables)

    found = greedy_counts(space, harm, over)
    assert found is not None
    assert over(found)[0] <= 1
    best = min(total(counts) for counts in _every_count(space) if over(counts)[0] <= 1)
    worst = total(space.smallest())
    assert total(found) <= best + 0.15 * (worst - best)
    for variable in space.variables:  # nothing that fits was left
        if found[variable.axis] < variable.size:
            assert over({**found, variable.axis: found[variable.axis] + 1})[0] > 1


def test_all_limits_hold_together() -> None:
    space, cost = _space((16, 16))
    harm = importance_harm({v.axis: torch.arange(1.0, v.size + 1).double() for v in space.variables})
    limits = {"macs": 0.6 * cost.macs({}), "params": 0.4 * cost.elements({})}

    def over(counts: Counts) -> list[float]:
        return [cost.cost(name, counts) / most for name, most in limits.items()]

    found = greedy_counts(space, harm, over)
    assert found is not None
    assert max(over(found)) <= 1
    even = uniform_counts(space, over)
    assert even is not None
    assert max(over(even)) <= 1


def test_out_of_reach_is_none() -> None:
    space, _ = _space()
    assert greedy_counts(space, lambda variable, count: 0.0, lambda counts: [2.0]) is None
    assert uniform_counts(space, lambda counts: [2.0]) is None


def test_a_staircase_of_the_runtime_is_passed() -> None:
    """Time falls only at multiples of 8, the last step above the limit: no single narrow step saves anything."""
    space, _ = _space((32, 32))

    def over(counts: Counts) -> list[float]:
        return [sum(-(-counts[v.axis] // 8) for v in space.variables) / 5]

    harm = importance_harm({v.axis: torch.ones(v.size).double() for v in space.variables})
    widths = {v.name: [8, 16, 24, 32] for v in space.variables}
    found = greedy_counts(space, harm, over, widths)
    assert found is not None
    assert sorted(found[v.axis] for v in space.variables) in ([16, 24], [8, 32])


def _odd_is_slow(space: Space, counts: Counts) -> float:
    """Widths that are no multiples of 8 take three times as long: the narrowest model is not the fastest."""
    return sum(counts[v.axis] * (1 if counts[v.axis] % 8 == 0 else 3) for v in space.variables)


def test_the_smallest_model_need_not_be_the_fastest() -> None:
    space, _ = _space((32, 32))
    harm = importance_harm({v.axis: torch.ones(v.size).double() for v in space.variables})
    least = space.smallest()
    limit = 24.0

    def over(counts: Counts) -> list[float]:
        return [_odd_is_slow(space, counts) / limit]

    assert max(over(least)) > 1
    widths = {v.name: [8, 16, 24, 32] for v in space.variables}
    found = greedy_counts(space, harm, over, widths)
    assert found is not None
    assert sorted(found[v.axis] for v in space.variables) == [8, 16]
    even = uniform_counts(space, over, widths)
    assert even is not None
    assert max(over(even)) <= 1


def test_scaled_ratios_stay_in_proportion() -> None:
    space, cost = _space((100, 100))
    first, second = space.variables

    def over(counts: Counts) -> list[float]:
        return [cost.macs(counts) / (0.5 * cost.macs({}))]

    found = scaled_counts(
        space, {first.name: 1.0, second.name: 0.5}, over, {v.name: range(1, 101) for v in space.variables}
    )
    assert found is not None
    gone = [1 - found[v.axis] / v.size for v in (first, second)]
    assert gone[0] == pytest.approx(2 * gone[1], abs=0.03)
    assert 0.45 <= over(found)[0] * 0.5 <= 0.5


def test_scaled_ratios_reach_the_smallest_model() -> None:
    """The axis that loses most has come to its end long before the other one: that one goes on."""
    space, cost = _space((100, 100))
    first, second = space.variables
    smallest = space.counts({v.name: v.largest_ratio for v in space.variables})

    def over(counts: Counts) -> list[float]:
        return [cost.macs(counts) / (1.1 * cost.macs(smallest))]

    found = scaled_counts(
        space, {first.name: 1.0, second.name: 0.1}, over, {v.name: range(1, 101) for v in space.variables}
    )
    assert found is not None
    assert over(found)[0] <= 1
