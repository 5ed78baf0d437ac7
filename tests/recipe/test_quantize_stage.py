"""The quantize stage says all that ``dw.quantize`` understands, and records what it cost."""

import dataclasses
import inspect
from pathlib import Path

import pytest
import yaml

from dwindle.config.errors import ConfigError
from dwindle.quantization import Reconstruction, quantize
from dwindle.recipe import run_recipe
from dwindle.recipe.parsing import load_recipe
from dwindle.recipe.schema import LearnedRounding, QuantizeStage
from dwindle.recipe.stages.quantize import quantize_options

BASE = {"name": "q", "model": "tiny_task:model", "data": {"name": "tiny_task:labelled", "batch_size": 32}}


def recipe(folder: Path, *stages: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**BASE, "stages": [{"train": {"epochs": 1}}, *stages]}))
    return path


def stage_of(path: Path) -> QuantizeStage:
    return next(stage for stage in load_recipe(path)[0].stages if isinstance(stage, QuantizeStage))


def test_every_option_has_a_key() -> None:
    of_the_recipe = {"model", "calibration_data", "example_inputs", "adapt", "max_batches", "evaluate"}
    options = set(inspect.signature(quantize).parameters) - of_the_recipe
    keys = set(QuantizeStage.model_fields)
    assert options <= keys
    assert keys - options == {"name", "calibration_batches", "worst_layers"}
    assert set(LearnedRounding.model_fields) == {field.name for field in dataclasses.fields(Reconstruction)}
    defaults = {field.name: field.default for field in dataclasses.fields(Reconstruction)}
    assert LearnedRounding().model_dump() == defaults


def test_only_what_is_said_is_passed_on(tmp_path: Path) -> None:
    assert quantize_options(stage_of(recipe(tmp_path, "quantize"))) == {"preset": "int8"}
    said = {
        "backend": "openvino",
        "observer": "entropy",
        "equalize": True,
        "smooth": 0.5,
        "bias_correction": False,
        "rounding": {"blocks": True, "steps": 7},
        "max_drop": 0.1,
    }
    options = quantize_options(stage_of(recipe(tmp_path, {"quantize": said})))
    assert options == {
        **{key: said[key] for key in ("backend", "observer", "equalize", "smooth", "bias_correction")},
        "preset": "int8",
        "rounding": Reconstruction(blocks=True, steps=7),
    }


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"smoth": 0.5}, "did you mean 'smooth'"),
        ({"smooth": 1.5}, "less than or equal to 1"),
        ({"rounding": {"step": 3}}, "step"),
        ({"bias_correction": "sequentially"}, "did you mean 'sequential'"),
        ({"backend": "openvin"}, "did you mean 'openvino'"),
    ],
)
def test_mistakes(tmp_path: Path, said: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_recipe(recipe(tmp_path, {"quantize": said}), tmp_path / "run")


def test_record_and_page(tmp_path: Path) -> None:
    low = [{"op_types": ["Conv2d", "Linear"], "target_names": ["weight"], "quant_dtype": "int3"}]
    said = {"config_list": low, "max_drop": 0.5, "rounding": {"steps": 5}, "worst_layers": 1}
    path = recipe(tmp_path, {"quantize": said}, "report")
    result = run_recipe(path, tmp_path / "run")
    record = result.summary.seeds[0].stages[-1]["result"]
    layers = record["quantization"]["layers"]
    assert {layer["name"] for layer in layers} == {"0/conv2d/0", "3/conv2d/0", "8/linear/0"}
    assert [layer["weight_bits"] for layer in layers] == [3, 3, 3]
    ratios = [layer["sqnr_db"] for layer in layers]
    assert ratios == sorted(ratios)
    assert {own["name"] for own in record["quantization"]["histograms"]} == {
        layers[0]["weight_name"],
        layers[0]["input_name"],
    }
    assert result.report is not None
    page = result.report.read_text()
    assert "Layers after “quantize”" in page
    assert layers[0]["name"] in page
    assert "data:image/svg+xml;base64," in page
