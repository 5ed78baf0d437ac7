"""What fits into the time."""

from __future__ import annotations

import pytest

from dwindle.search.auto.efforts import EFFORTS, Effort, effort_of


def test_fast_training_leaves_the_effort_as_it_is() -> None:
    effort = EFFORTS["minutes"]
    assert effort.within(0.5, 20, 30.0) == effort


@pytest.mark.parametrize("epoch", [10.0, 60.0, 200.0])
def test_slow_training_is_cut_to_the_time(epoch: float) -> None:
    effort = Effort(10, 0.2, 2, 600.0).within(epoch, 4, 100.0)
    planned = epoch * 4 * (effort.finalists + effort.trials * effort.trial_share)
    assert effort.trials >= 1
    assert effort.finalists >= 1
    assert planned <= 500.0 or (effort.trials, effort.finalists) == (1, 1)


def test_no_limit_and_other_numbers_of_trials() -> None:
    assert EFFORTS["hours"].within(1e6, 10, 0.0) == EFFORTS["hours"]
    assert effort_of("minutes", 1) == Effort(1, 0.2, 1, 600.0)
