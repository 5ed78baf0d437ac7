"""Quantized layers as integer layers in torch: the simulation's numbers, saved and loaded, and what is refused."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import dwindle as dw
from dwindle.config.errors import ConfigError, RealizeError
from dwindle.quantization import NumberFormat, TrainingQuantizer, is_quantized
from dwindle.realize import IntegerConvolution, IntegerLinear


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding="same", groups=16)
        self.point, self.dilated = nn.Conv2d(16, 24, 1), nn.Conv2d(24, 16, 3, dilation=2, padding=2, groups=2)
        self.hidden, self.last = nn.Linear(16, 32), nn.Linear(32, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + torch.relu(self.dilated(torch.relu(self.point(self.depthwise(x)))))
        return self.last(torch.tanh(self.hidden(x.mean((2, 3)))))


def build():
    torch.manual_seed(0)
    return Net().eval(), torch.randn(6, 3, 12, 12)


def sequence():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3, bias=False)).eval(), torch.randn(
        3, 4, 20
    )


def volume():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv3d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 4, 1)).eval()
    return model, torch.randn(2, 2, 6, 6, 6)


@pytest.mark.parametrize("make", [build, sequence, volume])
def test_the_packed_model_is_the_simulation(make):
    model, x = make()
    quantized = dw.quantize(model, [x], backend="torch")
    with torch.no_grad():
        expected = quantized(x)
        result = dw.pack_integers(quantized, x)
        assert not result.left
        assert result.sqnr > 100
        assert result.model is quantized
        assert not is_quantized(quantized)  # nothing is simulated any more
        assert torch.allclose(quantized(x), expected, atol=1e-5)
        assert torch.allclose(copy.deepcopy(quantized)(x[:1]), expected[:1], atol=1e-5)
        assert torch.allclose(quantized.half().float()(x), expected, atol=1e-5)  # scales stay what they are
    assert result.bytes["after"] < 0.6 * result.bytes["before"]
    assert "layers packed" in result.summary()


def test_a_layer_against_integers_in_numpy():
    torch.manual_seed(2)
    integers = torch.randint(-63, 64, (5, 7), dtype=torch.int8)  # older processors add pairs in 16 bits
    scale, bias = torch.rand(5) * 0.1, torch.randn(5)
    for form, zero in ((NumberFormat.parse("uint8"), 31), (NumberFormat.parse("int8"), 0)):
        layer = IntegerLinear(integers, scale, bias, torch.tensor(0.07), torch.tensor(zero), form)
        x = torch.randn(3, 2, 7) * 4
        levels = (
            np.clip(np.round(x.double().numpy() / np.float32(0.07)) + zero, form.lowest, form.highest) - zero
        )
        product = levels @ integers.double().numpy().T
        expected = product * scale.double().numpy() * np.float32(0.07) + bias.double().numpy()
        np.testing.assert_allclose(layer(x).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_saved_and_loaded(tmp_path):
    model, x = build()
    quantized = dw.quantize(model, [x], backend="torch")
    dw.pack_integers(quantized, x)
    with torch.no_grad():
        expected = quantized(x)
        dw.save(quantized, tmp_path / "packed")
        loaded = dw.load(tmp_path / "packed", Net)
        assert isinstance(loaded.stem, IntegerConvolution)
        assert torch.equal(loaded(x), expected)


def test_divided_outliers_and_hooks_come_along(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.LayerNorm(32), nn.Linear(32, 8)).eval()
    with torch.no_grad():
        model[1].weight[3] = 60.0  # one channel far larger than the rest
    x = torch.randn(64, 24)
    seen = []
    model[2].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    quantized = dw.quantize(model, [x], backend="torch", preset="int8_transformer")
    assert any("_dwindle_input_factor" in name for name, _ in quantized.named_buffers())
    with torch.no_grad():
        expected = quantized(x)
        assert dw.pack_integers(quantized, x).sqnr > 60
        seen.clear()
        assert torch.allclose(quantized(x), expected, atol=1e-4)
        assert seen == [(64, 8)]
        dw.save(quantized, tmp_path / "packed")
        fresh = lambda: nn.Sequential(nn.Linear(24, 32), nn.LayerNorm(32), nn.Linear(32, 8))
        assert torch.equal(dw.load(tmp_path / "packed", fresh)(x), quantized(x))


def test_after_training_with_quantizers():
    model, x = build()
    quantizer = TrainingQuantizer(model, calibration_data=[x], method="lsq", bits=4)
    with dw.compress(model, [quantizer]) as run:
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        run.add_parameters_to(optimizer)
        model.train()(x).square().mean().backward()
        optimizer.step()
        run.step()
    model.eval()
    finished = quantizer.finish()
    assert dw.pack_integers(finished, x).sqnr > 60
    with torch.no_grad():
        assert torch.allclose(finished(x), model(x), atol=1e-3)


def test_what_no_kernel_takes_stays_simulated():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(3, 5, 16)
    quantized = dw.quantize(layer, [x], backend="torch")
    with torch.no_grad():
        expected = quantized(x)
        result = dw.pack_integers(quantized, x)
        assert set(result.kernels) == {"linear1", "linear2"}
        assert all("self_attn" in name for name in result.left)
        assert result.left
        assert is_quantized(quantized)
        assert torch.allclose(quantized(x), expected, atol=1e-5)


def test_refused():
    model, x = build()
    with pytest.raises(ConfigError, match=r"quantize"):
        dw.pack_integers(model, x)
    with pytest.raises(ConfigError, match="backend='torch'"):
        dw.pack_integers(dw.quantize(model, [x]), x)
    circular = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")).eval()
    with pytest.raises(ConfigError, match="circular"):
        dw.pack_integers(dw.quantize(circular, [x], backend="torch"), x)
    quantized = dw.quantize(model, [x], backend="torch")
    expected = quantized(x)
    with pytest.raises(RealizeError, match="unchanged"):
        dw.pack_integers(quantized, x, least_sqnr=float("nan"))
    assert type(quantized.stem) is nn.Conv2d
    assert torch.equal(quantized(x), expected)
