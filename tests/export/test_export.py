"""Exported files: what they compute, and what is on the disk when something goes wrong."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dwindle.export
from dwindle.config.errors import ConfigError, ExportError, FileFormatError
from dwindle.export import ExportResult, export
from dwindle.export.program_file import pickled_entries, read_program

FORMATS = ["onnx", "xml", "pt2"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        return self.last(self.norm(self.conv(x)).relu().mean((2, 3)))


class Dicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, batch, scale=1.0, *, mask=None):
        logits = self.layer(batch["a"]) * scale
        return {
            "logits": logits if mask is None else logits + mask,
            "other": (batch["b"].argmax(1), batch["b"] > 0),
        }


@pytest.mark.parametrize("suffix", FORMATS)
def test_batch_of_one_becomes_dynamic(suffix, tmp_path):
    model = Net()
    path = tmp_path / "deep" / f"m.{suffix}"
    result = dwindle.export(model, path, example_inputs=(torch.randn(1, 3, 8, 8),))
    assert isinstance(result, ExportResult)
    assert result.dynamic_batch
    assert result.checked_batches == [1, 3]
    assert result.max_difference < 1e-5
    assert result.bytes == sum(file.stat().st_size for file in result.files)
    assert set(path.parent.iterdir()) == set(result.files), "nothing else is left behind"
    assert model.training
    assert "any batch size" in result.summary()
    assert result.to_json()["path"] == str(path)


@pytest.mark.parametrize("suffix", FORMATS)
def test_dicts_keywords_constants_and_integer_outputs(suffix, tmp_path):
    batch = {"a": torch.randn(2, 4), "b": torch.randn(2, 3)}
    result = export(Dicts(), tmp_path / f"m.{suffix}", (batch, 2.0), {"mask": torch.randn(2, 1)})
    assert result.dynamic_batch
    assert result.max_difference < 1e-5


def test_names_in_the_file_are_the_models(tmp_path):
    onnx = pytest.importorskip("onnx")
    batch = {"a": torch.randn(2, 4), "b": torch.randn(2, 3)}
    export(Dicts(), tmp_path / "m.onnx", (batch,), {"mask": torch.randn(2, 1)})
    model = onnx.load(tmp_path / "m.onnx")
    assert [entry.name for entry in model.graph.input] == ["batch_a", "batch_b", "mask"]
    assert [entry.name for entry in model.graph.output] == ["logits", "other_0", "other_1"]
    assert {entry.name for entry in model.graph.initializer} >= {"layer.weight", "layer.bias"}
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert b".py" not in (tmp_path / "m.onnx").read_bytes(), (
        "no stack traces, which name paths of this machine"
    )


def test_dataclass_output(tmp_path):
    @dataclass
    class Output:
        logits: torch.Tensor
        loss: torch.Tensor | None = None

    class Model(nn.Module):
        def forward(self, x):
            return Output(x * 2)

    result = export(Model(), tmp_path / "m.onnx", torch.randn(2, 3))
    assert result.max_difference == 0.0


@pytest.mark.slow
def test_hugging_face_decoder_without_cache(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(0, 50, (1, 7))
    result = export(model, tmp_path / "m.onnx", {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert result.dynamic_batch
    assert result.relative_difference < 1e-4


def test_transformer_layer_and_recurrent_layer(tmp_path):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert export(layer, tmp_path / "a.onnx", torch.randn(1, 5, 8)).max_difference < 1e-5

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(3, 5, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0]

    assert export(Recurrent(), tmp_path / "b.onnx", torch.randn(2, 6, 3)).max_difference < 1e-5


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1).sum(1) if x.shape[0] == 2 else x.sum(1)


def test_a_fixed_batch_says_why(tmp_path):
    x = torch.randn(2, 3)
    result = export(FixedBatch(), tmp_path / "m.pt2", x)
    assert not result.dynamic_batch
    assert "fixed" in result.notes[0]
    assert result.checked_batches == [2]
    with pytest.raises(ExportError, match="dynamic batch"):
        export(FixedBatch(), tmp_path / "n.onnx", x, dynamic_batch=True)
    assert not (tmp_path / "n.onnx").exists()
    assert not export(Net(), tmp_path / "o.pt2", torch.randn(1, 3, 8, 8), dynamic_batch=False).dynamic_batch


class Lies(nn.Module):
    """Computes something else while it is captured."""

    def forward(self, x):
        return x * 1.01 if torch.compiler.is_exporting() else x


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_wrong_file_is_an_error_and_replaces_nothing(suffix, tmp_path):
    path = tmp_path / f"m.{suffix}"
    path.write_bytes(b"the old one")
    with pytest.raises(ExportError, match="computes something else"):
        export(Lies(), path, torch.randn(2, 3))
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == {path: b"the old one"}
    result = export(Lies(), path, torch.randn(2, 3), tolerance=0.1)
    assert result.relative_difference == pytest.approx(0.01, rel=0.01)


@pytest.mark.slow
def test_external_weights_are_replaced_together(tmp_path):
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "m.onnx"
    first = export(nn.Linear(40, 40), path, torch.randn(2, 40), external_data=True)
    second = export(nn.Linear(40, 40), path, torch.randn(2, 40), external_data=True)
    assert first.files[1] != second.files[1], "weights are named after their content"
    assert set(tmp_path.iterdir()) == set(second.files)
    location = onnx.load(path, load_external_data=False).graph.initializer[0].external_data[0].value
    assert location == second.files[1].name
    inline = export(nn.Linear(40, 40), path, torch.randn(2, 40))
    assert set(tmp_path.iterdir()) == {path} == set(inline.files)


@pytest.mark.slow
def test_killed_between_the_files_of_openvino(tmp_path, monkeypatch):
    import os

    path, replace = tmp_path / "m.xml", os.replace
    export(nn.Linear(4, 4), path, torch.randn(2, 4))

    def dies(source, target):
        if str(target).endswith(".xml"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("dwindle.export.atomic.os.replace", dies)
    with pytest.raises(KeyboardInterrupt):
        export(nn.Linear(4, 4), path, torch.randn(2, 4))
    assert not path.exists(), "no model beside foreign weights"


@pytest.mark.slow
def test_half_weights(tmp_path):
    model, x = nn.Linear(400, 400), torch.randn(2, 400)
    full = export(model, tmp_path / "f.xml", x)
    half = export(model, tmp_path / "h.xml", x, half_weights=True, tolerance=0.01)
    assert full.max_difference < 1e-5 < half.max_difference
    assert half.bytes < 0.6 * full.bytes


def test_a_program_holds_no_pickle(tmp_path):
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    path = tmp_path / "m.pt2"
    export(model, path, x)
    assert pickled_entries(path) == []
    torch.save({}, tmp_path / "probe")
    with zipfile.ZipFile(path) as archive:
        assert not any(archive.read(entry).startswith(b"PK") for entry in archive.infolist())
    assert torch.equal(read_program(path).module()(x), model(x))


def test_a_program_with_pickle_is_not_read(tmp_path):
    program = torch.export.export(nn.Linear(2, 2), (torch.randn(2, 2),))
    torch.export.save(program, tmp_path / "m.pt2")
    with pytest.raises(FileFormatError, match="pickled"):
        read_program(tmp_path / "m.pt2")
    (tmp_path / "n.pt2").write_bytes(b"nothing")
    with pytest.raises(FileFormatError, match="whole"):
        read_program(tmp_path / "n.pt2")


def test_wrong_calls(tmp_path):
    with pytest.raises(ConfigError, match=r"did you mean '\.onnx'"):
        export(Net(), tmp_path / "m.onx", torch.randn(1, 3, 8, 8))
    with pytest.raises(ConfigError, match="example_inputs"):
        export(Net(), tmp_path / "m.onnx")
    (tmp_path / "d.onnx").mkdir()
    with pytest.raises(ConfigError, match="directory"):
        export(Net(), tmp_path / "d.onnx", torch.randn(1, 3, 8, 8))
    with pytest.raises(ExportError, match="float32"):
        export(Net().bfloat16(), tmp_path / "m.onnx", torch.randn(1, 3, 8, 8).bfloat16())
    assert [entry.name for entry in tmp_path.iterdir()] == ["d.onnx"]


def test_nothing_is_printed(tmp_path, capfd):
    export(Net(), tmp_path / "m.onnx", torch.randn(2, 3, 8, 8))
    with pytest.raises(ExportError):
        export(_Reads(), tmp_path / "n.onnx", torch.randn(2, 3))
    assert capfd.readouterr() == ("", "")


class _Reads(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def test_difference():
    from dwindle.export.comparison import difference

    nan, infinity = float("nan"), float("inf")
    one = torch.tensor([1.0, -4.0, nan, infinity])
    same = difference([one], [one.clone()])
    assert (same.maximum, same.relative, same.problem) == (0.0, 0.0, None)
    other = difference([one], [torch.tensor([1.0, -3.0, nan, infinity])])
    assert (other.maximum, other.relative) == (1.0, 0.25)
    assert other.root_mean_square == pytest.approx(np.sqrt(0.5) / np.sqrt(8.5))
    assert "finite" in difference([one], [torch.tensor([1.0, -4.0, 0.0, infinity])]).problem
    assert "finite" in difference([one], [torch.tensor([nan, -4.0, nan, infinity])]).problem
    assert "shape" in difference([one], [one[:2]]).problem
    assert "outputs" in difference([one], []).problem
    assert difference([torch.tensor([1, 2])], [torch.tensor([1, 3])]).mismatches == 0.5
    assert difference([torch.zeros(2)], [torch.ones(2)]).relative == infinity


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_b_16", "swin_t", "densenet121"])
@pytest.mark.parametrize("suffix", ["onnx", "xml"])
def test_torchvision(name, suffix, tmp_path):
    torchvision = pytest.importorskip("torchvision")
    model = getattr(torchvision.models, name)()
    for parameter in model.parameters():  # heads that start at zero would make the comparison vacuous
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    result = export(model, tmp_path / f"m.{suffix}", F.normalize(torch.randn(1, 3, 224, 224)))
    assert result.dynamic_batch
    assert result.relative_difference < 1e-4
