"""Accuracy-aware quantization: the harmful layer goes back to float, no other; bad bounds are refused."""

import pytest
import torch
from torch import nn

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.quantization import is_quantized, quantize, quantize_within

TWO_BITS = [{"op_names": ["4"], "target_names": ["weight"], "quant_dtype": "int2"}]


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    ).eval()
    x = torch.randn(64, 6)
    with torch.no_grad():
        target = model(x)

    def evaluate(candidate):
        with torch.no_grad():
            return -float((candidate(x) - target).square().mean() / target.square().mean())

    return model, x, evaluate


def test_the_harmful_layer_goes_back(made):
    model, x, evaluate = made
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = quantize_within(model, iter([x]), evaluate, 1e-3, quantize, config_list=TWO_BITS)
    assert result.reverted == ["4"]
    assert max(result.gains, key=result.gains.get) == "4"
    assert result.first_quality < -1e-3 <= result.quality
    assert result.drop <= 1e-3
    assert result.quality == evaluate(result.model)
    assert {key.module for key in result.model._dwindle_quantization.slots} == {"0", "2", "6"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not is_quantized(model)
    through = quantize(model, [x], config_list=TWO_BITS, evaluate=evaluate, max_drop=1e-3)
    with torch.no_grad():
        assert torch.equal(through(x), result.model(x))


def test_gains_are_those_of_a_model_with_one_layer_in_float(made):
    model, x, evaluate = made
    result = quantize_within(
        model, [x], evaluate, 1e-3, quantize, config_list=TWO_BITS, bias_correction=False
    )
    assert set(result.gains) == {"0", "2", "4", "6"}
    for name, gain in result.gains.items():
        entry = {"op_names": [name], "target_names": ["_input_0"], "quant_dtype": None}
        alone = quantize(model, [x], config_list=[*TWO_BITS, entry], bias_correction=False)
        assert gain == pytest.approx(evaluate(alone) - result.first_quality, rel=0.02, abs=2e-5)


def test_nothing_goes_back_within_the_bound(made):
    model, x, evaluate = made
    result = quantize_within(model, [x], evaluate, 0.5, quantize)
    assert result.reverted == []
    assert result.gains == {}


def test_what_is_refused(made):
    model, x, evaluate = made
    with pytest.raises(ConfigError, match="negative"):
        quantize(model, [x], evaluate=evaluate, max_drop=-0.1)
    with pytest.raises(DwindleError, match="nan"):
        quantize(model, [x], evaluate=lambda candidate: float("nan"))
    with pytest.raises(ConfigError, match="more than max_drop"):
        quantize(model, [x], evaluate=lambda candidate: 0.0 if is_quantized(candidate) else 1.0)
    with pytest.raises(ConfigError, match="no batch"):
        quantize(model, [], evaluate=evaluate)
