"""DoReFa against its paper: weights, activations, gradients with their noise."""

import numpy as np
import pytest
import torch

from dwindle.config.errors import ConfigError
from dwindle.quantization import NumberFormat
from dwindle.quantization.quantizers import (
    DorefaActivationQuantizer,
    DorefaWeightQuantizer,
    GradientQuantizer,
)
from dwindle.quantization.quantizers.dorefa import round_gradient, squeeze


@pytest.mark.parametrize("dtype", ["int2", "int4", "int8"])
def test_weights(dtype):
    from tests.quantization import quantizer_references as reference

    form = NumberFormat.parse(dtype)
    weight = torch.randn(6, 5, 3, 3) * 0.8
    quantizer = DorefaWeightQuantizer(form)
    rounded = quantizer(weight)
    expected = reference.dorefa_weight(weight.double().numpy(), form.highest - form.lowest)
    assert np.mean(np.abs(rounded.numpy() - expected) < 1e-6) > 0.99  # ties of float32 and float64 differ
    assert np.abs(rounded.numpy() - expected).max() < 1.01 / form.highest
    scale, zero = quantizer.scale_and_zero_point()
    levels = rounded / scale + zero
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert int(levels.abs().max().round()) == form.highest


def test_weight_gradient_is_that_of_squeezing():
    weight = (torch.randn(20, dtype=torch.float64) * 0.6).requires_grad_()
    assert torch.autograd.gradcheck(squeeze, weight)
    flow = torch.randn(20, dtype=torch.float64)
    (expected,) = torch.autograd.grad(squeeze(weight), weight, flow)
    (got,) = torch.autograd.grad(DorefaWeightQuantizer(NumberFormat.parse("int4"))(weight), weight, flow)
    torch.testing.assert_close(got, expected)


def test_weight_of_zeros_stays_zero():
    weight = torch.zeros(4, 4, requires_grad=True)
    rounded = DorefaWeightQuantizer(NumberFormat.parse("int4"))(weight)
    rounded.sum().backward()
    assert not rounded.any()
    assert weight.grad.isfinite().all()


def test_activations():
    form = NumberFormat.parse("uint2")
    value = torch.linspace(-0.5, 1.5, 41).requires_grad_()
    rounded = DorefaActivationQuantizer(form)(value)
    expected = np.round(3 * np.clip(value.detach().double().numpy(), 0, 1)) / 3
    np.testing.assert_allclose(rounded.detach().numpy(), expected, atol=1e-6)
    rounded.sum().backward()
    assert torch.equal(value.grad, ((value >= 0) & (value <= 1)).float())


@pytest.mark.parametrize("bits", [2, 6, 8])
def test_gradients(bits):
    from tests.quantization import quantizer_references as reference

    gradient = torch.randn(5, 3, 4, dtype=torch.float64)
    noise = torch.rand(5, 3, 4, dtype=torch.float64) - 0.5
    got = round_gradient(gradient, noise, 2**bits - 1)
    np.testing.assert_allclose(
        got, reference.dorefa_gradient(gradient.numpy(), noise.numpy(), bits), atol=1e-12
    )


def test_gradient_quantizer_is_the_identity_forwards_and_true_on_average_backwards():
    value = torch.randn(2, 6, requires_grad=True)
    quantizer = GradientQuantizer(3)
    assert torch.equal(quantizer(value), value)
    flow = torch.randn(2, 6)
    flow[1] = 0
    total = torch.zeros_like(flow)
    torch.manual_seed(0)
    for _ in range(2000):
        value.grad = None
        quantizer(value).backward(flow)
        total += value.grad
    step = 2 * flow[0].abs().max() / 7
    # The noise is one step wide, so that rounding is unbiased inside the range; the largest one is cut at the end.
    small = flow[0].abs() < flow[0].abs().max() - step
    assert small.any()
    torch.testing.assert_close(total[0][small] / 2000, flow[0][small], rtol=0, atol=0.05 * float(step))
    assert not total[1].any()


def test_other_levels_are_refused():
    with pytest.raises(ConfigError, match="symmetric levels"):
        DorefaWeightQuantizer(NumberFormat.parse("uint4"))
    with pytest.raises(ConfigError, match="one scale"):
        DorefaWeightQuantizer(NumberFormat.parse("int4"), axis=0)
    with pytest.raises(ConfigError, match="unsigned"):
        DorefaActivationQuantizer(NumberFormat.parse("int4"))
    with pytest.raises(ConfigError, match="2 to 16"):
        GradientQuantizer(1)
