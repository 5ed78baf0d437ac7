"""The three ways to correct biases against means that NumPy computes."""

import numpy as np
import pytest
import torch
from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.quantization import quantization_parameters, quantize

FOUR_BITS = [{"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int4"}]


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    return model, [torch.randn(size, 6) * scale + 1 for size, scale in ((40, 1.0), (24, 3.0), (8, 0.3))]


def outputs(model, batches, index):
    with torch.no_grad():
        return torch.cat([model[: index + 1](x) for x in batches]).double().numpy()


def hidden(quantized, batches, index):
    """Outputs of one layer inside the simulation."""
    seen = []
    handle = quantized[index].register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    with torch.no_grad():
        for x in batches:
            quantized(x)
    handle.remove()
    return torch.cat(seen).double().numpy()


@pytest.mark.parametrize("index", [0, 2, 4])
def test_sequential_restores_every_mean_exactly(made, index):
    """The int32 bias is rounded to steps of input scale times weight scale: that is the only difference left."""
    model, batches = made
    quantized = quantize(model, batches, config_list=FOUR_BITS, bias_correction="sequential")
    scale, _, weight, _ = quantization_parameters(quantized)
    slot = next(s for k, s in quantized._dwindle_quantization.slots.items() if k.module == str(index))
    step = scale[slot.place.input_quantizer] * weight[slot.start : slot.start + slot.length]
    expected = outputs(model, batches, index).mean(0)
    # behind the layer its own quantizer stands, if it has one: the hook sees what the layer gave
    got = hidden(quantized, batches, index).mean(0)
    assert np.all(np.abs(got - expected) <= step.numpy() / 2 + 1e-5)
    plain = quantize(model, batches, config_list=FOUR_BITS, bias_correction=False)
    assert np.abs(hidden(plain, batches, index).mean(0) - expected).max() > 5 * np.abs(got - expected).max()


def test_fast_is_each_layers_own_shift(made):
    model, batches = made
    plain = quantize(model, batches, config_list=FOUR_BITS, bias_correction=False)
    fast = quantize(model, batches, config_list=FOUR_BITS, bias_correction="fast")
    scales, zero_points, weights, _ = (p.double().numpy() for p in quantization_parameters(plain))
    for key, slot in plain._dwindle_quantization.slots.items():
        layer = model[int(key.module)]
        w, b = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
        s = weights[slot.start : slot.start + slot.length]
        activation, zero = scales[slot.place.input_quantizer], zero_points[slot.place.input_quantizer]
        rounded = np.clip(np.round(w / s[:, None]), -7, 7) * s[:, None]
        shifts = []
        for x in batches:
            data = x.double().numpy() if key.module == "0" else outputs(model, [x], int(key.module) - 1)
            levels = (np.clip(np.round(data / activation) + zero, 0, 255) - zero) * activation
            shifts.append((data @ w.T + b).mean(0) - (levels @ rounded.T + b).mean(0))
        expected = b + np.mean(shifts, axis=0)
        np.testing.assert_allclose(fast[int(key.module)].bias.detach().numpy(), expected, atol=2e-4)


def test_running_comes_close(made):
    model, batches = made
    expected = outputs(model, batches, 4).mean(0)

    def gap(method):
        quantized = quantize(model, batches, config_list=FOUR_BITS, bias_correction=method)
        return np.abs(hidden(quantized, batches, 4).mean(0) - expected).max()

    plain = gap(False)
    assert gap("sequential") < gap(True) < 0.5 * plain
    assert gap("fast") < plain


def test_names(made):
    with pytest.raises(ConfigError, match="did you mean 'sequential'"):
        quantize(*made, bias_correction="sequentiel")
