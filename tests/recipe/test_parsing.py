from __future__ import annotations

from pathlib import Path

import pytest
from tiny_task import RECIPE

from dwindle.config.errors import ConfigError
from dwindle.recipe import load_recipe, parse_recipe
from dwindle.recipe.schema import FinetuneStage, PruneStage
from dwindle.recipe.searching import load_search

HEAD = "name: r\nmodel: a.b:c\ndata: a.b:d\nstages:\n"


def test_reads_a_recipe() -> None:
    recipe = parse_recipe(RECIPE)
    assert [stage.label for stage in recipe.stages] == [
        "train",
        "prune",
        "finetune",
        "quantize",
        "measure",
        "report",
    ]
    assert recipe.seeds == (3,)
    assert recipe.model.name == "tiny_task:model"
    finetune, prune = recipe.stages[2], recipe.stages[1]
    assert isinstance(finetune, FinetuneStage)
    assert finetune.distillation is not None
    assert finetune.distillation.temperature == 4.0
    assert isinstance(prune, PruneStage)
    assert prune.ratio == 0.5


def test_exponents_without_a_point_are_numbers() -> None:
    (stage,) = parse_recipe(HEAD + "  - train: {epochs: 1, learning_rate: 2e-3}").stages
    assert stage.learning_rate == 2e-3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("  - prun: {ratio: 0.5}", ["recipe:5", "stages[0].prun", "did you mean 'prune'?"]),
        ("  - prune: {ratios: 0.5}", ["recipe:5", "stages[0].prune.ratios", "did you mean 'ratio'?"]),
        (
            "  - prune:\n      ratio: 1.5",
            ["recipe:6", "stages[0].prune.ratio", "less than or equal to 1", "1.5"],
        ),
        ("  - prune: {ratio: 0.5, importance: l11}", ["importance", "did you mean 'l1'?"]),
        (
            "  - prune: {ratio: 0.5, target: {macs: 0.5}}",
            ["stages[0].prune", "one of ratio, target, config_list, and counts or blocks"],
        ),
        ("  - prune: {target: {mac: 0.5}}", ["stages[0].prune.target.mac", "did you mean 'macs'?"]),
        (
            "  - finetune: {epochs: 1, distillation: {temprature: 2}}",
            ["distillation.temprature", "did you mean 'temperature'?"],
        ),
        ("  - train: {}", ["stages[0].train.epochs", "missing"]),
        ("  - report\n  - quantize", ["stages[0].report", "last stage"]),
        ("  - quantize\n  - prune: {ratio: 0.1}", ["recipe:6", "cannot follow 'quantize'"]),
        ("  - prune: {ratio: 0.1}\n  - prune: {ratio: 0.1}", ["recipe:6", "stages[0] is called 'prune' too"]),
        ("  - measure: {compare: [prnue]}", ["no stage 'prnue'"]),
        ("  - {train: {epochs: 1}, prune: {ratio: 0.5}}", ["stages[0]", "found the keys train, prune"]),
    ],
)
def test_errors_name_line_path_and_nearest_choice(body: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(HEAD + body)
    for text in expected:
        assert text in str(caught.value)


def test_errors_at_the_top() -> None:
    with pytest.raises(ConfigError, match=r"recipe:1: nmae: unknown key 'nmae'.*did you mean 'name'\?"):
        parse_recipe("nmae: r\nmodel: a:b\ndata: a:b\nstages: [report]")
    with pytest.raises(ConfigError, match="needs a list of stages"):
        parse_recipe("name: r\nmodel: a:b\ndata: a:b")
    with pytest.raises(ConfigError, match="either 'seed' or 'seeds'"):
        parse_recipe("seed: 1\nseeds: [1]\n" + HEAD + "  - report")
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_recipe("name: [")
    with pytest.raises(ConfigError, match="a recipe is a mapping"):
        parse_recipe("- 1")


def test_missing_file_suggests_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "digits.yaml").write_text("x")
    with pytest.raises(ConfigError, match=r"no recipe .*; did you mean 'digits.yaml'\?"):
        load_recipe(tmp_path / "digts.yaml")


def test_the_recipes_of_the_repository_are_valid() -> None:
    for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml"):
        searched = "\nsearch:" in path.read_text()
        recipe = load_search(path).example if searched else load_recipe(path)[0]
        assert recipe.name == path.stem
