"""Choosing units: exact counts, ties, thresholds, bounds and global rankings, against brute force."""

from __future__ import annotations

import math
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.pruning import sparsity
from dwindle.pruning.sparsity import RankedUnits, choose, pattern_keep, smallest


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(0, 45))
def test_smallest_is_a_stable_sort(values: list[int], count: int) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    chosen = np.zeros(len(values), dtype=bool)
    chosen[np.argsort(values, kind="stable")[:count]] = True
    np.testing.assert_array_equal(smallest(tensor, count), chosen)


@pytest.mark.parametrize("shape", ["random", "constant", "two values", "sorted"])
def test_sampling_gives_the_same_as_looking_at_all(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 300_000
    values = {
        "random": torch.randn(n),
        "constant": torch.ones(n),
        "two values": (torch.arange(n) % 2).float(),
        "sorted": torch.arange(n).float(),
    }[shape]
    for count in (1, 17, n // 3, n - 1):
        expected = smallest(values, count)
        monkeypatch.setattr(sparsity, "_MANY", 1000)
        chosen = smallest(values, count)
        monkeypatch.undo()
        assert int(chosen.sum()) == count
        assert torch.equal(chosen, expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.floats(0, 1))
def test_a_ratio_removes_exactly_its_count(n: int, ratio: float) -> None:
    (keep,) = choose([RankedUnits("x", torch.randn(n), ratio=ratio)])
    nearest = round(n * ratio)
    rounding = abs(n * ratio - nearest) < 1e-9  # 0.29 * 100 is 28.999999999999996, and means 29
    assert int((~keep).sum()) == (nearest if rounding else int(n * ratio))


def test_ratio_is_clipped_by_bounds() -> None:
    metric = torch.arange(10.0)
    for ratio, low, high, gone in [
        (0.9, None, 0.5, 5),
        (0.1, 0.3, None, 3),
        (0.2, 0.1, 0.5, 2),
        (0, 0.25, None, 3),
    ]:
        (keep,) = choose([RankedUnits("x", metric, ratio=ratio, minimum=low, maximum=high)])
        assert torch.equal(keep, metric >= gone)


def test_threshold_keeps_what_reaches_it_within_bounds() -> None:
    metric = torch.tensor([3.0, 1, 2, 4])
    assert choose([RankedUnits("x", metric, threshold=2)])[0].tolist() == [True, False, True, True]
    assert choose([RankedUnits("x", metric, threshold=9, maximum=0.5)])[0].tolist() == [
        True,
        False,
        False,
        True,
    ]
    assert choose([RankedUnits("x", metric, threshold=-1, minimum=0.25)])[0].tolist() == [
        True,
        False,
        True,
        True,
    ]
    assert choose([RankedUnits("x", metric, threshold=0)])[0].all()


def test_parts_lose_the_same_share_each() -> None:
    metric = torch.tensor([0.0, 1, 2, 3, 10, 11, 12, 13])
    (keep,) = choose([RankedUnits("x", metric, ratio=0.5, parts=2)])
    assert keep.tolist() == [False, False, True, True] * 2
    with pytest.raises(ConfigError, match="internal_metric_block"):
        choose([RankedUnits("x", metric, ratio=0.5, parts=3)])


def test_global_ranking_is_one_ranking() -> None:
    a, b = torch.rand(7, 3), torch.rand(4, 6)
    keep = choose([RankedUnits("a", a, ratio=0.4, group=1), RankedUnits("b", b, ratio=0.4, group=1)])
    pooled = np.concatenate([a.numpy().ravel(), b.numpy().ravel()])
    border = np.sort(pooled)[int(45 * 0.4)]
    assert torch.equal(keep[0], a >= float(border))
    assert torch.equal(keep[1], b >= float(border))


def test_nnis_emptied_layer_is_bounded_by_max_and_min() -> None:
    # Two Linear(64, 64), one scaled by 0.01: NNI empties it whatever the bounds say.
    small, large = torch.rand(4096) * 0.01, torch.rand(4096) + 1
    for low, high, expected in [
        (None, 0.8, (0.8, 0.2)),
        (0.2, None, (0.8, 0.2)),
        (None, None, (1 - 1 / 4096, 1 / 4096)),
    ]:
        sets = [
            RankedUnits(name, metric, ratio=0.5, group="g", minimum=low, maximum=high)
            for name, metric in (("small", small), ("large", large))
        ]
        shares = [float((~keep).float().mean()) for keep in choose(sets)]
        assert shares == pytest.approx(expected, abs=1e-3)
        assert sum(shares) == pytest.approx(1, abs=1 / 4096)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 12),
            st.integers(1, 5),
            st.sampled_from([0, 0.25, 0.5]),
            st.sampled_from([0.5, 0.75, 1]),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([0, 0.3, 0.5, 0.7]),
    st.integers(0, 1000),
)
def test_global_bounds_hold_and_the_goal_is_not_exceeded(
    layers: list[tuple[int, int, float, float]], ratio: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sets = [
        RankedUnits(
            str(i),
            torch.rand(n, generator=generator),
            elements=e,
            ratio=ratio,
            minimum=low,
            maximum=high,
            group=0,
        )
        for i, (n, e, low, high) in enumerate(layers)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unreachable goals
        kept = choose(sets)
    forced = removed = 0
    for units, keep in zip(sets, kept, strict=True):
        gone = int((~keep).sum())
        low, high = math.ceil(units.count * units.minimum), math.floor(units.count * units.maximum)
        assert min(low, high) <= gone <= high
        assert torch.equal(~keep, smallest(units.metric, gone))  # the least important of each layer
        forced += min(low, high) * units.elements
        removed += gone * units.elements
    goal = int(sum(u.count * u.elements for u in sets) * ratio)
    assert removed <= max(goal, forced)


def test_global_ratio_counts_weights_not_blocks() -> None:
    sets = [
        RankedUnits("wide", torch.tensor([1.0, 4, 5]), elements=10, ratio=0.5, group=0),
        RankedUnits("narrow", torch.tensor([2.0, 3, 6, 7, 8]), elements=2, ratio=0.5, group=0),
    ]
    kept = choose(sets)  # 40 weights, 20 go: 10 + 2 + 2 = 14, the next block of 10 would be 24
    assert kept[0].tolist() == [False, True, True]
    assert kept[1].tolist() == [False, False, True, True, True]


def test_different_ratios_in_one_group_and_nan_are_errors() -> None:
    with pytest.raises(ConfigError, match="same sparse_ratio"):
        choose(
            [
                RankedUnits("a", torch.ones(3), ratio=0.5, group=1),
                RankedUnits("b", torch.ones(3), ratio=0.4, group=1),
            ]
        )
    with pytest.raises(DwindleError, match="a is not a number"):
        choose([RankedUnits("a", torch.tensor([1.0, float("nan")]), ratio=0.5)])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_pattern_keeps_the_largest_of_each_window(n: int, m: int) -> None:
    metric = torch.rand(3, 16, 2)
    keep = pattern_keep(metric, 1, n, m)
    for i in range(3):
        for k in range(2):
            for start in range(0, 16, m):
                window = metric[i, start : start + m, k].numpy()
                best = set(np.argsort(-window, kind="stable")[:n].tolist())
                assert {j for j in range(m) if keep[i, start + j, k]} == best


def test_ten_million_weights_are_ranked_in_seconds() -> None:
    a, b = torch.randn(6_000_000).abs(), torch.randn(4_000_000).abs()
    begin = time.process_time()
    kept = choose([RankedUnits("a", a, ratio=0.5, group=1), RankedUnits("b", b, ratio=0.5, group=1)])
    assert time.process_time() - begin < 3  # NNI's heap needs 40 s
    assert sum(int((~keep).sum()) for keep in kept) == 5_000_000
