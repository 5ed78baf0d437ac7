"""NNI's quantizers under their names, with the arguments of 3.0 and of 2.x."""

from __future__ import annotations

import copy
import importlib

import numpy as np
import pytest
import torch
from torch import nn

from dwindle.compat.nni.compression import TorchEvaluator
from dwindle.compat.nni.compression import quantization as v3
from dwindle.compat.nni.compression.pytorch import quantization as v2
from dwindle.config.errors import ConfigError
from dwindle.quantization import compare, is_quantized


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.hidden, self.head = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(torch.relu(self.hidden(x)))


def data(count: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    labels = [torch.randint(0, 3, (16,), generator=generator) for _ in range(count)]
    return [(torch.randn(16, 1, 6, 6, generator=generator) + y[:, None, None, None], y) for y in labels]


BATCHES = data()


def training_step(batch, model):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(model, optimizer, step, lr_scheduler, max_steps, max_epochs):
    model.train()
    for index in range(max_steps or 12 * (max_epochs or 1)):
        optimizer.zero_grad()
        step(BATCHES[index % len(BATCHES)], model).backward()
        optimizer.step()
        if lr_scheduler is not None:
            lr_scheduler.step()


def made():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    return model, optimizer, TorchEvaluator(train, optimizer, training_step, scheduler)


CONFIG = [{"op_names": ["hidden", "conv"], "quant_dtype": "int8", "granularity": "out_channel"}]


def test_ptq_observes_without_training():
    model, optimizer, evaluator = made()
    before, rate = copy.deepcopy(model.state_dict()), optimizer.param_groups[0]["lr"]
    float_copy = copy.deepcopy(model).eval()
    quantized, calibration = v3.PtqQuantizer(model, CONFIG, evaluator).compress(max_steps=6, max_epochs=None)
    assert quantized is model
    assert is_quantized(model)
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == rate
    for name in ("head.weight", "head.bias", "hidden.weight"):  # named or not, no weight was trained
        assert torch.equal(model.state_dict()[name], before[name])
    assert set(calibration) == {"conv", "hidden"}  # and nothing else is quantized
    entry = calibration["hidden"]["weight"]
    assert (entry["quant_dtype"], entry["quant_bits"], entry["quant_scheme"]) == ("int8", 8, "symmetric")
    reach = before["hidden.weight"].abs().amax(1)
    assert (entry["tracked_max"] >= reach * 0.999).all()
    assert (entry["tracked_max"] <= reach * 2.1).all()  # at most one bit for processors that saturate
    inputs = [x for x, _ in BATCHES[:6]]
    assert float(calibration["conv"]["_input_0"]["tracked_max"]) == pytest.approx(
        max(float(x.abs().max()) for x in inputs), rel=0.02
    )
    x = BATCHES[7][0]
    with torch.no_grad():
        assert compare(float_copy(x).numpy(), model(x).numpy()).sqnr_db > 25


@pytest.mark.parametrize("name", ["QATQuantizer", "LsqQuantizer", "LsqPlusQuantizer", "DoReFaQuantizer"])
def test_training_quantizers_of_3(name, tmp_path):
    model, _, evaluator = made()
    config = [
        {
            "op_types": ["Linear", "Conv2d"],
            "target_names": ["weight", "_input_"],
            "target_settings": {
                "weight": {"quant_dtype": "int4"},
                "_input_0": {"quant_dtype": "uint4", "quant_scheme": "affine"},
            },
        }
    ]
    quantizer = getattr(v3, name)(model, config, evaluator)
    trained, calibration = quantizer.compress(max_steps=36, max_epochs=None)
    assert trained is model
    assert set(calibration) == {"conv", "hidden", "head"}
    x, y = torch.cat([x for x, _ in BATCHES]), torch.cat([y for _, y in BATCHES])
    integer = quantizer.integer_model()
    with torch.no_grad():
        assert (model.eval()(x).argmax(1) == y).double().mean() > 0.5  # chance is a third
        assert (integer(x).argmax(1) == model(x).argmax(1)).double().mean() > 0.98
    quantizer.export_model(tmp_path / "m.pt", tmp_path / "c.pt")
    assert set(torch.load(tmp_path / "c.pt", weights_only=False)) == set(calibration)
    plain = quantizer.unwrap_model()
    assert set(plain.state_dict()) == set(Net().state_dict())


def test_start_step_is_heeded():
    model, _, evaluator = made()
    quantizer = v3.QATQuantizer(model, CONFIG, evaluator, quant_start_step=5)
    seen = []

    def watch(module, args):
        if module.training and quantizer.own is not None and quantizer.own.bank is not None:
            seen.append(quantizer.own.bank.rounds_weights)

    model.register_forward_pre_hook(watch)
    quantizer.compress(max_steps=8, max_epochs=None)
    assert seen[:8] == [False] * 5 + [True] * 3
    with pytest.raises(ConfigError, match="quant_start_step"):
        v3.QATQuantizer(made()[0], CONFIG, evaluator, quant_start_step=-1)


def test_binary():
    config = [{"op_names": ["hidden"], "target_names": ["weight", "_input_"], "quant_dtype": "int8"}]
    model, _, evaluator = made()
    quantizer = v3.BNNQuantizer(model, config, evaluator)
    quantizer.compress(max_steps=4, max_epochs=None)
    assert set(model.hidden.weight.detach().unique().tolist()) <= {-1.0, 1.0}
    quantizer.unwrap_model()
    assert len(model.hidden.weight.detach().unique()) > 2


LEGACY = [{"quant_types": ["weight"], "quant_bits": {"weight": 8}, "op_types": ["Conv2d", "Linear"]}]


@pytest.mark.filterwarnings("ignore:config_list has the form")
def test_naive_quantizer():
    model, _, _ = made()
    before = copy.deepcopy(model)
    quantizer = v2.NaiveQuantizer(model, LEGACY)
    assert quantizer.compress() is model
    for name in ("conv", "hidden", "head"):
        weight = before.get_submodule(name).weight.detach().double().numpy()
        scale = np.abs(weight).max() / 127
        expected = np.round(weight / scale) * scale
        np.testing.assert_allclose(model.get_submodule(name).weight.detach().numpy(), expected, atol=1e-6)
        assert quantizer.layer_scale[name] == pytest.approx(scale, rel=1e-6)


@pytest.mark.filterwarnings("ignore:config_list has the form")
def test_observer_quantizer():
    model, _, _ = made()
    model.eval()
    plain = copy.deepcopy(model)
    config = [
        {
            "quant_types": ["weight", "input"],
            "quant_bits": {"weight": 8, "input": 8},
            "op_types": ["Conv2d", "Linear"],
        }
    ]
    quantizer = v2.ObserverQuantizer(model, config)
    with pytest.raises(ConfigError, match="run the model on some data"):
        quantizer.compress()
    with torch.no_grad():
        for x, _ in BATCHES:
            model(x)
    assert quantizer.compress() is model
    with torch.no_grad():
        x = BATCHES[0][0]
        assert compare(plain(x).numpy(), model(x).numpy()).sqnr_db > 25
    assert set(quantizer.get_calibration_config()) == {"conv", "hidden", "head"}


@pytest.mark.filterwarnings("ignore:config_list has the form")
@pytest.mark.parametrize("name", ["QAT_Quantizer", "LsqQuantizer", "DoReFaQuantizer"])
def test_training_quantizers_of_2_follow_the_optimizer(name, tmp_path):
    model, optimizer, _ = made()
    config = [
        {
            "quant_types": ["weight", "input"],
            "quant_bits": {"weight": 8, "input": 8},
            "quant_dtype": {"weight": "int", "input": "uint"},
            "op_types": ["Linear"],
            "quant_start_step": 2,
        }
    ]
    quantizer = getattr(v2, name)(model, config, optimizer, dummy_input=BATCHES[0][0])
    assert quantizer.compress() is model
    train(model, optimizer, training_step, None, 6, None)
    assert quantizer.own.steps == 6
    path = tmp_path / "model.onnx"
    calibration = quantizer.export_model(tmp_path / "m.pt", onnx_path=path, input_shape=(2, 1, 6, 6))
    assert set(calibration) == {"hidden", "head"}
    assert path.stat().st_size > 0


def test_mistakes():
    model, _, evaluator = made()
    with pytest.raises(ConfigError, match="quantizes nothing"):
        v3.PtqQuantizer(model, [{"op_names": ["head"], "quant_dtype": None}], evaluator)
    with pytest.raises(ConfigError, match="LsqQuantizer needs an evaluator"):
        v3.LsqQuantizer(model, CONFIG).compress(2, None)
    with pytest.raises(ConfigError, match="LsqQuantizer needs the optimizer"):
        v2.LsqQuantizer(model, CONFIG, dummy_input=BATCHES[0][0]).compress()
    with pytest.raises(ConfigError, match="evaluator must be"):
        v3.PtqQuantizer(model, CONFIG, torch.optim.SGD(model.parameters(), 0.1))
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("compression.quantization", ["QATQuantizer", "PtqQuantizer", "LsqPlusQuantizer", "BNNQuantizer"]),
        ("compression.pytorch.quantization", ["NaiveQuantizer", "ObserverQuantizer", "QAT_Quantizer"]),
        (
            "algorithms.compression.pytorch.quantization",
            ["NaiveQuantizer", "BNNQuantizer", "DoReFaQuantizer"],
        ),
    ],
)
def test_paths(path, names):
    module = importlib.import_module(f"dwindle.compat.nni.{path}")
    assert all(hasattr(module, name) for name in names)
