from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from dwindle.cli import main
from dwindle.cli.inputs import parse_shape
from dwindle.config.errors import ConfigError

MODEL = "dwindle.zoo:digits_resnet"
SMALL = ["-a", "widths=[4, 8]", "-a", "depths=[1, 1]"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dwindle", *arguments])
        code = 0
        try:
            main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_inspect(run) -> None:
    code, out, err = run("inspect", MODEL, *SMALL, "-i", "2,1,8,8", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    widths = {axis["size"] for axis in found["axes"] if axis["prunable"]}
    assert widths == {4, 8}
    head = next(axis for axis in found["axes"] if "head.weight[0]" in axis["parameters"])
    assert not head["prunable"]
    assert head["reason"] == "model output"
    code, out, _ = run("inspect", MODEL, *SMALL, "-i", "2,1,8,8")
    assert code == 0
    assert "axes that may shrink" in out


def test_inspect_quantization(run, tmp_path: Path) -> None:
    code, out, err = run("inspect", MODEL, *SMALL, "-i", "2,1,8,8", "--quantization", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    states = {entry["call"]: entry["state"] for entry in found["operations"]}
    assert states["head/linear/0"] == "int8"
    assert found["backend"] == "onnxruntime"
    config = tmp_path / "config.yaml"
    config.write_text("- {op_types: [Linear], quant_dtype: null}\n")
    code, out, _ = run("inspect", MODEL, *SMALL, "-i", "2,1,8,8", "-q", "--config", str(config))
    assert code == 0
    assert "config_list leaves head in float" in out
    code, _, err = run("inspect", MODEL, *SMALL, "-i", "2,1,8,8", "-q", "--backend", "openvin")
    assert code == 2
    assert "did you mean 'openvino'?" in err
    config.write_text("op_types: [Linear]\n")
    code, _, err = run("inspect", MODEL, *SMALL, "-i", "2,1,8,8", "-q", "--config", str(config))
    assert code == 2
    assert "holds no config_list" in err


def test_measure(run) -> None:
    code, out, _ = run(
        "measure", MODEL, *SMALL, "-i", "1,1,8,8", "--runtimes", "torch", "--repeats", "2", "--json"
    )
    assert code == 0
    found = json.loads(out)[MODEL]
    assert found["parameters"] > 0
    assert found["latency"]["torch"]["p50"] > 0


def test_export(run, tmp_path: Path) -> None:
    code, out, _ = run("export", MODEL, *SMALL, "-i", "2,1,8,8", "--to", "onnx", "--json")
    assert code == 0
    assert json.loads(out)["max_difference"] < 1e-3
    assert (tmp_path / "model.onnx").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", MODEL, "--to", "onx"], "did you mean 'onnx'?"),
        (["export", MODEL, "--to", "onnx"], "Give them with --input-shape"),
        (["inspect", "dwindle.zoo:digits_resnt"], "did you mean 'digits_resnet'?"),
        (["inspect", "nothing"], "package.module:callable"),
        (["inspect", MODEL, "-a", "wide=3", "-i", "1,1,8,8"], "has no argument 'wide'"),
        (["run", "missing.yaml"], "there is no recipe 'missing.yaml'"),
        (["run", "missing.yaml", "--fresh", "--resume"], "exclude each other"),
    ],
)
def test_errors_are_one_message(run, arguments: list[str], message: str) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("dwindle: ")
    assert message in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback(run) -> None:
    with pytest.raises(ConfigError):
        run("run", "missing.yaml", "--debug")


def test_run_prints_pure_json(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "recipe"))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "name: r\nmodel: tiny_task:model\ndata: tiny_task:labelled\n"
        "stages:\n  - train: {epochs: 1}\n  - prune: {ratio: 0.5}\n"
    )
    code, out, _ = run("run", str(recipe), "--json")
    assert code == 0
    found = json.loads(out)
    assert found["directory"] == "runs/r"
    assert [row["title"] for row in found["table"]] == ["original", "pruned"]
    code, out, _ = run("run", str(recipe))
    assert code == 0
    assert "parameters" in out
    assert "mean of" not in out


def test_version(run) -> None:
    assert run("--version")[1].startswith("dwindle ")


def test_shapes() -> None:
    name, tensor = parse_shape("ids=2,16:int64")
    assert (name, tuple(tensor.shape), tensor.dtype) == ("ids", (2, 16), torch.int64)
    name, tensor = parse_shape("1x3x8x8")
    assert (name, tuple(tensor.shape), tensor.dtype) == (None, (1, 3, 8, 8), torch.float32)
    for wrong in ("", "1,a", "0,3", "2,2:int7"):
        with pytest.raises(ConfigError):
            parse_shape(wrong)


def test_sensitivity(run, tmp_path: Path) -> None:
    arguments = [
        "sensitivity",
        MODEL,
        *SMALL,
        "--kinds",
        "pruning,quantization",
        "--ratios",
        "0.5",
        "--bits",
        "4",
    ]
    files = ["--csv", "points.csv", "--html", "page.html", "--storage", "kept", "--drop", "0.05"]
    torch.manual_seed(0)
    code, out, err = run(*arguments, "-i", "2,1,8,8", *files, "--json")
    assert code == 0
    assert "random inputs" in err
    found = json.loads(out)
    assert found["score"] == "sqnr"
    counts = {kind["kind"]: sum(len(own["points"]) for own in kind["targets"]) for kind in found["kinds"]}
    assert min(counts.values()) > 0
    assert len((tmp_path / "points.csv").read_text().splitlines()) == sum(counts.values()) + 1
    assert "Sensitivity of" in (tmp_path / "page.html").read_text()
    assert set(found["config_lists"]) == set(counts)
    assert any("quant_dtype" in entry for entry in found["config_lists"]["quantization"])
    torch.manual_seed(0)
    code, out, _ = run(*arguments, "-i", "2,1,8,8", "--storage", "kept", "--drop", "0.05")
    assert code == 0
    assert "quantization: bits" in out
    assert "config_list at a drop of 0.05" in out


def test_sensitivity_of_accuracy(run, tmp_path: Path) -> None:
    (tmp_path / "own_data.py").write_text(
        "import torch\n"
        "def images():\n    return {'test': (torch.randn(6, 1, 8, 8), torch.arange(6))}\n"
        "def unlabelled():\n    return torch.randn(6, 1, 8, 8)\n"
    )
    arguments = ["sensitivity", MODEL, *SMALL, "--kinds", "pruning", "--ratios", "0.5"]
    code, out, _ = run(*arguments, "--data", "own_data:images", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["score"] == "metric"
    assert 0 <= found["baseline"] <= 1
    code, _, err = run(*arguments, "--data", "own_data:unlabelled", "--metric", "accuracy")
    assert code == 2
    assert "have no labels" in err
    code, _, err = run(*arguments, "-i", "2,1,8,8", "--bits", "four")
    assert code == 2
    assert "--bits four" in err
