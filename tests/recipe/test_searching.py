"""Searching a recipe: its open places, its trials that are recipes of their own, and what they are scored on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from dwindle.cli.application import app
from dwindle.config.errors import ConfigError
from dwindle.recipe import load_model, parse_recipe, run_recipe
from dwindle.recipe.data_source import load_data
from dwindle.recipe.searching import load_search, parse_search, search_recipe
from dwindle.recipe.searching.costs import bit_operations
from dwindle.recipe.searching.paths import replace_at

pytest.importorskip("optuna")


def text(search: dict[str, Any], stages: list[Any] | None = None, **others: Any) -> str:
    return yaml.safe_dump(
        {
            "name": "tiny",
            "seed": 3,
            "threads": 1,
            "model": "tiny_task:model",
            "data": {"name": "tiny_task:labelled", "batch_size": 32},
            "stages": stages
            or [
                {"train": {"epochs": 3, "learning_rate": 0.03}},
                {"prune": {"ratio": {"search": {"low": 0.1, "high": 0.8}}}},
                {"finetune": {"epochs": 1, "learning_rate": 0.02}},
            ],
            "search": search,
            **others,
        },
        sort_keys=False,
    )


def test_trials_are_recipes_that_give_the_same_again(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text({"budget": {"macs": 0.5}, "measure": ["params"], "trials": 4}))
    found = search_recipe(path, tmp_path / "search")
    assert [trial.state for trial in found.study.trials] == ["complete"] * 4
    best = found.study.best
    assert best.costs["macs"] <= 0.5 * best.attributes["original"]["macs"]
    for trial in found.study.trials[:2]:
        own = tmp_path / "search" / "trials" / f"{trial.number:04d}" / "recipe.yaml"
        again = run_recipe(own, tmp_path / f"again-{trial.number}").summary
        score = again.rows[-1].accuracy
        assert score is not None
        assert score.mean == trial.values["accuracy"]
        assert yaml.safe_load(own.read_text()) == (trial.candidate or {})["recipe"]
    # The best one was run on the test data, by the same training.
    assert found.best is not None
    assert found.tested is not None
    recipe = parse_recipe((tmp_path / "search" / "best" / "recipe.yaml").read_text())
    assert recipe.data.evaluation == "test"
    data = load_data(recipe.data)
    assert found.best.summary.samples == sum(len(batch.target) for batch in data.test_batches()) == 96
    assert found.tested.costs["params"] == best.costs["params"]
    page = found.page.read_text()
    assert "accuracy against macs" in page
    assert "4 of 4 trials" in page
    # Searched on: more trials, the same first ones.
    more = search_recipe(path, tmp_path / "search", trials=5)
    assert more.study.trials[:4] == found.study.trials
    assert len(more.study.trials) == 5


def test_the_test_data_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiny_task

    path = tmp_path / "recipe.yaml"
    path.write_text(text({"trials": 2}))
    honest = search_recipe(path, tmp_path / "honest")
    own = tiny_task.labelled

    def spoiled() -> dict[str, Any]:
        images, labels = own()["test"]
        return {**own(), "test": (torch.zeros_like(images), (labels + 1) % 4)}

    monkeypatch.setattr(tiny_task, "labelled", spoiled)
    blind = search_recipe(path, tmp_path / "blind")
    assert [t.values for t in blind.study.trials] == [t.values for t in honest.study.trials]
    assert blind.tested is not None
    assert honest.tested is not None
    assert blind.tested.values != honest.tested.values


def test_held_out_data_are_no_training_data() -> None:
    part = {"name": "tiny_task:labelled", "batch_size": 64, "validation": 0.25}
    base = {"name": "t", "model": "tiny_task:model", "stages": ["measure"]}
    data = [
        load_data(parse_recipe(yaml.safe_dump({**base, "data": {**part, "evaluation": which}})).data)
        for which in ("test", "validation")
    ]
    train, held = (
        {image.numpy().tobytes() for batch in batches for image in batch}
        for batches in (
            [images for images, _ in data[0].training_batches(0)],
            [batch.args[0] for batch in data[1].test_batches()],
        )
    )
    import tiny_task

    everything = {image.numpy().tobytes() for image in tiny_task.labelled()["train"][0]}
    assert train | held == everything
    assert not train & held
    assert len(held) == 48
    with pytest.raises(ConfigError, match="say which share"):
        load_data(
            parse_recipe(
                yaml.safe_dump({**base, "data": {"name": "tiny_task:labelled", "evaluation": "validation"}})
            ).data
        )


def test_orders_and_whole_stages_are_searched() -> None:
    stages = [
        {"train": {"epochs": 1}},
        {"prune": {"ratio": 0.5}},
        {"search": [{"factorize": {"rank_ratio": 0.5}}, None]},
        {"finetune": {"epochs": 1, "compression": [{"quantization": {"weight_bits": {"search": [4, 8]}}}]}},
        "quantize",
    ]
    search = parse_search(text({"order": ["prune", "finetune", "quantize"], "trials": 3}, stages))
    space = search.space
    assert set(space.choices) == {"stages.2", "stages.finetune.compression.quantization.weight_bits", "order"}
    orders = [tuple(order) for order in space.choices["order"].examples()]
    assert orders == [("prune", "finetune", "quantize"), ("finetune", "prune", "quantize")]  # int8 comes last
    values = {**space.first(), "stages.2": None, "order": ["finetune", "prune", "quantize"]}
    made = [
        entry if isinstance(entry, str) else next(iter(entry)) for entry in space.recipe(values)["stages"]
    ]
    assert made == ["train", "finetune", "prune", "quantize"]
    assert space.shared_stages() == 1


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"spaec": {}}, r"search\.spaec: unknown key.*did you mean 'space'"),
        ({"space": {"stages.prnue.ratio": [0.1]}}, r"stages has no entry 'prnue'; did you mean 'prune'"),
        (
            {"space": {"stages.prune.rtaio": [0.1]}},
            r"stages\[1\]\.prune\.rtaio: unknown key.*did you mean 'ratio'",
        ),
        ({"space": {"stages.finetune.epochs": {"low": 3, "high": 1}}}, "low 3 is above high 1"),
        ({"space": {"stages.finetune.epochs": {"lo": 3}}}, "unknown key 'lo'.*did you mean 'low'"),
        ({"space": {"stages.finetune.epochs": [1, -1]}}, r"with stages\.finetune\.epochs = -1"),
        ({"space": {"stages.prune.ratio": [0.1]}}, "is searched where it stands, too"),
        ({"budget": {"mcas": 0.5}}, r"search\.budget: 'mcas' is not one of.*did you mean 'macs'"),
        ({"budget": {"macs": 1.5}}, "not a share"),
        ({"objective": "accurcay"}, "did you mean 'accuracy'"),
        ({"objective": "macs"}, "give a 'drop'"),
        ({"objective": ["accuracy", "macs"], "pruner": "median"}, "leave it out"),
        ({"order": ["prune", "fintune"]}, "no stage 'fintune'; did you mean 'finetune'"),
        ({"order": ["prune"]}, "give 2 to 4 stages"),
        ({"effort": "minuets"}, "did you mean 'minutes'"),
    ],
)
def test_mistakes_are_found_before_anything_runs(
    search: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_search(text(search), str(tmp_path / "recipe.yaml"))


def test_what_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="searched, not run: dwindle search"):
        parse_recipe(text({}))
    plain = yaml.safe_load(text({}))
    del plain["search"]
    with pytest.raises(ConfigError, match="there is no 'search' part"):
        parse_search(yaml.safe_dump(plain))
    nothing = yaml.safe_load(text({}))
    nothing["stages"][1]["prune"]["ratio"] = 0.5
    with pytest.raises(ConfigError, match="nothing is searched"):
        parse_search(yaml.safe_dump(nothing))
    path = tmp_path / "recipe.yaml"
    path.write_text(text({"enqueue": [{"stages.prune.ratio": 0.95}]}))
    with pytest.raises(ConfigError, match=r"enqueue: stages\.prune\.ratio: 0\.95 is not between"):
        search_recipe(path, tmp_path / "search")
    assert load_search(path).part.wanted == 40
    assert replace_at({"a": [{"b": {"name": "c", "d": 1}}]}, "a.c.d", 2) == {
        "a": [{"b": {"name": "c", "d": 2}}]
    }


def test_command_with_pareto_front_and_a_worker(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        text({"objective": ["accuracy", "params"], "trials": 4, "sampler": "random", "drop": 0.9})
    )
    arguments = ["search", str(path), "-o", str(tmp_path / "search"), "--json"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    record = json.loads(done.stdout)
    assert record["best"] is None
    points = {t["number"]: t["values"] for t in record["study"]["trials"]}
    for number in record["study"]["front"]:
        own = points[number]
        assert not any(
            p["accuracy"] >= own["accuracy"] and p["params"] <= own["params"] and p != own
            for p in points.values()
        )
    told = CliRunner().invoke(
        app,
        ["worker", "--storage", str(tmp_path / "search" / "study.db"), "--study", "tiny", "--json"],
        catch_exceptions=False,
    )
    assert json.loads(told.stdout) == {"study": "tiny", "finished": 0}


def test_bit_operations_of_an_int8_model() -> None:
    import dwindle as dw

    model = load_model("tiny_task:model").eval()
    images = torch.randn(4, 1, 6, 6)
    macs = dw.measure(model, (images,), runtimes=[], latency=False).macs
    assert bit_operations(model, (images,)) == macs * 32 * 32
    small = dw.quantize(model, [images], preset="int8", backend="onnxruntime")
    assert bit_operations(small, (images,)) == macs * 8 * 8
