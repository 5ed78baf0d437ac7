"""Options of ``dw.quantize`` that change scales, ranges and weights: what they give, and what they refuse."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.quantization import EntropyObserver, NumberFormat, apply_plan, compare, plan_of, quantize
from dwindle.quantization.observers.entropy import clipped_divergence
from dwindle.quantization.simulation import quantization_parameters, simulation_of
from dwindle.quantization.weights import clipped_scale, weight_scale
from quantization.models import Encoder, residual

UINT8, INT8 = NumberFormat.parse("uint8"), NumberFormat.parse("int8")
FOUR_BITS = [{"op_types": ["Conv2d", "Linear"], "target_names": ["weight"], "quant_dtype": "int4"}]


def sqnr(model, quantized, x):
    with torch.no_grad():
        first, second = model(x), quantized(x)
    if isinstance(first, dict):
        first, second = first["logits"], second["logits"]
    return compare(first.numpy(), second.numpy()).sqnr_db


def divergence(counts, start, stop, levels):
    """The published procedure, in loops."""
    bins = stop - start
    p = [float(count) for count in counts[start:stop]]
    p[0] += sum(counts[:start])
    p[-1] += sum(counts[stop:])
    q = [0.0] * bins
    for level in range(levels):
        own = [i for i in range(bins) if i * levels // bins == level]
        filled = [i for i in own if counts[start + i] > 0]
        for i in filled:
            q[i] = sum(counts[start + j] for j in own) / len(filled)
    total_p, total_q = sum(p), sum(q)
    return sum(
        a / total_p * np.log(a / total_p / max(b / total_q, 1e-12))
        for a, b in zip(p, q, strict=True)
        if a > 0
    )


@pytest.mark.parametrize(("start", "stop", "levels"), [(0, 64, 16), (8, 50, 16), (32, 64, 7), (20, 40, 20)])
def test_divergence(start, stop, levels):
    counts = np.random.default_rng(0).poisson(3, 64).astype(float)
    expected = divergence(list(counts), start, stop, levels)
    assert clipped_divergence(counts, start, stop, levels) == pytest.approx(expected, rel=1e-12)


def test_entropy_clips_outliers_only():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200_000, generator=generator)
    outliers = torch.cat([values, torch.tensor([60.0, -45.0])])
    observer = EntropyObserver()
    observer.update(outliers)
    low, high = observer.range(INT8)
    assert 2.5 < high < 15
    assert -15 < low < -2.5
    even = EntropyObserver()
    even.update(torch.rand(200_000, generator=generator))
    low, high = even.range(UINT8)
    assert low == 0.0
    assert high > 0.9
    zero = EntropyObserver()
    zero.update(torch.zeros(5))
    assert zero.range(UINT8) == (0.0, 0.0)
    with pytest.raises(ValueError, match="nothing"):
        EntropyObserver().range(UINT8)


@pytest.mark.parametrize("axis", [0, 1, None])
def test_clipped_weights(axis):
    form = NumberFormat.parse("int4")
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) ** 3
    whole = weight_scale(weight, axis, form)
    rows = weight.double().numpy()
    rows = rows.reshape(1, -1) if axis is None else np.moveaxis(rows, axis, 0)
    factors = np.linspace(1.0, 0.2, 80)
    expected = []
    for row, scale in zip(rows, whole.numpy(), strict=True):
        errors = [
            ((np.clip(np.round(row / (scale * f)), -7, 7) * scale * f - row) ** 2).sum() for f in factors
        ]
        expected.append(scale * factors[int(np.argmin(errors))])
    np.testing.assert_allclose(clipped_scale(weight, axis, form, whole).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("options", [{"equalize": True}, {"smooth": 0.5}, {"equalize": True, "smooth": 0.7}])
def test_rescaled_models_stay_close_and_are_rebuilt(options):
    for model, x in (residual(), (Encoder().eval(), torch.randint(0, 50, (8, 6)))):
        before = copy.deepcopy(model.state_dict())
        quantized = quantize(model, [x], **options)
        assert sqnr(model, quantized, x) > 30
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        fresh = apply_plan(type(model)(), plan_of(quantized))
        fresh.load_state_dict(quantized.state_dict())
        assert sqnr(quantized, fresh, x) == float("inf")


def test_equalization_saves_a_badly_scaled_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(64, 8)
    with torch.no_grad():  # the same function, scaled as trained depthwise networks are
        factor = torch.logspace(-2, 2, 16)
        model[0].weight.mul_(factor[:, None])
        model[0].bias.mul_(factor)
        model[2].weight.div_(factor)
    assert sqnr(model, quantize(model, [x], equalize=True), x) > sqnr(model, quantize(model, [x]), x) + 10


def test_smoothing_saves_outliers():
    torch.manual_seed(0)
    model = Encoder().eval()
    tokens = torch.randint(0, 50, (32, 6))
    with torch.no_grad():  # outliers that the value path carries into out_proj
        for layer in model.layers.layers:
            layer.self_attn.in_proj_weight[64:66].mul_(100)
            layer.self_attn.out_proj.weight[:, :2].div_(100)
    assert (
        sqnr(model, quantize(model, [tokens], smooth=0.5), tokens)
        > sqnr(model, quantize(model, [tokens]), tokens) + 3
    )


def test_weight_ranges():
    model = Encoder().eval()
    tokens = torch.randint(0, 50, (32, 6))
    plain = quantize(model, [tokens], config_list=FOUR_BITS)
    clipped = quantize(model, [tokens], config_list=FOUR_BITS, weight_range="mse")
    small, large = (q._dwindle_quantization_weight_scale for q in (clipped, plain))
    assert bool((small <= large * (1 + 1e-6)).all())
    assert bool((small < large).any())
    eight = [quantize(model, [tokens], weight_range=name) for name in ("minmax", "mse")]
    assert torch.equal(*(q._dwindle_quantization_weight_scale for q in eight))  # pairs must not saturate


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smooth": 2.0}, "between 0 and 1"),
        ({"weight_range": "msee"}, "did you mean 'mse'"),
        ({"observer": "entropi"}, "did you mean 'entropy'"),
        ({"rounding": "brec"}, "did you mean 'brecq'"),
    ],
)
def test_wrong_options(options, message):
    model = nn.Linear(3, 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=message):
        quantize(model, [torch.randn(4, 3)], **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bad_data():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(8, 3)
    x[2, 1] = float("nan")
    for options in ({}, {"smooth": 0.5}, {"rounding": "adaround"}):
        with pytest.raises(ConfigError, match="NaN"):
            quantize(model, [x], **options)
        with pytest.raises(ConfigError, match="no batch"):
            quantize(model, [], **options)


def test_constant_activations_and_channels_of_zeros():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[1] = 0.0
        model[0].bias[1] = -1.0  # a channel that is always zero
        model[2].weight[0] = 0.0
    for x in (torch.randn(16, 3), torch.full((16, 3), 2.0), torch.zeros(16, 3)):
        for options in ({}, {"equalize": True, "smooth": 0.5}, {"observer": "entropy"}):
            quantized = quantize(model, [x], **options)
            with torch.no_grad():
                torch.testing.assert_close(quantized(x), model(x), atol=0.03, rtol=0.03)


def test_what_a_gate_is_computed_from_may_be_larger_than_it_was():
    model, x = residual()
    seen = {}
    for name in ("squeeze", "excite"):
        layer = getattr(model, name)
        layer.register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: float(args[0].max())})
        )
    with torch.no_grad():
        model(x)
    quantized = quantize(residual()[0], [x], preset="int8_minmax", bias_correction=False)
    scale, zero_point, _, _ = quantization_parameters(quantized)
    for key, slot in simulation_of(quantized).slots.items():
        number = slot.place.input_quantizer
        reach = float(scale[number]) * (255 - int(zero_point[number]))
        if key.module in seen:
            assert 3.9 < reach / seen[key.module] < 4.2
