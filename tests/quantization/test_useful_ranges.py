"""Quantizers in front of functions that are flat somewhere."""

import torch
import torch.nn.functional as F
from torch import nn

from dwindle.quantization import quantize
from dwindle.quantization.operators import get_backend
from dwindle.quantization.placement import place
from dwindle.quantization.recording import record
from dwindle.quantization.simulation import quantization_parameters, simulation_of
from dwindle.quantization.useful_ranges import USEFUL, useful_ranges


class Net(nn.Module):
    def __init__(self, twice=False):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.twice = twice

    def forward(self, x):
        x = self.first(x) * 1.0
        y = self.second(x)
        z = F.hardswish(y)
        return self.last(z + y if self.twice else z)


def ranges(model):
    recording = record(model, (torch.randn(2, 3, 4, 4),), {})
    placement = place(recording, get_backend("onnxruntime"))
    return {
        placement.names[number]: tuple(own) for number, own in useful_ranges(recording, placement).items()
    }


def test_only_what_nothing_else_reads():
    assert ranges(Net()) == {"second/conv2d/0": (-3.0, float("inf"))}
    assert ranges(Net(twice=True)) == {}


def test_the_functions_are_flat_outside():
    x = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    for name, (low, high) in USEFUL.items():
        function = getattr(F, name)
        assert torch.equal(function(x), function(x.clamp(low, high)))


def test_no_level_is_spent_on_what_becomes_zero():
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.second.weight.mul_(20)
    x = torch.randn(8, 3, 6, 6)
    quantized = quantize(model, [x], preset="int8_minmax", bias_correction=False)
    scale, zero_point, _, _ = quantization_parameters(quantized)
    places = simulation_of(quantized).placement.outputs
    number = next(own for key, own in places.items() if key.module == "second")
    with torch.no_grad():
        seen = model.second(model.first(x))
    assert float(seen.min()) < -6
    assert abs(-float(scale[number]) * int(zero_point[number]) + 3.0) <= float(scale[number])
