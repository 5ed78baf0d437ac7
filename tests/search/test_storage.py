"""Trials on disk: whole lines or none, the same numbers back, never those of another model."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from dwindle.config.errors import ConfigError, FileFormatError
from dwindle.search import Problem, Trial, TrialStore
from dwindle.search.trial import key_of
from search.models import images, nearness, tiny

IDENTITY = {"model": "abc", "space": {"a": 4}}


def trial(number: int, score: float = 0.5) -> Trial:
    counts = {"a": number}
    return Trial(key_of(counts), counts, {"a": 1 - number / 4}, score, 10.0 * number, 0.25)


def test_trials_come_back_as_they_were(tmp_path: Path) -> None:
    store = TrialStore(tmp_path, IDENTITY)
    for number, score in enumerate([0.1, -math.inf, 1 / 3], 1):
        store.add(trial(number, score))
    store.add_figure("latency a", 0.123456789)
    again = TrialStore(tmp_path, IDENTITY)
    assert again.trials == store.trials
    assert again.figures == {"latency a": 0.123456789}


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    store = TrialStore(tmp_path, IDENTITY)
    for number in (1, 2, 3):
        store.add(trial(number))
    path = tmp_path / "trials.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    again = TrialStore(tmp_path, IDENTITY)
    assert list(again.trials.values()) == [trial(1), trial(2)]
    again.add(trial(3))
    assert len(TrialStore(tmp_path, IDENTITY)) == 3


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    store = TrialStore(tmp_path, IDENTITY)
    store.add(trial(1))
    store.add(trial(2))
    path = tmp_path / "trials.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = lines[1][:20]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(FileFormatError, match="line 2"):
        TrialStore(tmp_path, IDENTITY)


def test_trials_of_another_model_are_refused(tmp_path: Path) -> None:
    TrialStore(tmp_path, IDENTITY)
    with pytest.raises(ConfigError, match="model differ"):
        TrialStore(tmp_path, {**IDENTITY, "model": "other"})
    (tmp_path / "trials.jsonl").write_text(json.dumps({"format": "something"}) + "\n")
    with pytest.raises(FileFormatError, match="no trial file"):
        TrialStore(tmp_path, IDENTITY)


def test_the_identity_follows_weights_and_space() -> None:
    model = tiny()
    first = Problem(model, images(2), nearness(model), {"macs": 0.5})
    assert (
        first.identity()
        == Problem(copy.deepcopy(model), images(2), nearness(model), {"macs": 0.7}).identity()
    )
    other = tiny(1)
    assert (
        first.identity()["model"]
        != Problem(other, images(2), nearness(other), {"macs": 0.5}).identity()["model"]
    )
    fewer = Problem(model, images(2), nearness(model), {"macs": 0.8}, ignore=["hidden"])
    assert first.identity()["space"] != fewer.identity()["space"]


def test_a_round_comes_back_bit_by_bit(tmp_path: Path) -> None:
    model = tiny()
    problem = Problem(model, images(2), nearness(model), {"macs": 0.5})
    result = problem.build(problem.space.counts({v.name: 0.4 for v in problem.space.variables}), verify=True)
    with torch.no_grad():
        result.model.stem.weight.add_(1)
    store = TrialStore(tmp_path, IDENTITY)
    assert result.verification is not None
    store.save_round("one", result.model, [result.plan], [result.verification])
    again = copy.deepcopy(model)
    kept = store.load_round("one", again)
    assert kept is not None
    assert kept[1] == [result.verification]
    assert kept[0][0].to_json() == result.plan.to_json()
    assert torch.equal(again(images()), result.model(images()))
    untouched = copy.deepcopy(model)
    assert store.load_round("two", untouched) is None
    assert torch.equal(untouched(images()), model(images()))
