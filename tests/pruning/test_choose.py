"""Global ranking against a search of all possible choices, and FPGM against the loop over all pairs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from dwindle.pruning.importance import fpgm
from dwindle.pruning.sparsity import RankedUnits, choose, smallest


@pytest.mark.parametrize("count", [0, 1, 37, 99, 100, 200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_smallest_breaks_ties_by_place_in_every_dtype(count: int, dtype: torch.dtype) -> None:
    values = torch.randint(0, 12, (10, 10)).to(dtype)
    order = values.reshape(-1).float().argsort(stable=True)[:count]
    expected = torch.zeros(100, dtype=torch.bool)
    expected[order] = True
    assert torch.equal(smallest(values, count).reshape(-1), expected)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.75, 0.999, 1.0])
@pytest.mark.parametrize("count", [1, 7, 64])
def test_what_stays_is_above_what_goes(ratio: float, count: int) -> None:
    metric = torch.randn(count)
    (keep,) = choose([RankedUnits("a", metric, ratio=ratio)])
    assert int((~keep).sum()) == int(count * ratio)
    if 0 < int((~keep).sum()) < count:
        assert metric[keep].min() > metric[~keep].max()


def best_by_search(sets: list[RankedUnits], goal: int) -> float:
    """The smallest sum of removed metrics over all allowed choices that remove exactly ``goal`` units.

    Within one set an optimal choice takes the smallest, so the counts of each set are all there is to search.
    """
    ranges = []
    for units in sets:
        low, high = units.bounds()
        if units.maximum is None:
            high = units.count - 1
        ranges.append(range(low, high + 1))
    totals = [np.concatenate([[0], np.cumsum(np.sort(units.metric.double().numpy()))]) for units in sets]
    return min(
        sum(total[count] for total, count in zip(totals, counts, strict=True))
        for counts in itertools.product(*ranges)
        if sum(counts) == goal
    )


@pytest.mark.parametrize("seed", range(20))
def test_global_ranking_with_bounds_equals_the_search_of_all_counts(seed: int) -> None:
    generator = np.random.default_rng(seed)
    sets = []
    for index in range(3):
        count = int(generator.integers(4, 14))
        low = float(generator.choice([0.0, 0.2, 0.3]))
        high = float(generator.choice([0.6, 0.8, 1.0]))
        metric = torch.tensor(generator.random(count) * float(generator.choice([0.01, 1.0, 5.0])))
        bounds = {"minimum": low or None, "maximum": None if high == 1 else high}
        sets.append(RankedUnits(f"set {index}", metric, ratio=0.5, group="g", **bounds))
    goal = int(sum(units.count for units in sets) * 0.5)
    keeps = choose(sets)
    assert sum(int((~keep).sum()) for keep in keeps) == goal
    for units, keep in zip(sets, keeps, strict=True):
        gone = int((~keep).sum())
        assert math.ceil(units.count * (units.minimum or 0) - 1e-9) <= gone
        assert gone <= units.count * (units.maximum or 1) + 1e-9
        assert gone < units.count
    removed = sum(float(units.metric[~keep].sum()) for units, keep in zip(sets, keeps, strict=True))
    assert removed == pytest.approx(best_by_search(sets, goal), rel=1e-6)


@pytest.mark.parametrize(("shape", "dim"), [((7, 5, 3, 3), 0), ((6, 9), 1), ((1, 4), 0), ((2000, 3), 0)])
def test_fpgm_equals_the_loop_over_all_pairs(shape: tuple[int, ...], dim: int) -> None:
    weight = torch.randn(shape)
    rows = np.moveaxis(weight.double().numpy(), dim, 0).reshape(shape[dim], -1)
    expected = np.array([sum(np.linalg.norm(row - other) for other in rows) for row in rows[:50]])
    np.testing.assert_allclose(fpgm(weight, dim).numpy()[:50], expected, rtol=1e-6)
