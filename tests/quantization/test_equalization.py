"""Equalization and SmoothQuant against float64 references of the papers' formulas."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.quantization.equalization import equalize, equalizing_factors
from dwindle.quantization.free_scales import find_free_scales
from dwindle.quantization.smoothing import smooth, smoothing_factors
from quantization.test_free_scales import convolutions


def chain():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-2, 2, 7)[:, None])
        model[2].weight.mul_(torch.logspace(1, -1, 6)[:, None])
    return model.double().eval(), torch.randn(30, 5).double()


def reference(weights, biases, rounds=2000):
    """Nagel et al., equation 11, pair after pair, on NumPy copies."""
    weights, biases = [w.copy() for w in weights], [b.copy() for b in biases]
    for _ in range(rounds):
        for i in range(len(weights) - 1):
            first, second = np.abs(weights[i]).max(1), np.abs(weights[i + 1]).max(0)
            s = np.sqrt(first * second) / second
            weights[i] /= s[:, None]
            biases[i] /= s
            weights[i + 1] *= s
    return weights, biases


def test_a_chain_of_layers():
    model, x = chain()
    expected = model(x)
    layers = [model[i] for i in (0, 2, 4)]
    weights, biases = reference(
        [m.weight.detach().numpy() for m in layers], [m.bias.detach().numpy() for m in layers]
    )
    equalize(model, find_free_scales(model, (x,), {}))
    for layer, weight, bias in zip(layers, weights, biases, strict=True):
        np.testing.assert_allclose(layer.weight.detach().numpy(), weight, rtol=2e-3)
        np.testing.assert_allclose(layer.bias.detach().numpy(), bias, rtol=2e-3)
    for first, second in itertools.pairwise(layers):
        torch.testing.assert_close(first.weight.abs().amax(1), second.weight.abs().amax(0), rtol=1e-3, atol=0)
    torch.testing.assert_close(model(x), expected)


def test_any_structure_keeps_its_function():
    torch.manual_seed(0)
    model, x = convolutions()
    model, x = model.double().eval(), x.double()
    with torch.no_grad():
        model.depthwise.weight.mul_(torch.logspace(-3, 2, 8)[:, None, None, None])
    expected = model(x)
    changed = equalize(model, find_free_scales(model, (x,), {}))
    assert "depthwise.weight" in changed
    torch.testing.assert_close(model(x), expected)
    rows, columns = model.depthwise.weight.abs().amax((1, 2, 3)), model.grouped.weight.abs().amax((2, 3))
    columns = columns.reshape(2, 4, 4).amax(1).reshape(-1)
    columns = torch.maximum(columns, model.squeeze.weight.abs().amax((0, 2, 3)))
    torch.testing.assert_close(rows, columns, rtol=1e-3, atol=0)


def test_a_channel_of_zeros_is_left_alone():
    model, x = chain()
    with torch.no_grad():
        model[0].weight[2] = 0.0
        model[2].weight[:, 4] = 0.0
    before = copy.deepcopy(model)
    equalize(model, find_free_scales(model, (x,), {}))
    assert torch.equal(model[0].weight[2], before[0].weight[2])
    assert torch.equal(model[0].weight[4], before[0].weight[4])
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    factors = equalizing_factors(torch.tensor([0.0, 2.0, 4.0]), torch.tensor([1.0, 0.0, 1.0]))
    assert factors.tolist() == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_smoothing(alpha):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.q, self.k = nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x):
            h = self.norm(x)
            return self.q(h).tanh() * self.k(h).tanh()

    torch.manual_seed(0)
    model = Block().double()
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([1.0, 80.0, 0.2, 1.0, 1.0, 1.0]))
        model.norm.bias.uniform_(-1, 1)
    x = [torch.randn(3, 5, 6).double() for _ in range(3)]
    expected = [model(own) for own in x]
    inputs = model.norm(torch.cat(x)).detach().numpy()
    largest = np.abs(inputs).max((0, 1))
    both = np.maximum(
        np.abs(model.q.weight.detach().numpy()).max(0), np.abs(model.k.weight.detach().numpy()).max(0)
    )
    s = largest**alpha / both ** (1 - alpha)
    wanted = {
        "norm.weight": model.norm.weight.detach().numpy() / s,
        "norm.bias": model.norm.bias.detach().numpy() / s,
        "q.weight": model.q.weight.detach().numpy() * s,
        "k.weight": model.k.weight.detach().numpy() * s,
    }
    smooth(model, find_free_scales(model, (x[0],), {}), [((own,), {}) for own in x], alpha)
    for name, value in wanted.items():
        np.testing.assert_allclose(model.get_parameter(name).detach().numpy(), value, rtol=1e-10)
    for own, output in zip(x, expected, strict=True):
        torch.testing.assert_close(model(own), output)


def test_smoothing_refuses():
    model, x = chain()
    scales = find_free_scales(model, (x,), {})
    with pytest.raises(ConfigError, match="between 0 and 1"):
        smooth(model, scales, [((x,), {})], 1.5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DwindleError, match="not finite"):
        smooth(model, scales, [((x / 0,), {})])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert smoothing_factors(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), 0.5).tolist() == [1.0, 1.0]
