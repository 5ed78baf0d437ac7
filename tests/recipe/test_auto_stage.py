"""The stage that finds the best model within a budget by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import dwindle as dw
from dwindle.recipe import run_recipe
from dwindle.recipe.schema import AutoStage

RECIPE: dict[str, Any] = {
    "name": "auto",
    "threads": 1,
    "model": {"name": "dwindle.zoo:digits_resnet", "arguments": {"widths": [8, 16], "depths": [2, 1]}},
    "data": {"name": "dwindle.zoo:digits", "limit": 256, "test_limit": 100, "batch_size": 64},
    "stages": [
        {"train": {"epochs": 2}},
        {"auto": {"budget": {"macs": 0.5}, "epochs": 1, "trials": 1, "max_drop": 1.0}},
    ],
}


def _written(recipe: dict[str, Any], folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_the_stage_keeps_a_model_within_the_budget_and_says_what_was_done(tmp_path: Path) -> None:
    run_recipe(_written(RECIPE, tmp_path), tmp_path / "run")
    record = _record(tmp_path / "run", "auto")
    found = record["result"]["auto"]
    assert found["within_budget"]
    assert found["costs"]["macs"] <= 0.5 * found["original_costs"]["macs"]
    assert record["result"]["stages"]
    again = {**RECIPE, "stages": [RECIPE["stages"][0], *record["result"]["stages"]]}
    run_recipe(_written(again, tmp_path), tmp_path / "again")
    assert _record(tmp_path / "again", "prune")["result"]["macs"] == record["result"]["macs"]


def _record(folder: Path, kind: str) -> dict[str, Any]:
    """Return the record of the last stage of a kind."""
    records = [yaml.safe_load(path.read_text()) for path in sorted(folder.rglob("record.json"))]
    return dict([record for record in records if record["kind"] == kind][-1])


def test_each_trial_is_a_recipe_that_gives_the_same_again(tmp_path: Path) -> None:
    stage = {"auto": {"budget": {"macs": 0.5}, "epochs": 4, "trials": 2, "max_drop": 1.0}}
    run_recipe(_written({**RECIPE, "stages": [RECIPE["stages"][0], stage]}, tmp_path), tmp_path / "run")
    trials = _record(tmp_path / "run", "auto")["result"]["trials"]
    assert trials
    (folder,) = (path.parent for path in (tmp_path / "run").rglob("trials"))
    run_recipe(folder / trials[-1]["recipe"], tmp_path / "again")
    again = _record(tmp_path / "again", "auto")["result"]["auto"]
    assert again["score"] == trials[-1]["score"]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({}, "give a budget"),
        ({"budget": {"latncy:onnxruntime": 0.5}}, "did you mean 'latency'"),
        ({"budget": {"macs": 3}}, "not a share"),
        ({"minimize": "latency"}, "name the runtime"),
        ({"budget": {"macs": 0.5}, "share": 0.5}, "belongs to a candidate"),
        ({"candidate": {"block": ["stages.0.1"]}}, "did you mean 'blocks'"),
        ({"budget": {"macs": 0.5}, "methods": ["width"]}, "did you mean 'widths'"),
        ({"budget": {"macs": 0.5}, "effort": "minute"}, "effort"),
    ],
)
def test_mistakes_are_named_before_any_work(stage: dict[str, Any], message: str, tmp_path: Path) -> None:
    recipe = {**RECIPE, "stages": [{"auto": stage}]}
    with pytest.raises(dw.ConfigError, match=message):
        run_recipe(_written(recipe, tmp_path), tmp_path / "run")


def test_the_stage_has_the_methods_of_dw_auto() -> None:
    assert AutoStage(budget={"macs": 0.5}).methods == list(dw.search.auto.METHODS)
