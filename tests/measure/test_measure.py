"""Runtimes, and ``dw.measure`` as a whole."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import dwindle.measure
from dwindle.config.errors import ConfigError, ExportError, MissingDependencyError
from dwindle.measure import Comparison, Measurement, OpenVinoRuntime, get_runtime, measure


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
        self.last = nn.Linear(width, 5)

    def forward(self, image, scale=1.0, *, shift):
        features = self.norm(self.conv(image)).relu().mean((2, 3))
        return {"logits": self.last(features) * scale + shift, "features": [features]}


@pytest.fixture(scope="module")
def call():
    torch.manual_seed(0)
    return (torch.randn(2, 3, 9, 9),), {"shift": torch.randn(2, 1)}


@pytest.mark.parametrize("name", ["torch", "onnxruntime", "openvino"])
def test_a_session_is_called_like_the_model(name, call):
    model = Net()
    session = get_runtime(name, threads=1).session(model, *call)
    with torch.no_grad():
        expected = model.eval()(*call[0], **call[1])
        other = model(image=call[0][0][:1] * 2, shift=torch.ones(1, 1))
    model.train()
    found = session(*call[0], **call[1])
    assert list(found) == ["logits", "features"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found = session(shift=torch.ones(1, 1), image=call[0][0][:1] * 2)  # another order, another batch
    torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)
    assert model.training


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_session_of_a_file(name, tmp_path):
    from dwindle.export import export

    model, x = nn.Linear(3, 2).eval(), torch.randn(2, 3)
    export(model, tmp_path / "m.onnx", (x,), verify=False)
    session = get_runtime(name).session(tmp_path / "m.onnx")
    torch.testing.assert_close(session(x), model(x).detach())
    torch.testing.assert_close(session(input=x), model(x).detach())
    with pytest.raises(ConfigError, match="no file"):
        get_runtime(name).session(tmp_path / "n.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="cannot load"):
        get_runtime(name).session(tmp_path / "bad.onnx")


def test_outputs_do_not_change_with_the_next_call():
    model = nn.Linear(3, 2)
    for name in ("onnxruntime", "openvino"):
        session = get_runtime(name).session(model, (torch.randn(2, 3),))
        first = session(torch.ones(2, 3))
        kept = first.clone()
        session(torch.zeros(2, 3))
        assert torch.equal(first, kept)


def test_openvino_precision_is_stated():
    assert get_runtime("openvino").precision == "f32"
    assert get_runtime("openvino").label == "openvino"
    assert get_runtime("openvino:bf16").label == "openvino:bf16"
    assert get_runtime("openvino:default").precision is None
    model, x = nn.Linear(64, 64), torch.randn(2, 64)
    handle = OpenVinoRuntime().session(model, (x,))._handle
    assert handle.get_compiled_model().get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    with pytest.raises(ConfigError, match="did you mean 'bf16'"):
        OpenVinoRuntime(precision="bf-16")


def test_names_and_errors(monkeypatch):
    with pytest.raises(ConfigError, match="did you mean 'onnxruntime'"):
        get_runtime("onnx-runtime")
    with pytest.raises(ConfigError, match="precision"):
        get_runtime("torch:bf16")
    with pytest.raises(ConfigError, match="threads"):
        get_runtime("torch", threads=0)
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r"dwindle\[openvino\]"):
        measure(nn.Linear(2, 2), (torch.ones(1, 2),))


def test_bfloat16_inputs_are_refused_clearly():
    with pytest.raises(ExportError, match="'weight' is bfloat16"):
        get_runtime("onnxruntime").session(nn.Linear(2, 2).bfloat16(), (torch.ones(2, 2).bfloat16(),))


def test_measure_two_models(call):
    seen = []

    def accuracy(model):
        seen.append(model)
        return float(model(*call[0], **call[1])["logits"].shape[1])

    models = {"big": Net(8), "small": Net(4)}
    found = dwindle.measure(models, *call, accuracy=accuracy, repeats=4, warmup=1, threads=1)
    big, small = found["big"], found["small"]
    assert big.parameters == 8 * 27 + 8 + 16 + 5 * 8 + 5
    assert big.macs == 2 * (49 * 8 * 27 + 40)
    assert big.macs_per_sample == 49 * 8 * 27 + 40
    assert big.macs_by_module["conv"] == 2 * 49 * 8 * 27
    assert big.batch == 2
    assert small.macs < big.macs
    assert small.peak_activation_bytes < big.peak_activation_bytes
    assert set(big.bytes_on_disk) == {"safetensors", "onnxruntime", "openvino"}
    assert set(big.latency) == set(small.latency) == {"torch", "onnxruntime", "openvino"}
    assert all(
        0 < entry.minimum <= entry.p50 <= entry.p90 and entry.runs == 4 for entry in big.latency.values()
    )
    assert big.accuracy == {"torch": 5.0, "onnxruntime": 5.0, "openvino": 5.0}
    assert len(seen) == 6
    assert all(model.training for model in models.values())
    assert Comparison.from_json(json.loads(json.dumps(found.to_json()))) == found
    text = str(found)
    assert "faster" in text or "slower" in text
    assert "latency, onnxruntime, p50" in text


def test_measure_one_model_with_a_batch(call):
    before = torch.get_num_threads()
    found = measure(Net(), *call, runtimes=["torch"], batch=6, threads=1, repeats=2)
    assert isinstance(found, Measurement)
    assert found.batch == 6
    assert found.macs == 6 * (49 * 8 * 27 + 40)
    assert found.threads == 1
    assert torch.get_num_threads() == before
    assert found.table().row_count == 6
    assert measure(Net(), *call, runtimes=["torch"], latency=False).latency == {}


def test_latency_runs_are_interleaved(call, monkeypatch):
    order = []

    class Logs(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name, self.layer = name, nn.Linear(2, 2)

        def forward(self, x):
            if torch.is_inference_mode_enabled():  # only the timed calls
                order.append(self.name)
            return self.layer(x)

    measure({"a": Logs("a"), "b": Logs("b")}, (torch.ones(1, 2),), runtimes=["torch"], warmup=1, repeats=10)
    assert len(order) == 22
    assert all(set(order[i : i + 2]) == {"a", "b"} for i in range(0, 22, 2))


class Refuses(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum().item() > 0 else x


def test_a_runtime_that_cannot_is_raised_or_recorded():
    with pytest.raises(ExportError, match=r"torch\.export refuses"):
        measure(Refuses(), (torch.ones(2),), runtimes=["torch", "onnxruntime"])
    found = measure(
        Refuses(), (torch.ones(2),), runtimes=["torch", "onnxruntime"], on_error="record", repeats=2
    )
    assert "refuses" in found.failures["onnxruntime"]
    assert set(found.latency) == {"torch"}


def test_bad_arguments():
    with pytest.raises(ConfigError, match="batch"):
        measure(nn.Linear(2, 2), (torch.ones(1, 2),), batch=0)
    with pytest.raises(ConfigError, match="'b' is a int"):
        measure({"b": 3}, (torch.ones(1, 2),))
    with pytest.raises(ConfigError, match="no model"):
        measure({}, (torch.ones(1, 2),))


def test_a_new_runtime_is_one_class():
    from dwindle.measure import TorchRuntime

    runs = []

    class Counting(TorchRuntime):
        name = "counting"

        def run(self, handle, feed):
            runs.append(feed)
            return super().run(handle, feed)

    found = measure(nn.Linear(2, 2), (torch.ones(1, 2),), runtimes=[Counting()], warmup=1, repeats=2)
    assert set(found.latency) == {"counting"}
    assert len(runs) == 3
