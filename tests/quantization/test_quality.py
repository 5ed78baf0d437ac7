"""The report about a quantized model: histograms and clipping against NumPy, layers, plain data."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.quantization import (
    PercentileObserver,
    ValueHistogram,
    compare,
    layer_errors,
    quantization_parameters,
    quantization_report,
    quantize,
    value_histograms,
)
from dwindle.quantization.observers.growing_histogram import GrowingHistogram
from dwindle.quantization.value_histograms import merged
from quantization.models import residual


def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
    batches = [torch.randn(200, 6), 3 * torch.randn(100, 6)]
    quantized = quantize(
        model, batches, observer=partial(PercentileObserver, 90.0), weight_range="mse", avoid_saturation=False
    )
    return model, batches, quantized


def test_histograms_and_clipping():
    model, batches, quantized = made()
    scales, zeros, weight_scales, _ = (p.double().numpy() for p in quantization_parameters(quantized))
    slots = {key.module: slot for key, slot in quantized._dwindle_quantization.slots.items()}
    found = {own.name: own for own in value_histograms(model, quantized, batches, bins=50)}
    number = slots["0"].place.input_quantizer
    x = torch.cat(batches).double().numpy()
    own = found["input 0 as input"]
    low, high = -zeros[number] * scales[number], (255 - zeros[number]) * scales[number]
    assert own.range == pytest.approx((low, high), rel=1e-6)
    levels = np.round(x / scales[number]) + zeros[number]
    assert own.clipped == pytest.approx(((levels < 0) | (levels > 255)).mean(), abs=2 / x.size)
    assert own.clipped > 0.02
    assert own.seen == pytest.approx((x.min(), x.max()))
    assert sum(own.counts) == x.size
    assert len(own.counts) <= 50
    edges = own.first + own.width * np.arange(len(own.counts) + 1)
    expected, _ = np.histogram(x, edges)
    assert np.abs(np.array(own.counts) - expected).max() <= 2  # values on an edge, in float32
    weight = found["2.weight"]
    slot, w = slots["2"], model[2].weight.detach().double().numpy()
    step = weight_scales[slot.start : slot.start + slot.length][:, None]
    assert weight.clipped == pytest.approx((np.abs(np.round(w / step)) > 127).mean(), abs=1e-9)
    assert weight.range[1] == pytest.approx(127 * step.max(), rel=1e-6)
    assert (weight.kind, weight.bits, sum(weight.counts)) == ("weight", 8, w.size)


def test_merged_bins_keep_every_value():
    histogram = GrowingHistogram(64)
    values = torch.tensor([0.1, 0.11, 0.9, 0.95, 0.5])
    histogram.add(values)
    first, width, counts = merged(histogram, 4)
    assert sum(counts) == 5
    assert len(counts) <= 4
    assert first <= 0.1
    assert first + width * len(counts) >= 0.95


def test_report(tmp_path):
    model, batches, quantized = made()
    report = quantization_report(model, quantized, batches)
    assert report.layers == layer_errors(model, quantized, batches)
    with torch.no_grad():
        x = torch.cat(batches)
        assert report.output.sqnr_db == pytest.approx(
            compare(model(x).numpy(), quantized(x).numpy()).sqnr_db, rel=1e-6
        )
    worst = report.layers[0]
    names = [own.name for own in report.histograms_of([worst])]
    assert names == [worst.input_name, worst.weight_name]
    data = json.loads(json.dumps(report.to_json(worst=1), allow_nan=False))
    assert [own["name"] for own in data["histograms"]] == names
    assert ValueHistogram.from_json(data["histograms"][0]) == report.histograms_of([worst])[0]
    assert len(report.to_json()["histograms"]) == len(report.histograms) == 4
    assert report.table().splitlines()[0].startswith("output: ")
    assert len(report.table().splitlines()) == 3 + len(report.layers)


def test_report_of_a_folded_network_names_every_layer():
    model, x = residual()
    quantized = quantize(model, [x])
    before = {name: value.clone() for name, value in quantized.state_dict().items()}
    report = quantization_report(model, quantized, [(x, torch.zeros(len(x)))])
    assert len(report.layers) == 7
    assert {own.name for own in report.histograms if own.kind == "weight"} == {
        layer.weight_name for layer in report.layers
    }
    assert {layer.input_name for layer in report.layers} <= {own.name for own in report.histograms}
    assert all(torch.equal(value, before[name]) for name, value in quantized.state_dict().items())


def test_report_needs_the_pair(tmp_path):
    model, batches, quantized = made()
    with pytest.raises(ConfigError, match="quantize first"):
        quantization_report(model, model, batches)
    with pytest.raises(ConfigError, match="not made of this model"):
        quantization_report(nn.Sequential(nn.Linear(6, 5)), quantized, batches)
    with pytest.raises(ConfigError, match="no batch"):
        quantization_report(model, quantized, [])
