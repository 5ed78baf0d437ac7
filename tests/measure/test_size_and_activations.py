"""Parameters, bytes and the peak of activations, against counts by hand."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from torch import nn

from dwindle.measure import count_parameters, peak_activation_bytes, state_bytes


def test_shared_parameters_count_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    counted = count_parameters(model)
    assert (counted.total, counted.trainable) == (16 + 4 + 4 + 8, 16 + 4 + 8)
    assert counted.buffers == 4 + 4 + 1


def test_resnet50_parameters():
    torchvision = pytest.importorskip("torchvision")
    # 25 503 912 in NNI's golden value, which leaves out the 53 120 of the batch norms
    assert count_parameters(torchvision.models.resnet50()).total == 25_503_912 + 53_120


def test_state_bytes_is_the_file(tmp_path):
    from dwindle.export.state_file import write_state

    model = nn.Sequential(nn.Linear(40, 4), nn.Linear(40, 4))
    model[1].weight = model[0].weight
    write_state(model, tmp_path / "m.safetensors")
    content = (tmp_path / "m.safetensors").read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    assert state_bytes(model) == len(content) == 8 + header + 4 * (160 + 4 + 4)
    assert {"0.weight", "0.bias", "1.bias"} == set(json.loads(content[8 : 8 + header])) - {"__metadata__"}


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(10, 100, bias=False), nn.Linear(100, 30, bias=False)

    def forward(self, x):
        x = self.first(x)
        x = self.second(x)
        return x.relu_()


def test_peak_of_a_chain():
    # the input (held by the caller), and at the second product its own input and output
    assert peak_activation_bytes(Chain(), (torch.randn(2, 10),)) == 4 * 2 * (10 + 100 + 30)


def test_peak_in_half_precision_and_repeatable():
    model, x = Chain().bfloat16(), torch.randn(2, 10, dtype=torch.bfloat16)
    assert peak_activation_bytes(model, (x,)) == peak_activation_bytes(model, (x,)) == 2 * 2 * 140


def test_a_kept_tensor_counts_until_it_is_used():
    class Residual(nn.Module):
        def forward(self, x):
            kept = x * 2  # lives to the end
            wide = torch.cat([kept, kept, kept], 1)  # 3
            narrow = wide[:, :4] + 1  # 1, while wide is alive
            del wide
            return kept + narrow

    # input 1, kept 1, wide 3, narrow 1
    assert peak_activation_bytes(Residual(), (torch.randn(5, 4),)) == 4 * 5 * 4 * 6


def test_views_and_in_place_cost_nothing():
    class Views(nn.Module):
        def forward(self, x):
            y = x + 1
            return y.view(-1).relu_().view(2, -1).t()

    assert peak_activation_bytes(Views(), (torch.randn(2, 50),)) == 2 * 400


def test_a_view_keeps_the_whole_storage_alive():
    class Small(nn.Module):
        def forward(self, x):
            part = (x + 1)[:1]
            return part * 2

    # input, the sum (kept alive by the slice), and the product of one row
    assert peak_activation_bytes(Small(), (torch.randn(10, 10),)) == 4 * (100 + 100 + 10)


def test_parameters_are_not_counted():
    class Gives(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1000))

        def forward(self, x):
            return self.weight[:2] + x

    assert peak_activation_bytes(Gives(), (torch.randn(2),)) == 8 + 8
