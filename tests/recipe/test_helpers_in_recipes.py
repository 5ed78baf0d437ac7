"""Recipes that stop early, adapt normalizations, and train compressors' parameters at rates of their own."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_task import labelled, model

import dwindle as dw
from dwindle.config.errors import ConfigError
from dwindle.recipe import parse_recipe, run_recipe


def content(*stages: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "helped",
        "seed": 1,
        "threads": 1,
        "model": "tiny_task:model",
        "data": {"name": "tiny_task:labelled", "batch_size": 32},
        "stages": list(stages),
    }


def records(folder: Path, *stages: dict[str, Any]) -> list[dict[str, Any]]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content(*stages)))
    run_recipe(path, folder / "run")
    found = sorted((folder / "run").rglob("record.json"))
    return [json.loads(own.read_text())["result"] for own in found]


def test_a_stage_ends_at_its_target_and_statistics_are_those_of_the_data(tmp_path: Path) -> None:
    train, prune, finetune = records(
        tmp_path,
        {
            "train": {
                "epochs": 20,
                "learning_rate": 0.03,
                "early_stop": {"target": 0.6},
                "adapt_normalization": 6,
            }
        },
        {"prune": {"ratio": 0.5, "adapt_normalization": 2}},
        {
            "finetune": {
                "epochs": 12,
                "early_stop": {"patience": 1, "minimum_change": 1.0},
                "distillation": None,
                "quantization": {"method": "lsq", "weight_bits": 4, "activation_bits": 4},
                "compressor_rate": 0.1,
            }
        },
    )
    assert train["stopped"] == "target"
    assert train["curve"][-1]["metric"] >= 0.6
    assert all(epoch["metric"] < 0.6 for epoch in train["curve"][:-1])
    assert prune["normalization"]["batches"] == 2
    assert set(prune["normalization"]["moved"]) == {"1"}
    assert finetune["stopped"] == "patience"
    assert len(finetune["curve"]) == 2  # nothing is better by 1.0


def test_modules_stand_still_for_a_time() -> None:
    torch.manual_seed(0)
    network = model(4)
    said = {"compression": [{"freezing": {"config_list": [{"op_names": ["0"]}], "start": 1, "stop": 3}}]}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    x, y = labelled()["train"]
    weights = [network[0].weight.detach().clone()]
    with dw.from_recipe(network, said, training_steps=4) as run:
        for _ in range(4):
            torch.nn.functional.cross_entropy(network(x[:16]), y[:16]).backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
            weights.append(network[0].weight.detach().clone())
    moved = [not torch.equal(one, other) for one, other in itertools.pairwise(weights)]
    assert moved == [True, False, False, True]
    with pytest.raises(ConfigError, match=r"freezing.*'op_name'.*did you mean 'op_names'"):
        dw.from_recipe(network, {"compression": [{"freezing": {"config_list": [{"op_name": ["0"]}]}}]})


def test_keys_are_checked() -> None:
    for stage, message in (
        ({"train": {"epochs": 1, "early_stop": {"patience": None}}}, "needs a target"),
        ({"train": {"epochs": 1, "early_stop": {"patients": 3}}}, "patience"),
        ({"train": {"epochs": 1, "adapt_normalization": -1}}, "adapt_normalization"),
        ({"train": {"epochs": 1, "compressor_rate": 2.0}}, "compressor_rate"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_recipe(yaml.safe_dump(content(stage)))
