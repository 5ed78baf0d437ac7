"""``dw.realize`` refuses models of which surgery would take a quantizer off, and changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dwindle as dw
from dwindle import simulate
from dwindle.config import Target
from dwindle.config.errors import ConfigError

X = torch.linspace(-2, 2, 24).reshape(3, 8)


class Halves(nn.Module):
    """A quantizer of activations: to the nearest half."""

    def forward(self, value: Tensor) -> Tensor:
        return (value * 2).round() / 2


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    with torch.no_grad():
        model[0].weight[:16] = 0.0
        model[0].bias[:16] = 0.0
    return model


@pytest.mark.parametrize("name", ["2._input_0", "0._output_0", "1._output_0"])
def test_quantized_inputs_and_outputs(name: str) -> None:
    model = network()
    simulate.register_simulator(model, Target.parse(name), Halves(), "quantize")
    expected = model(X)
    with pytest.raises(ConfigError, match=f"{name} is quantized by a Halves, which would be lost"):
        dw.realize(model, example_inputs=(X,))
    assert torch.equal(model(X), expected)
    simulate.detach(model, stage="quantize")
    assert dw.realize(model, example_inputs=(X,)).model[0].out_features == 16


def test_packed_weights() -> None:
    small = dw.quantize_weights(network(), 4, 8)
    expected = small(X)
    with pytest.raises(ConfigError, match=r"0.weight is stored in packed integers.*after dw.realize"):
        dw.realize(small, example_inputs=(X,))
    assert torch.equal(small(X), expected)
    cut = dw.realize(network(), example_inputs=(X,)).model
    assert torch.allclose(dw.quantize_weights(cut, 8, None)(X), network()(X), atol=0.05)
