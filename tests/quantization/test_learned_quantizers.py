"""Each quantizer of training against its paper in float64: start, forward, gradients, range updates."""

import numpy as np
import pytest
import torch
from tests.quantization import quantizer_references as reference

from dwindle.quantization import NumberFormat, fake_quantize
from dwindle.quantization.quantizers import (
    AsymmetricRangeQuantizer,
    LsqPlusQuantizer,
    LsqQuantizer,
    MovingAverageQuantizer,
    PactQuantizer,
    SymmetricRangeQuantizer,
    TqtQuantizer,
)
from dwindle.quantization.quantizers.learned_range import tune_range
from dwindle.quantization.quantizers.range_search import squared_error

SIGNED = NumberFormat(-8, 7, True)
UNSIGNED = NumberFormat.parse("uint4")
UNSIGNED_8 = NumberFormat.parse("uint8")


def run(quantizer, value, flow):
    """Forward and backward; the value's gradient and the result, float64."""
    held = value.clone().requires_grad_()
    rounded = quantizer(held)
    rounded.backward(flow)
    scale, zero = quantizer.scale_and_zero_point()
    with torch.no_grad():
        assert torch.equal(rounded, fake_quantize(value, scale, zero, quantizer.form, quantizer.axis))
    return rounded.detach().double().numpy(), held.grad.double().numpy()


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(11)
    value = torch.randn(16, 40, generator=generator) * 0.7
    return value, torch.randn(16, 40, generator=generator)


