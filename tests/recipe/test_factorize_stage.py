"""The factorize stage says all that ``dw.factorize`` understands, and its model goes on through the recipe."""

import inspect
from pathlib import Path

import pytest
import yaml

import dwindle as dw
from dwindle.config.errors import ConfigError
from dwindle.recipe import run_recipe
from dwindle.recipe.parsing import load_recipe
from dwindle.recipe.schema import FactorizeStage

BASE = {
    "name": "f",
    "threads": 1,
    "model": {"name": "tiny_task:model", "arguments": {"width": 16}},
    "data": {"name": "tiny_task:labelled", "batch_size": 32},
}


def recipe(folder: Path, *stages: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**BASE, "stages": [{"train": {"epochs": 1}}, *stages]}))
    return path


def test_every_option_has_a_key() -> None:
    of_the_recipe = {"model", "example_inputs", "example_kwargs", "data", "optimizer"}
    options = set(inspect.signature(dw.factorize).parameters) - of_the_recipe
    keys = set(FactorizeStage.model_fields)
    assert options <= keys
    assert keys - options == {"name", "data_batches"}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({}, "give a target"),
        ({"target": {"macs": 0.5, "params": 0.5}}, "one of macs and params"),
        ({"rank": 3, "energy": 0.5}, "exclude each other"),
        ({"methd": "svd", "rank": 3}, "did you mean 'method'"),
    ],
)
def test_mistakes(tmp_path: Path, said: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe(tmp_path, {"factorize": said}))


def test_factorized_then_fine_tuned_then_quantized(tmp_path: Path) -> None:
    stages = [
        {"factorize": {"target": {"macs": 0.6}, "data_batches": 2}},
        {"finetune": {"epochs": 1}},
        "quantize",
        "report",
    ]
    result = run_recipe(recipe(tmp_path, *stages), tmp_path / "run")
    rows = {row.kind: row for row in result.summary.rows}
    assert rows["factorize"].title == "factorized"
    original, small = rows["original"].macs, rows["factorize"].macs
    assert original is not None
    assert small is not None
    assert small.mean <= 0.6 * original.mean
    record = result.summary.seeds[0].stages[1]["result"]["factorization"]
    assert record["layers"]["3"]["method"] == "tucker"
    assert record["proof"] < 1e-9
    assert result.report is not None
    assert "factorized" in result.report.read_text()
