"""The state of a whole run in one process: it goes on with the same bits, and says what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dwindle as dw
from dwindle.config.errors import ConfigError, FileFormatError
from dwindle.pruning import L1NormPruner
from dwindle.training import load_state, load_whole_state, save_state, whole_state
from support.spread_runs import METHODS, STEPS, WEIGHTS, Spread, network


def steps(spread: Spread, first: int, last: int) -> None:
    for number in range(first, last):
        spread.step(number)


def test_a_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    whole = Spread(METHODS["fusion"])
    with whole.run:
        whole.start()
        steps(whole, 0, 4)
        save_state(whole_state(whole.run, [whole.optimizer]), tmp_path / "state")
        steps(whole, 4, STEPS)
        expected = whole.found()
    resumed = Spread(METHODS["fusion"])
    with resumed.run:
        resumed.start()
        load_whole_state(resumed.run, load_state(tmp_path / "state"), [resumed.optimizer])
        steps(resumed, 4, STEPS)
        found = resumed.found()
    assert list(found) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_the_tensors_are_not_those_that_are_trained() -> None:
    spread = Spread(METHODS["random"])
    with spread.run:
        spread.start()
        state = whole_state(spread.run, [spread.optimizer])
        before = {name: own.clone() for name, own in state["model"].items()}
        steps(spread, 0, 2)
    assert all(torch.equal(own, before[name]) for name, own in state["model"].items())


def test_what_does_not_fit_is_said() -> None:
    model = network()
    with dw.compress(model, [L1NormPruner(model, WEIGHTS)]) as run:
        state = whole_state(run)
        with pytest.raises(FileFormatError, match="it lacks model, runs"):
            load_whole_state(run, {"optimizers": []})
        with pytest.raises(FileFormatError, match="it has 0 optimizers"):
            load_whole_state(run, state, [torch.optim.SGD(model.parameters(), 0.1)])
        with pytest.raises(FileFormatError, match="another run"):
            load_whole_state(run, {**state, "model": {"nothing": torch.zeros(1)}})
    other = network()
    with (
        dw.compress(other, []) as fewer,
        pytest.raises(ConfigError, match="the state was saved by the compressors"),
    ):
        load_whole_state(fewer, state)
