"""Schedules against their formulas in NumPy float64."""

import functools
import math

import numpy as np
import pytest

from dwindle.config.errors import ConfigError
from dwindle.training import (
    AdaptiveSchedule,
    ConstantSchedule,
    CosineSchedule,
    CubicSchedule,
    ExponentialSchedule,
    ExponentialWithBiasSchedule,
    LinearSchedule,
    MultistepSchedule,
    PolynomialSchedule,
    value_at,
)

STEPS = np.arange(0, 40)


def progress(begin: int, steps: int) -> np.ndarray:
    return np.clip((STEPS - begin) / steps, 0, 1)


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        (LinearSchedule, lambda a, b, t: a + (b - a) * t),
        (CubicSchedule, lambda a, b, t: b + (a - b) * (1 - t) ** 3),
        (CosineSchedule, lambda a, b, t: b + (a - b) * (1 + np.cos(np.pi * t)) / 2),
        (PolynomialSchedule, lambda a, b, t: b - (b - a) * (1 - t) ** 3),
        (functools.partial(PolynomialSchedule, power=0.9), lambda a, b, t: b - (b - a) * (1 - t) ** 0.9),
        (
            functools.partial(PolynomialSchedule, power=2, concave=False),
            lambda a, b, t: a + (b - a) * t**2,
        ),
        (ExponentialSchedule, lambda a, b, t: 1 - (1 - a) ** (1 - t) * (1 - b) ** t),
    ],
)
def test_ramps_follow_their_formula(kind, formula):
    schedule = kind(0.1, 0.8, steps=20, begin_step=5)
    got = np.array([schedule(int(step)) for step in STEPS])
    np.testing.assert_allclose(got, formula(0.1, 0.8, progress(5, 20)), rtol=0, atol=1e-15)
    assert got[0] == 0.1
    assert got[-1] == 0.8


def test_value_at_takes_numbers_and_schedules():
    assert value_at(3, 7) == 3.0
    assert value_at(ConstantSchedule(0.5), 7) == 0.5
    assert value_at(LinearSchedule(0.0, 1.0, steps=10), 5) == 0.5


def test_a_ramp_needs_steps():
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        LinearSchedule(0.0, 1.0, steps=0)
    with pytest.raises(ConfigError, match="begin_step"):
        CubicSchedule(0.0, 1.0, steps=1, begin_step=-1)


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.1, 0.9), (0.0, 1.0), (0.5, 0.72)])
def test_exponential_with_bias_goes_through_its_three_points(start, end):
    schedule = ExponentialWithBiasSchedule(start, end, steps=80, begin_step=3)
    got = np.array([schedule(step) for step in range(3, 84)])
    assert got[0] == start == schedule(0)
    assert got[80] == end == schedule(200)
    assert got[10] == pytest.approx(0.75 * end, abs=1e-12)
    # An exponential plus a constant: the ratio of neighbouring differences is the same everywhere.
    moves = np.diff(got)
    np.testing.assert_allclose(moves[1:] / moves[:-1], np.exp(-rate(start, end) / 80), rtol=1e-7)


def rate(start: float, end: float) -> float:
    """Solve a + b = start, a exp(-k) + b = end, a exp(-k/8) + b = 3/4 end for k, by Newton's method."""
    goal = (0.75 * end - start) / (end - start)
    k = 1.0
    for _ in range(200):
        value = (1 - math.exp(-k / 8)) / (1 - math.exp(-k)) - goal
        slope = (
            math.exp(-k / 8) / 8 / (1 - math.exp(-k))
            - (1 - math.exp(-k / 8)) * math.exp(-k) / (1 - math.exp(-k)) ** 2
        )
        k -= value / slope
    return k


def test_multistep_is_constant_between_its_steps():
    schedule = MultistepSchedule([0.1, 0.4, 0.7], [5, 12])
    expected = [0.1] * 5 + [0.4] * 7 + [0.7] * 8
    assert [schedule(step) for step in range(20)] == expected


def test_adaptive_rises_when_the_loss_has_recovered():
    schedule = AdaptiveSchedule(0.2, 0.5, increment=0.1, patience=2, tolerance=0.1)
    losses = [1.0, 0.9, 1.2, 0.98, 0.95, 1.0, 0.7, 0.76, 0.78, 0.7, 0.7]
    # reports: good, good (rise), 1.2 > 0.99 bad, 0.98 good, 0.95 good (rise), 1.0 > 0.99 bad, 0.7 good, 0.76 good
    # (<= 0.77; rise to the end), 0.78 bad, good, good (stays at the end)
    values = [schedule.report(loss) for loss in losses]
    assert values == pytest.approx([0.2, 0.3, 0.3, 0.3, 0.4, 0.4, 0.4, 0.5, 0.5, 0.5, 0.5])
    assert schedule(0) == schedule(99) == 0.5


def test_adaptive_waits_until_the_sparsity_is_reached_and_resumes():
    schedule = AdaptiveSchedule(0.1, 0.9, increment=0.05)
    assert schedule.report(1.0, achieved=0.06) == 0.1
    assert schedule.report(1.0, achieved=0.07) == pytest.approx(0.15)
    other = AdaptiveSchedule(0.1, 0.9, increment=0.05)
    other.load_state_dict(schedule.state_dict())
    assert other.report(2.0) == schedule.report(2.0) == pytest.approx(0.15)
    assert other.report(0.5) == schedule.report(0.5) == pytest.approx(0.2)
    with pytest.raises(ConfigError, match="loss is nan"):
        schedule.report(float("nan"))
    with pytest.raises(ConfigError, match="needs best, good"):
        schedule.load_state_dict({"value": 1.0})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ExponentialSchedule(0.0, 1.0, steps=3), "end: 1.0"),
        (lambda: ExponentialSchedule(-0.1, 0.5, steps=3), "start: -0.1"),
        (lambda: ExponentialWithBiasSchedule(0.4, 0.5, steps=3), "5/7"),
        (lambda: PolynomialSchedule(0, 1, steps=2, power=0), "power"),
        (lambda: MultistepSchedule([0.1], [3]), "2 parts"),
        (lambda: MultistepSchedule([0.1, 0.2, 0.3], [3, 3]), "rise"),
        (lambda: AdaptiveSchedule(0.9, 0.1), "above end"),
        (lambda: AdaptiveSchedule(increment=0), "increment"),
        (lambda: AdaptiveSchedule(patience=0), "patience"),
        (lambda: AdaptiveSchedule(tolerance=-1), "negative"),
    ],
)
def test_schedules_refuse_what_has_no_meaning(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
