"""How a recipe's fine-tuning learns: from the original, from its own average, from pairs of layers, from the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dwindle.config.errors import ConfigError
from dwindle.recipe import parse_recipe, run_recipe

HINT = {
    "op_names": ["3"],
    "apply_method": "hint",
    "lambda": {"linear": {"start": 1.0, "end": 0.0, "steps": 10}},
}


def recipe(distillation: dict, **data: str) -> str:
    content = {
        "name": "taught",
        "model": "tiny_task:model",
        "data": {"name": "tiny_task:labelled", "batch_size": 32, **data},
        "stages": [
            {"train": {"epochs": 4, "learning_rate": 0.03}},
            {"prune": {"ratio": 0.5}},
            {"finetune": {"epochs": 2, "learning_rate": 0.02, "distillation": distillation}},
        ],
    }
    return yaml.safe_dump(content)


@pytest.mark.parametrize(
    "distillation",
    [
        {"config_list": [HINT], "cache": True, "loss": "dkd", "options": {"other_weight": 2.0}},
        {"teacher": "ema"},
    ],
)
def test_finetuning_learns(distillation: dict, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(distillation))
    result = run_recipe(path, tmp_path / "run")
    finetuned = result.summary.rows[-1]
    assert finetuned.accuracy is not None
    assert finetuned.accuracy.mean > 0.5  # chance is 0.25
    assert not list((tmp_path / "run").rglob("teacher"))  # the answers are gone with the stage


def test_mistakes_are_found_before_anything_runs() -> None:
    with pytest.raises(
        ConfigError, match=r"distillation\.loss: 'dk' is not one of kl, binary, dkd, dist; did you mean 'dkd'"
    ):
        parse_recipe(recipe({"loss": "dk"}))
    with pytest.raises(ConfigError, match=r"distillation\.cache: data\.augment makes new inputs"):
        parse_recipe(recipe({"cache": True}, augment="tiny_task:add_noise"))
    with pytest.raises(ConfigError, match="nothing can be kept"):
        parse_recipe(recipe({"cache": True, "teacher": "ema"}))
