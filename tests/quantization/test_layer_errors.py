"""Signal to noise of layers against NumPy."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.quantization import (
    PercentileObserver,
    error_table,
    layer_errors,
    quantization_parameters,
    quantize,
)
from quantization.models import Encoder, residual


def decibels(signal, noise):
    return 10 * np.log10((signal**2).sum() / (noise**2).sum())


def test_two_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).double()
    batches = [torch.randn(20, 6).double(), 3 * torch.randn(10, 6).double()]
    coarse = [{"op_names": ["2"], "target_names": ["weight"], "quant_dtype": "int3"}]
    observer = partial(PercentileObserver, 90.0)
    quantized = quantize(model, batches, config_list=coarse, observer=observer, bias_correction="fast")
    scales, zeros, weights, _ = (p.double().numpy() for p in quantization_parameters(quantized))
    slots = {k.module: s for k, s in quantized._dwindle_quantization.slots.items()}

    def rounded(x, number):
        return (np.clip(np.round(x / scales[number]) + zeros[number], 0, 255) - zeros[number]) * scales[
            number
        ]

    def layer(index, x, exact):
        w, b = (p.detach().numpy() for p in (model[index].weight, model[index].bias))
        if exact:
            return x @ w.T + b
        slot = slots[str(index)]
        s, number = weights[slot.start : slot.start + slot.length], slot.place.input_quantizer
        new = np.clip(np.round(w / s[:, None]), slot.place.form.lowest, slot.place.form.highest) * s[:, None]
        bias = quantized[index].bias.detach().numpy()
        step = s * scales[number]
        return rounded(x, number) @ new.T + np.round(bias / step) * step

    x = np.concatenate([own.numpy() for own in batches])
    hidden, coarse_hidden = (np.maximum(layer(0, x, exact), 0) for exact in (True, False))
    output = layer(2, hidden, True)
    errors = {error.name.split("/")[0]: error for error in layer_errors(model, quantized, batches)}
    assert errors["2"].own_sqnr_db == pytest.approx(
        decibels(output, layer(2, hidden, False) - output), abs=0.05
    )
    assert errors["2"].sqnr_db == pytest.approx(
        decibels(output, layer(2, coarse_hidden, False) - output), abs=0.05
    )
    first = layer(0, x, True)
    assert errors["0"].sqnr_db == pytest.approx(decibels(first, layer(0, x, False) - first), abs=0.05)
    assert (errors["2"].weight_bits, errors["0"].weight_bits, errors["0"].input_bits) == (3, 8, 8)
    number = slots["0"].place.input_quantizer
    levels = np.round(x / scales[number]) + zeros[number]
    assert errors["0"].clipped == pytest.approx(((levels < 0) | (levels > 255)).mean())
    assert errors["0"].clipped > 0
    w = model[2].weight.detach().numpy()
    s = weights[slots["2"].start : slots["2"].start + 5][:, None]
    assert errors["2"].weight_sqnr_db == pytest.approx(
        decibels(w, np.clip(np.round(w / s), -3, 3) * s - w), abs=1e-3
    )


def test_worst_first_and_rescaled_models():
    model, x = residual()
    for options in ({}, {"equalize": True}, {"smooth": 0.5}):
        errors = layer_errors(model, quantize(model, [x], **options), [x])
        assert len(errors) == 7
        assert [error.sqnr_db for error in errors] == sorted(error.sqnr_db for error in errors)
        assert errors[0].sqnr_db > 20
    table = error_table(errors).splitlines()
    assert len(table) == 8
    assert errors[0].name in table[1]
    assert set(errors[0].to_json()) >= {"sqnr_db", "own_sqnr_db", "clipped"}


def test_transformers_and_mismatches():
    model = Encoder().eval()
    tokens = torch.randint(0, 50, (8, 6))
    quantized = quantize(model, [tokens], smooth=0.5)
    assert len(layer_errors(model, quantized, [tokens])) == 9
    with pytest.raises(ConfigError, match="not made of this model"):
        layer_errors(nn.Linear(3, 2), quantized, [torch.randn(2, 3)])
    with pytest.raises(ConfigError, match="not quantized by dwindle"):
        layer_errors(model, model, [tokens])
    with pytest.raises(ConfigError, match="no batch"):
        layer_errors(model, quantized, [])
