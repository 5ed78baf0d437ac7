"""Interleaved timing, on a clock that the test turns."""

from __future__ import annotations

import numpy as np
import pytest

from dwindle.config.errors import ConfigError
from dwindle.measure.timing import Latency, percentile, time_interleaved


class Clock:
    def __init__(self):
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def function(self, name: str, seconds):
        def run():
            self.calls.append(name)
            self.now += seconds() if callable(seconds) else seconds

        return run


def test_each_is_called_once_a_round():
    clock = Clock()
    functions = {name: clock.function(name, index + 1) for index, name in enumerate("abc")}
    times = time_interleaved(functions, warmup=2, repeats=20, max_seconds=None, clock=clock)
    rounds = [clock.calls[i : i + 3] for i in range(0, len(clock.calls), 3)]
    assert len(rounds) == 22
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) == 6, "the order inside a round varies"
    assert times == {"a": [1000.0] * 20, "b": [2000.0] * 20, "c": [3000.0] * 20}


def test_a_drifting_machine_meets_all_alike():
    clock = Clock()
    drift = {"value": 1.0}

    def slower():
        drift["value"] *= 1.01
        return drift["value"]

    times = time_interleaved(
        {name: clock.function(name, slower) for name in "ab"}, repeats=200, max_seconds=None, clock=clock
    )
    # one after the other, the second would be seven times as slow
    assert np.median(times["b"]) / np.median(times["a"]) == pytest.approx(1.0, abs=0.03)


def test_time_limit_keeps_three_rounds():
    clock = Clock()
    times = time_interleaved(
        {"a": clock.function("a", 10.0)}, warmup=0, repeats=100, max_seconds=1.0, clock=clock
    )
    assert len(times["a"]) == 3
    clock = Clock()
    times = time_interleaved(
        {"a": clock.function("a", 1.0)}, warmup=0, repeats=100, max_seconds=9.5, clock=clock
    )
    assert len(times["a"]) == 10


def test_percentiles_are_numpys():
    values = np.random.default_rng(0).random(37).tolist()
    for fraction in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert percentile(values, fraction) == pytest.approx(np.quantile(values, fraction))
    assert Latency.of(values) == Latency(
        p50=pytest.approx(np.median(values)),
        p90=pytest.approx(np.quantile(values, 0.9)),
        minimum=min(values),
        runs=37,
    )
    assert percentile([4.0], 0.9) == 4.0


def test_bad_numbers():
    with pytest.raises(ConfigError, match="repeats"):
        time_interleaved({}, repeats=0)
