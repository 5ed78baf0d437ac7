"""Schedules against their formulas in NumPy float64."""

import numpy as np
import pytest

from dwindle.config.errors import ConfigError
from dwindle.training import ConstantSchedule, CosineSchedule, CubicSchedule, LinearSchedule, value_at

STEPS = np.arange(0, 40)


def progress(begin: int, steps: int) -> np.ndarray:
    return np.clip((STEPS - begin) / steps, 0, 1)


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        (LinearSchedule, lambda a, b, t: a + (b - a) * t),
        (CubicSchedule, lambda a, b, t: b + (a - b) * (1 - t) ** 3),
        (CosineSchedule, lambda a, b, t: b + (a - b) * (1 + np.cos(np.pi * t)) / 2),
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
