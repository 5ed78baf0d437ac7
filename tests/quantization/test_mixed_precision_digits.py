"""HAWQ-v2 against uniform bits on a small net that has learned the digits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dwindle as dw
from dwindle.quantization import choose_bits, manual_bits
from dwindle.training import accuracy, fit
from dwindle.zoo import BatchLoader, digits, residual_network

pytest.importorskip("sklearn")


def test_chosen_bits_lose_less_than_uniform_ones() -> None:
    data = digits()
    torch.manual_seed(0)
    model = residual_network((8, 16), (1, 1), stem_stride=2)
    loader = BatchLoader(data.train_images, data.train_labels, 64, shuffle=True)
    fit(model, loader, torch.optim.Adam(model.parameters(), lr=1e-2), epochs=6)
    model.eval()
    assert accuracy(model, [(data.test_images, data.test_labels)]) > 0.9
    with torch.no_grad():
        expected = model(data.test_images).log_softmax(-1)

    def divergence(config_list: list[dict[str, object]]) -> float:
        """The Kullback-Leibler divergence of the float net's distribution on pictures that were not used."""
        calibration = [data.train_images[:128]]
        quantized = dw.quantize(
            model, calibration, config_list=config_list, weight_range="mse", backend="layers"
        )
        with torch.no_grad():
            found = quantized(data.test_images).log_softmax(-1)
        return float(nn.functional.kl_div(found, expected, log_target=True, reduction="batchmean"))

    four = manual_bits(model, data.test_images[:8], {"*": 4})
    assert four.compression["bit_operations"] == four.compression["size"] == 2
    batches = [
        (data.train_images[place : place + 32], data.train_labels[place : place + 32])
        for place in range(0, 128, 32)
    ]
    options = {"weight_range": "mse", "probes": 40}
    milder = choose_bits(model, batches, ratio=1.5, **options)
    assert milder.ratio >= 1.5
    same = choose_bits(model, batches, ratio=2, bits=range(2, 9), **options)
    assert same.ratio >= 2
    uniform = divergence(four.config_list)
    assert divergence(milder.config_list) < 0.6 * uniform
    assert divergence(same.config_list) < uniform
