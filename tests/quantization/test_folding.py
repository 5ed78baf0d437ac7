"""Folding is exact: the folded layer equals layer and normalization in float64."""

import copy

import pytest
import torch
from torch import nn

from dwindle.quantization.folding import apply_folds, find_folds, folded_parameters
from dwindle.quantization.recording import record
from quantization.models import residual

LAYERS = [
    (nn.Conv1d(4, 6, 3, groups=2), (5, 4, 9), nn.BatchNorm1d(6)),
    (nn.Conv2d(3, 6, 3, bias=False), (5, 3, 7, 7), nn.BatchNorm2d(6)),
    (nn.Conv3d(2, 4, 2), (5, 2, 4, 4, 4), nn.BatchNorm3d(4)),
    (nn.ConvTranspose1d(4, 6, 3), (5, 4, 5), nn.BatchNorm1d(6)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), (5, 4, 5, 5), nn.BatchNorm2d(6)),
    (nn.Linear(4, 6), (5, 4), nn.BatchNorm1d(6)),
    (nn.Conv2d(3, 6, 3), (5, 3, 7, 7), nn.BatchNorm2d(6, affine=False)),
]


@pytest.mark.parametrize(("layer", "shape", "norm"), LAYERS)
def test_folded_layer_is_exact(layer, shape, norm):
    layer, norm = copy.deepcopy(layer).double(), copy.deepcopy(norm).double()
    x = torch.randn(shape, dtype=torch.float64)
    norm.train()(layer(x))
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    norm.eval()
    expected = norm(layer(x))
    weight, bias = folded_parameters(layer, norm)
    folded = copy.deepcopy(layer)
    folded.weight, folded.bias = nn.Parameter(weight), nn.Parameter(bias)
    torch.testing.assert_close(folded(x), expected, rtol=1e-12, atol=1e-12)


def test_whole_model_is_exact():
    model, x = residual()
    model, x = model.double(), x.double()
    expected = model(x)
    folds = find_folds(model, record(model, (x,), {}))
    assert [(fold.layer, fold.normalization) for fold in folds] == [
        ("stem.0", "stem.1"),
        ("depthwise", "norm"),
    ]
    apply_folds(model, folds)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.second(self.conv(self.first(self.conv(x))))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.linear(x.flatten(2)[:, :, :3].reshape(-1, 4, 3)))


@pytest.mark.parametrize("model", [Shared(), Branching(), Tokens()])
def test_what_cannot_be_folded_is_left(model):
    assert (
        find_folds(
            model, record(model.eval(), (torch.randn(2, 4 if isinstance(model, Tokens) else 3, 5, 5),), {})
        )
        == []
    )