@pytest.mark.parametrize(("form", "activation"), [(SIGNED, False), (UNSIGNED, True)])
def test_lsq(data, form, activation):
    value, flow = data
    value = value.relu() if activation else value
    quantizer = LsqQuantizer(form, activation=activation)
    quantizer.initialize(value.min(), value.max(), value)
    x, g = value.double().numpy(), flow.double().numpy()
    start = 2 * np.abs(x).mean() / np.sqrt(form.highest)
    assert quantizer.scale.item() == pytest.approx(start, rel=1e-6)
    rounded, of_value = run(quantizer, value, flow)
    features = 40 if activation else 16 * 40
    factor = 1 / np.sqrt(features * form.highest)
    expected, of_scale = reference.lsq(x, g, quantizer.scale.item(), form.lowest, form.highest, factor)
    np.testing.assert_allclose(
        rounded, np.clip(np.round(x / start), form.lowest, form.highest) * start, atol=1e-6
    )
    np.testing.assert_allclose(of_value, expected)
    assert float(quantizer.scale.grad) == pytest.approx(of_scale, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", [LsqQuantizer, LsqPlusQuantizer, PactQuantizer])
def test_no_level_beyond_a_bound(data, method):
    """Levels end at the bound of the function before, exactly, so that a runtime sees that it has nothing to clip."""
    quantizer = method(UNSIGNED_8, activation=True)
    value = data[0].clamp(0, 1.5)
    for reaches, low in ((2.0, 0.0), (0.7, 0.0), (2.0, -0.3)):
        quantizer.initialize(torch.tensor(low), torch.tensor(reaches))
        before = quantizer.scale_and_zero_point()
        quantizer.end_at(1.5)
        scale, zero = quantizer.scale_and_zero_point()
        highest = np.float32(scale.item()) * np.float32(255 - zero.item())
        assert highest <= np.float32(1.5)
        assert highest == pytest.approx(min(1.5, reaches), rel=0.01)
        assert int(zero) == int(before[1])
        assert torch.isfinite(quantizer(value)).all()


def test_lsq_per_channel(data):
    value, flow = data
    quantizer = LsqQuantizer(SIGNED, axis=0)
    quantizer.initialize(value.amin(1), value.amax(1), value)
    run(quantizer, value, flow)
    for row in range(16):
        x, g = value[row].double().numpy(), flow[row].double().numpy()
        start = 2 * np.abs(x).mean() / np.sqrt(7)
        assert quantizer.scale[row].item() == pytest.approx(start, rel=1e-6)
        _, of_scale = reference.lsq(x, g, quantizer.scale[row].item(), -8, 7, 1 / np.sqrt(40 * 7))
        assert float(quantizer.scale.grad[row]) == pytest.approx(of_scale, rel=1e-4, abs=1e-6)


def test_lsq_keeps_values_below_zero_of_one_sided_levels(data):
    value, flow = data
    quantizer = LsqQuantizer(UNSIGNED, activation=True)
    quantizer.initialize(value.min(), value.max())
    rounded, _ = run(quantizer, value, flow)
    assert rounded.min() < -0.5
    assert 0 < int(quantizer.zero_point) < 15


def test_lsq_plus_activations(data):
    value, flow = data
    value = value + 0.4
    quantizer = LsqPlusQuantizer(UNSIGNED, activation=True)
    quantizer.initialize(value.min(), value.max(), value)
    x, g = value.double().numpy(), flow.double().numpy()
    rounded, of_value = run(quantizer, value, flow)
    scale, zero = quantizer.scale_and_zero_point()
    offset = -float(zero) * float(scale)  # the offset as a whole number of steps
    expected, gradient, of_scale, of_offset = reference.lsq_plus(
        x, g, float(scale), offset, 0, 15, 1 / np.sqrt(40 * 15)
    )
    np.testing.assert_allclose(rounded, expected, atol=1e-5)
    np.testing.assert_allclose(of_value, gradient)
    assert float(quantizer.scale.grad) == pytest.approx(of_scale, rel=1e-4, abs=1e-6)
    assert float(quantizer.offset.grad) == pytest.approx(of_offset, rel=1e-4, abs=1e-6)
    assert of_offset != 0


def test_lsq_plus_starts_activations_at_the_least_squared_error(data):
    value = torch.cat([data[0].flatten(), torch.tensor([9.0, -4.0])])
    quantizer = LsqPlusQuantizer(UNSIGNED, activation=True)
    quantizer.initialize(value.min(), value.max(), value)
    error = (quantizer(value) - value).square().mean().item()
    edges = [torch.linspace(1, 0.02, 50) * edge for edge in (value.min(), value.max())]
    lows, highs = (edge.flatten() for edge in torch.meshgrid(*edges, indexing="ij"))
    best = float(squared_error(value.expand(2500, -1), lows, highs, UNSIGNED).min())
    whole = float(squared_error(value[None], value.min()[None], value.max()[None], UNSIGNED))
    assert best < 0.8 * whole  # there is something to find
    assert error <= 1.02 * best


def test_lsq_plus_weights_start_at_three_deviations(data):
    weight = data[0] * 0.1 + 0.01
    quantizer = LsqPlusQuantizer(SIGNED, axis=0)
    quantizer.initialize(weight.amin(1), weight.amax(1), weight)
    rows = weight.double().numpy()
    mean, deviation = rows.mean(1), rows.std(1)
    edge = np.maximum(np.abs(mean - 3 * deviation), np.abs(mean + 3 * deviation))
    np.testing.assert_allclose(quantizer.scale.detach().numpy(), edge / 7, rtol=1e-5)
    run(quantizer, weight, data[1])
    assert quantizer.offset.grad is None


def test_pact(data):
    value, flow = data
    quantizer = PactQuantizer(UNSIGNED)
    quantizer.initialize(torch.tensor(0.0), torch.tensor(0.9))
    x, g = value.double().numpy(), flow.double().numpy()
    rounded, of_value = run(quantizer, value, flow)
    clip = quantizer.clip.item()
    assert clip == pytest.approx(0.9, rel=1e-6)
    expected, gradient, of_clip = reference.pact(x, g, clip, 15)
    np.testing.assert_allclose(rounded, expected, atol=1e-6)
    np.testing.assert_allclose(of_value, gradient)
    assert float(quantizer.clip.grad) == pytest.approx(of_clip, rel=1e-4)
    assert quantizer.penalty().item() == pytest.approx(clip**2)
    quantizer = PactQuantizer(UNSIGNED, start=10.0)
    quantizer.initialize(torch.tensor(0.0), torch.tensor(0.9))
    assert quantizer.clip.item() == 10.0


@pytest.mark.parametrize(
    ("form", "bits"),
    [(SIGNED, 4), (UNSIGNED, 4), (NumberFormat(-128, 127, True), 8), (NumberFormat(-1, 1, True), 2)],
)
def test_tqt(data, form, bits):
    value, flow = data
    value = value if form.signed else value.relu()
    quantizer = TqtQuantizer(form, activation=True)
    quantizer.initialize(-(value * 0.6).abs().max() if form.signed else torch.tensor(0.0), value.max() * 0.6)
    x, g = value.double().numpy(), flow.double().numpy()
    rounded, of_value = run(quantizer, value, flow)
    log2_t = quantizer.log2_threshold.item()
    expected, gradient, of_threshold = reference.tqt(x, g, log2_t, bits, form.lowest, form.highest)
    np.testing.assert_allclose(rounded, expected, atol=1e-6)
    np.testing.assert_allclose(of_value, gradient)
    assert float(quantizer.log2_threshold.grad) == pytest.approx(of_threshold, rel=1e-4)
    scale = float(quantizer.scale_and_zero_point()[0])
    assert np.log2(scale) == int(np.log2(scale))


def test_tqt_starts_weights_at_three_deviations(data):
    quantizer = TqtQuantizer(SIGNED, axis=0, power_of_two=False)
    value = data[0]
    quantizer.initialize(value.amin(1), value.amax(1), value)
    expected = 3 * value.double().numpy().std(1)
    np.testing.assert_allclose(2 ** quantizer.log2_threshold.detach().numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(quantizer.scale_and_zero_point()[0].numpy(), expected / 8, rtol=1e-5)


@pytest.mark.parametrize(
    ("form", "share"), [(SIGNED, -8 / 7), (UNSIGNED, 0.0), (NumberFormat(-7, 7, True), -1.0)]
)
def test_symmetric_range(data, form, share):
    value, flow = data
    quantizer = SymmetricRangeQuantizer(form)
    quantizer.initialize(torch.tensor(-0.8 if form.signed else 0.0), torch.tensor(0.8))
    x, g = value.double().numpy(), flow.double().numpy()
    edge = quantizer.edge.item()
    assert edge == pytest.approx(0.8, rel=1e-6)
    low = edge * form.lowest / form.highest
    expected, gradient, _, of_edge = reference.range_gradients(
        x, g, low, edge - low, form.highest - form.lowest, share
    )
    rounded, of_value = run(quantizer, value, flow)
    np.testing.assert_allclose(rounded, expected, atol=1e-6)
    np.testing.assert_allclose(of_value, gradient)
    assert float(quantizer.edge.grad) == pytest.approx(of_edge, rel=1e-4)


@pytest.mark.parametrize("form", [UNSIGNED, NumberFormat.parse("int8", "affine")])
@pytest.mark.parametrize(("low", "high"), [(-0.33, 0.9), (-1.2, 0.2), (0.1, 0.7)])
def test_asymmetric_range(data, form, low, high):
    value, flow = data
    quantizer = AsymmetricRangeQuantizer(form)
    quantizer.initialize(torch.tensor(low), torch.tensor(high))
    x, g = value.double().numpy(), flow.double().numpy()
    levels = form.highest - form.lowest
    low, high = reference.tuned(quantizer.low.item(), quantizer.width.item(), levels)
    expected, gradient, of_low, of_width = reference.range_gradients(x, g, low, high - low, levels, 0.0)
    rounded, of_value = run(quantizer, value, flow)
    near_edge = (np.abs(x - low) < 1e-6) | (np.abs(x - high) < 1e-6)
    np.testing.assert_allclose(rounded, expected, atol=1e-6)
    np.testing.assert_allclose(of_value[~near_edge], gradient[~near_edge])
    assert float(quantizer.low.grad) == pytest.approx(of_low, rel=1e-4)
    assert float(quantizer.width.grad) == pytest.approx(of_width, rel=1e-4)


def test_tuned_range_holds_zero_on_a_level():
    generator = torch.Generator().manual_seed(5)
    low = torch.randn(200, generator=generator, dtype=torch.float64)
    width = torch.rand(200, generator=generator, dtype=torch.float64) * 2 + 0.01
    new_low, new_width = tune_range(low, width, 255)
    zero = -new_low * 255 / new_width
    torch.testing.assert_close(zero, zero.round(), rtol=0, atol=1e-6)
    assert (new_low <= low.clamp(max=0) + 1e-12).all()
    assert (new_low + new_width >= (low + width).clamp(min=0) - 1e-12).all()


def test_moving_average_follows_and_freezes():
    quantizer = MovingAverageQuantizer(NumberFormat.parse("uint8"), activation=True, momentum=0.1)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(30, generator=generator) * (1 + index) for index in range(5)]
    quantizer.initialize(batches[0].min(), batches[0].max())
    low, high = (np.float64(edge) for edge in (batches[0].min(), batches[0].max()))
    for batch in batches[1:]:
        quantizer(batch)
        low += 0.1 * (np.float64(batch.min()) - low)
        high += 0.1 * (np.float64(batch.max()) - high)
    assert quantizer.low.item() == pytest.approx(low, rel=1e-5)
    assert float(quantizer.high) == pytest.approx(high, rel=1e-5)
    before = quantizer.low.clone(), quantizer.high.clone()
    quantizer(torch.full((3,), float("nan")))
    quantizer.eval()
    held = (torch.randn(50, generator=generator) * 40).requires_grad_()
    rounded = quantizer(held)
    assert before == (quantizer.low, quantizer.high)
    scale, zero = quantizer.scale_and_zero_point()
    assert torch.equal(rounded.detach(), fake_quantize(held.detach(), scale, zero, quantizer.form))
    rounded.sum().backward()
    level = (held.detach() / scale).round() + zero
    assert torch.equal(held.grad, ((level >= 0) & (level <= 255)).float())


def test_moving_average_covers_weights_as_they_are():
    quantizer = MovingAverageQuantizer(NumberFormat.parse("int8"), axis=0, momentum=1.0)
    quantizer.initialize(torch.zeros(3), torch.zeros(3))
    weight = torch.randn(3, 4, 2, 2)
    quantizer(weight)
    torch.testing.assert_close(
        quantizer.scale_and_zero_point()[0], weight.abs().amax((1, 2, 3)) / 127, rtol=1e-6, atol=0
    )
