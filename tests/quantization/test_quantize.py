"""``dw.quantize``: what it returns, what it leaves alone, what it refuses."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from dwindle.config.errors import ConfigError, FileFormatError
from dwindle.quantization import (
    NumberFormat,
    apply_plan,
    compare,
    is_quantized,
    parity,
    plan_of,
    quantization_parameters,
    quantize,
)
from dwindle.quantization.weights import weight_scale
from quantization.models import Encoder, residual


@pytest.fixture(scope="module")
def made():
    model, x = residual()
    return model, x, quantize(model, [x])


def test_original_is_untouched(made):
    fresh, _ = residual()
    model = made[0]
    assert not is_quantized(model)
    assert not model._forward_hooks
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_close_to_the_float_model(made):
    model, x, quantized = made
    with torch.no_grad():
        result = compare(model(x).numpy(), quantized(x).numpy())
    assert result.sqnr_db > 25
    assert result.max_difference > 0


def test_every_weight_is_on_its_levels(made):
    _, x, quantized = made
    simulation = quantized._dwindle_quantization
    simulation.captured = {}
    with torch.no_grad():
        quantized(x)
    _, _, scales, _ = quantization_parameters(quantized)
    for (key, kind), weight in simulation.captured.items():
        if kind == "weight":
            slot = simulation.slots[key]
            scale = scales[slot.start : slot.start + slot.length]
            assert (weight.abs().amax([1, 2, 3] if weight.dim() == 4 else 1) / scale).max() < 127.001
    simulation.captured = None


def test_gradients_reach_every_parameter(made):
    _, x, quantized = made
    quantized = copy.deepcopy(quantized)
    quantized(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in quantized.parameters())


def test_deepcopy_and_state_dict(made):
    _, x, quantized = made
    with torch.no_grad():
        expected = quantized(x)
        twin = copy.deepcopy(quantized)
        assert torch.equal(twin(x), expected)
        for buffer in ("activation_scale", "weight_scale"):
            getattr(twin, f"_dwindle_quantization_{buffer}").mul_(3)
        assert not torch.equal(twin(x), expected)  # the copy has its own state
        assert torch.equal(quantized(x), expected)
        twin.load_state_dict(quantized.state_dict())
        assert torch.equal(twin(x), expected)


def test_plan_rebuilds_the_model(made):
    _, x, quantized = made
    fresh = apply_plan(type(made[0])(), plan_of(quantized))
    fresh.load_state_dict(quantized.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x), quantized(x))
    with pytest.raises(FileFormatError, match="does not fit"):
        apply_plan(nn.Linear(2, 2), plan_of(quantized))
    with pytest.raises(FileFormatError):
        apply_plan(nn.Linear(2, 2), {})


def test_a_failing_forward_leaves_nothing_behind(made):
    _, x, quantized = made
    with torch.no_grad():
        expected = quantized(x)
        with pytest.raises(RuntimeError):
            quantized(torch.randn(2, 5, 4, 4))
        assert torch.overrides._get_current_function_mode() is None
        assert torch.equal(quantized(x), expected)


@pytest.mark.parametrize(
    "data",
    [
        lambda x: x,
        lambda x: [(x, torch.zeros(len(x)))],
        lambda x: [[x.numpy()]],
        lambda x: [{"x": x, "labels": torch.zeros(len(x))}],
        lambda x: iter([x]),
    ],
)
def test_forms_of_batches_give_the_same(made, data):
    model, x, quantized = made
    other = quantize(model, data(x))
    for first, second in zip(quantization_parameters(quantized), quantization_parameters(other), strict=True):
        assert torch.equal(first, second)


def test_adapt():
    model, x = residual()
    adapted = quantize(model, [{"picture": x, "name": "a"}], adapt=lambda batch: batch["picture"])
    plain = quantize(model, [x])
    with torch.no_grad():
        assert torch.equal(adapted(x), plain(x))


def test_sequential_roots_and_transformers():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    quantized = quantize(model, [torch.randn(20, 6)])
    assert len(quantized) == 3
    encoder = Encoder().eval()
    tokens = torch.randint(0, 50, (8, 6))
    quantized = quantize(encoder, [{"tokens": tokens, "mask": torch.ones(8, 6)}])
    with torch.no_grad():
        got = compare(
            encoder(tokens)["logits"].numpy(), quantized(tokens, torch.ones(8, 6))["logits"].numpy()
        )
    assert got.sqnr_db > 25


def test_bias_correction_restores_the_means():
    model, x = residual()

    def gap(**options):
        with torch.no_grad():
            return (quantize(model, [x], **options)(x).mean(0) - model(x).mean(0)).abs().max()

    assert gap(bias_correction=True) < 0.3 * gap(bias_correction=False)


def test_masked_weights_are_quantized_as_masked():
    class Mask(nn.Module):
        def forward(self, weight):
            return weight * (torch.arange(weight.shape[0]) % 2)[:, None]

    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    parametrize.register_parametrization(model[0], "weight", Mask())
    x = torch.randn(20, 6)
    quantized = quantize(model, [x])
    with torch.no_grad():
        assert compare(model(x).numpy(), quantized(x).numpy()).sqnr_db > 25
        hidden = quantized[0].weight
    assert hidden[0].abs().sum() == 0


def test_no_pair_of_weights_saturates():
    weight = torch.randn(16, 40)
    scale = weight_scale(weight, 0, NumberFormat.parse("int8"), avoid_saturation=True)
    levels = (weight / scale[:, None]).round().numpy().astype(int)
    ordered = np.sort(levels, axis=1)
    assert (ordered[:, -1] + ordered[:, -2]).max() <= 128
    assert (ordered[:, 0] + ordered[:, 1]).min() >= -128
    assert np.abs(levels).max(axis=1).min() >= 60


def test_tiny_weights_keep_their_bias():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[0] = 1e-13
        model[0].bias[0] = 5.0
    x = torch.randn(30, 4)
    quantized = quantize(model, [x])
    scale, _, weight, _ = quantization_parameters(quantized)
    slot = next(s for k, s in quantized._dwindle_quantization.slots.items() if k.module == "0")
    step = scale[slot.place.input_quantizer].double() * weight[slot.start].double()
    assert 5.0 / step < 2**31


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "int7"}, "preset 'int7' is not known"),
        ({"backend": "onxruntime"}, "did you mean 'onnxruntime'"),
        ({"observer": "histogramm"}, "did you mean 'histogram'"),
    ],
)
def test_wrong_names(arguments, message):
    with pytest.raises(ConfigError, match=message):
        quantize(nn.Linear(2, 2), [torch.randn(2, 2)], **arguments)


def test_what_is_refused(made):
    with pytest.raises(ConfigError, match="already"):
        quantize(made[2], [made[1]])
    with pytest.raises(ConfigError, match="no batch"):
        quantize(nn.Linear(2, 2), [])
    with pytest.raises(ConfigError, match="no operation"):
        quantize(nn.ReLU(), [torch.randn(2, 2)], example_inputs=torch.randn(2, 2))
    with pytest.raises(ConfigError, match="set"):
        quantize(nn.Linear(2, 2), [{1, 2}])


def test_parity_measures():
    reference = np.array([[1.0, 0.0], [0.0, 2.0]])
    result = compare(reference, np.array([[1.0, 0.0], [0.0, 1.0]]))
    assert result.equal_predictions == 1.0
    assert result.max_difference == 1.0
    assert result.sqnr_db == pytest.approx(10 * np.log10(5.0))
    assert compare(reference, reference).to_json()["sqnr_db"] is None
    with pytest.raises(ConfigError, match="shapes"):
        compare(reference, reference[:1])
    model = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    exact = parity(model, lambda a: [model(torch.from_numpy(a)).detach().numpy()], [x, x])
    assert (exact.samples, exact.max_difference) == (8, 0.0)
