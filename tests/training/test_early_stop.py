"""Early stopping, against the rule written out."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwindle.config.errors import ConfigError
from dwindle.training import EarlyStop


def rule(values: list[float], patience: int, change: float, sign: float) -> int | None:
    """The number of the report at which to stop, from 1: the best is ``patience`` reports old."""
    best, at = None, 0
    for number, value in enumerate(values, 1):
        if best is None or sign * (value - best) > change:
            best, at = value, number
        if number - at >= patience:
            return number
    return None


@given(
    st.lists(st.integers(0, 10), max_size=30), st.integers(1, 5), st.integers(0, 3), st.sampled_from(["max", "min"])
)  # fmt: skip
def test_the_rule(values: list[int], patience: int, change: int, mode: str) -> None:
    stop = EarlyStop(patience, change, mode)  # type: ignore[arg-type]
    told = [stop.report(value) for value in values]
    expected = rule([float(v) for v in values], patience, change, 1.0 if mode == "max" else -1.0)
    assert (told.index(True) + 1 if True in told else None) == expected
    assert stop.stopped == (expected is not None)


def test_a_target_ends_at_once_and_only_when_compression_is_ready() -> None:
    stop = EarlyStop(patience=2, target=0.9)
    for value in (0.95, 0.96, 0.5, 0.4, 0.3):
        assert not stop.report(value, ready=False)
    assert (stop.best, stop.reports) == (None, 0)
    assert not stop.report(0.8)
    assert not stop.report(0.7)
    assert stop.report(0.9)
    assert stop.reason == "target"
    only = EarlyStop(None, mode="min", target=0.1)
    assert not any(only.report(value) for value in (0.5, 0.6, math.nan, 0.7))
    assert only.report(0.1)


def test_nan_is_never_the_best() -> None:
    stop = EarlyStop(2)
    assert not stop.report(math.nan)
    assert stop.best is None
    assert not stop.report(0.5)
    assert not stop.report(math.nan)
    assert stop.report(math.nan)
    assert (stop.best, stop.reason) == (0.5, "patience")


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.data())
def test_a_state_goes_on(values: list[int], data: st.DataObject) -> None:
    moment = data.draw(st.integers(0, len(values)))
    whole, first, second = (EarlyStop(3, target=5.0) for _ in range(3))
    expected = [whole.report(value) for value in values]
    told = [first.report(value) for value in values[:moment]]
    second.load_state_dict(first.state_dict())
    assert told + [second.report(value) for value in values[moment:]] == expected
    assert second.state_dict() == whole.state_dict()


def test_mistakes() -> None:
    for arguments, message in (
        ({"patience": 0}, "patience"),
        ({"patience": None}, "needs a target"),
        ({"minimum_change": -1.0}, "minimum_change"),
        ({"mode": "mim"}, "did you mean 'min'"),
    ):
        with pytest.raises(ConfigError, match=message):
            EarlyStop(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="waited"):
        EarlyStop().load_state_dict({"best": 1.0})
