"""A recipe that trains with quantizers: its model is the integer one, and a killed run goes on."""

import json
from pathlib import Path

import pytest
import torch
import yaml

import dwindle as dw
from dwindle.config.errors import ConfigError
from dwindle.quantization import is_quantized
from dwindle.recipe import run_recipe

STAGES = [
    {"train": {"epochs": 4, "learning_rate": 0.03}},
    {
        "finetune": {
            "epochs": 2,
            "learning_rate": 0.01,
            "quantization": {"method": "lsq", "weight_bits": 4, "activation_bits": 4},
        }
    },
    {"export": {"formats": ["onnx"]}},
]


def write(folder: Path, stages: list[dict]) -> Path:
    path = folder / "recipe.yaml"
    content = {
        "name": "q",
        "model": "tiny_task:model",
        "data": {"name": "tiny_task:labelled", "batch_size": 32},
    }
    path.write_text(yaml.safe_dump({**content, "stages": stages}))
    return path


def test_the_model_of_the_stage_is_the_integer_one(tmp_path: Path) -> None:
    result = run_recipe(write(tmp_path, STAGES), tmp_path / "run")
    directory = next(
        own for own in (tmp_path / "run").rglob("model.safetensors") if "finetune" in str(own)
    ).parent
    manifest = json.loads((directory / "manifest.json").read_text())
    assert any(entry.get("kind") == "quantize" for entry in manifest["history"])
    model = dw.load(directory)
    assert is_quantized(model)
    finetuned = result.summary.rows[-1]
    assert finetuned.accuracy is not None
    assert finetuned.accuracy.mean > 0.4  # chance is 0.25
    weights = [own for own in model.parameters() if own.dim() > 1]
    assert all(len(torch.unique(row)) <= 127 for own in weights for row in own.flatten(1))


def test_wrong_settings_are_refused_before_training(tmp_path: Path) -> None:
    stages = [{"train": {"epochs": 1}}, {"finetune": {"epochs": 1, "quantization": {"weight_bits": 1}}}]
    with pytest.raises(ConfigError, match="weight_bits"):
        run_recipe(write(tmp_path, stages), tmp_path / "run")
    assert not (tmp_path / "run").exists()
