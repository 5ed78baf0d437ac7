"""Quantizers of training next to those of NNCF and torchao, where these are installed."""

import numpy as np
import pytest
import torch

from dwindle.quantization import NumberFormat
from dwindle.quantization.quantizers import AsymmetricRangeQuantizer, LsqQuantizer, SymmetricRangeQuantizer


def nncf_reference():
    peer = pytest.importorskip("nncf.torch.quantization.reference", reason="NNCF is not installed")
    return peer.ReferenceQuantize(peer.ReferenceBackendType.TORCH)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(9)
    value = torch.randn(64, 30, generator=generator, dtype=torch.float64)
    return value, torch.randn(64, 30, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    "form", [NumberFormat(-128, 127, True), NumberFormat(-7, 7, True), NumberFormat(0, 15, False)]
)
def test_symmetric(data, form):
    value, flow = data
    value = value if form.signed else value.abs()
    quantizer = SymmetricRangeQuantizer(form)
    quantizer.initialize(torch.tensor(-1.1 if form.signed else 0.0), torch.tensor(1.1))
    held = value.clone().requires_grad_()
    rounded = quantizer(held)
    rounded.backward(flow)
    edge = quantizer.edge.detach().double().reshape(1, 1)
    low = edge * form.lowest / form.highest
    reference = nncf_reference()
    levels = form.highest - form.lowest + 1
    expected = reference.forward(value.clone(), low, edge - low, levels)
    of_value, _, of_edge = reference.backward(flow, value, low, edge - low, levels, form.lowest, form.highest)
    np.testing.assert_allclose(rounded.detach(), expected, atol=1e-6)
    np.testing.assert_allclose(held.grad, of_value)
    torch.testing.assert_close(quantizer.edge.grad.double(), of_edge.reshape(()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("low", "width"), [(-0.4, 1.5), (-1.0, 1.1), (0.2, 0.9), (-1.5, 1.0)])
def test_asymmetric(data, low, width):
    value, flow = data
    quantizer = AsymmetricRangeQuantizer(NumberFormat.parse("uint8"))
    quantizer.initialize(torch.tensor(-1.0), torch.tensor(1.0))
    with torch.no_grad():
        quantizer.low.fill_(low)
        quantizer.width.fill_(width)
    held = value.clone().requires_grad_()
    rounded = quantizer(held)
    rounded.backward(flow)
    reference = nncf_reference()
    edges = torch.tensor([[low]], dtype=torch.float64), torch.tensor([[width]], dtype=torch.float64)
    new_low, new_width = reference.tune_range(*edges, 256)
    expected = reference.forward(value.clone(), new_low, new_width, 256)
    of_value, of_low, of_width = reference.backward(flow, value, new_low, new_width, 256, 0, 255, True)
    np.testing.assert_allclose(rounded.detach(), expected, atol=2e-6)
    near = ((value - new_low).abs() < 1e-6) | ((value - new_low - new_width).abs() < 1e-6)
    np.testing.assert_allclose(held.grad[~near], of_value[~near])
    torch.testing.assert_close(quantizer.low.grad.double(), of_low.reshape(()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantizer.width.grad.double(), of_width.reshape(()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4])
def test_learned_steps(bits):
    reason = "torchao is not installed"
    peer = pytest.importorskip("torchao.prototype.paretoq.models.utils_quant", reason=reason)
    generator = torch.Generator().manual_seed(2)
    weight, flow = (torch.randn(8, 50, generator=generator) for _ in range(2))
    quantizer = LsqQuantizer(NumberFormat(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, True))
    quantizer.initialize(weight.min(), weight.max(), weight)
    held, other = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    step = quantizer.scale.detach().clone().reshape(1).requires_grad_()
    rounded = quantizer(held)
    rounded.backward(flow)
    expected = peer.LsqBinaryTernaryExtension.apply(other, step, bits, True)
    expected.backward(flow)
    torch.testing.assert_close(rounded, expected)
    assert torch.equal(held.grad, other.grad)
    torch.testing.assert_close(quantizer.scale.grad.reshape(1), step.grad, rtol=1e-4, atol=1e-6)
