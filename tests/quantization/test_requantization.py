"""Ratios of scales: no integer sum near a half, and files that equal their simulation."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dwindle as dw
from dwindle.quantization import quantize
from dwindle.quantization.requantization import odd_at_least, settled_weight_scale
from dwindle.quantization.simulation import quantization_parameters, simulation_of
from quantization.models import with_statistics
from quantization.test_runtimes import in_onnxruntime, in_openvino

EPSILON = 2.0**-23


def from_half(values):
    """Distance of each value to the nearest half of a level."""
    return np.abs(values - np.floor(values) - 0.5)


@pytest.mark.parametrize("unit", [0.0231, 1.7, 3e-4])
def test_no_integer_sum_is_near_a_half(unit):
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(200, generator=generator).double().mul(9).sub(10).exp().float()
    settled = settled_weight_scale(scale, 0.0117, unit)
    growth = settled.double() / scale.double()
    assert growth.min() >= 1.0
    assert growth.max() < 1.02
    sums = np.arange(-60_000, 60_000)
    for value in settled.tolist():
        ratio = Fraction(0.0117) * Fraction(value) / Fraction(unit)
        if ratio < Fraction(1, 4095):
            continue  # so small a weight that halves are as near as with any ratio
        near = ratio.limit_denominator(8192)
        assert abs(near / ratio - 1) < EPSILON
        assert near.denominator % 2 == 1
        places = sums * (0.0117 * value / unit)
        inside = np.abs(places) < 256
        margin = 0.5 / near.denominator
        assert from_half(places[inside]).min() > margin - 256 * 2 * EPSILON


def test_odd_numbers():
    assert [odd_at_least(number) for number in (0.2, 1.0, 1.01, 2.0, 3.0, 33.5)] == [1, 1, 3, 3, 3, 35]


class Net(nn.Module):
    """Every meeting of scales: two kinds of sums, a gate, a joined pair, averages, smooth activations."""

    def __init__(self, smooth=True):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.deep, self.deep_norm = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.point = nn.Conv2d(16, 16, 1)
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.left, self.right = nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.Conv2d(16, 24, 1, stride=2)
        self.other, self.fc = nn.Conv2d(24, 8, 1), nn.Linear(32, 10)
        self.smooth = smooth

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        y = F.relu6(self.deep_norm(self.deep(x)))
        x = x + self.point(y)
        if self.smooth:
            y = F.hardswish(self.point(x))
            gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
            x = x + self.point(y * gate)
        x = F.relu(self.left(x) + self.right(x))
        x = torch.cat([x, F.relu(self.other(x))], 1)
        return self.fc(F.adaptive_avg_pool2d(F.max_pool2d(x, 2), 1).flatten(1))


def pictures(count):
    """Bytes, normalized."""
    generator = torch.Generator().manual_seed(count)
    noise = torch.randn(count, 3, 24, 24, generator=generator)
    smooth = F.avg_pool2d(noise, 5, 1, 2) * 3 + noise * 0.3
    return ((smooth * 0.2 + 0.5).clamp(0, 1) * 255).round() / 255 * 4 - 2


def built(smooth=True):
    torch.manual_seed(0)
    return with_statistics(Net(smooth), pictures(64))


@pytest.mark.parametrize(("backend", "runtime"), [("onnxruntime", in_onnxruntime), ("openvino", in_openvino)])
def test_the_file_gives_what_the_simulation_gives(tmp_path, backend, runtime):
    model, x = built(), pictures(48)
    quantized = quantize(model, [pictures(64)], backend=backend)
    path = tmp_path / "model.onnx"
    dw.export(quantized, path, x[:2])
    with torch.no_grad():
        simulated = quantized(x)
    real = torch.from_numpy(runtime(path)(x.numpy())[0])
    # The last layer gives floats, summed in integers in both: nothing but the rounding of a float is left.
    torch.testing.assert_close(real, simulated, rtol=1e-5, atol=1e-6)


def test_scales_meet_in_odd_ratios():
    quantized = quantize(built(smooth=False), [pictures(64)], bias_correction=False)
    scale, _, weight, _ = (own.double() for own in quantization_parameters(quantized))
    simulation = simulation_of(quantized)
    placement = simulation.placement
    behind = {key.module: number for key, number in placement.outputs.items()}
    by_name = {str(key): number for key, number in placement.outputs.items()}
    for key, slot in simulation.slots.items():
        if key.module not in ("point", "left", "right"):
            continue
        ratio = (
            scale[slot.place.input_quantizer]
            * weight[slot.start : slot.start + slot.length]
            / scale[behind[key.module]]
        )
        for value in ratio.tolist():
            near = Fraction(value).limit_denominator(100_000)
            assert near.denominator % 2 == 1
            assert math.isclose(near, value, rel_tol=3 * EPSILON)
    first, second = scale[by_name["left/conv2d/0"]], scale[by_name["right/conv2d/0"]]
    result = scale[by_name["(model)/relu/1"]]
    places = np.arange(-255, 256)[:, None] * float(first / result) + np.arange(-255, 256) * float(
        second / result
    )
    assert from_half(places).min() > 1e-4


def test_bytes_keep_clear_of_halves():
    x = pictures(16)
    settled, plain = (
        quantize(built(), [x], observer="histogram", settle_scales=own, bias_correction=False)
        for own in (True, False)
    )
    values = x.unique().double().numpy()
    distances = []
    for model in (settled, plain):
        scale, zero_point, _, _ = quantization_parameters(model)
        number = next(iter(simulation_of(model).placement.inputs.values()))[0,]
        levels = values / float(scale[number]) + int(zero_point[number])
        inside = (levels > 0) & (levels < 255)
        distances.append(from_half(levels[inside]).min())
    assert distances[0] >= distances[1]
    assert distances[0] > 1e-3


def test_a_bounded_activation_keeps_its_scale():
    """Behind a ReLU6 the quantizer ends at 6, so that runtimes can leave the bound out."""
    for settle in (True, False):
        quantized = quantize(built(), [pictures(64)], settle_scales=settle)
        scale, zero_point, _, _ = quantization_parameters(quantized)
        number = next(
            n for key, n in simulation_of(quantized).placement.outputs.items() if key.operation == "relu6"
        )
        assert float(scale[number]) * (255 - int(zero_point[number])) <= 6.0
