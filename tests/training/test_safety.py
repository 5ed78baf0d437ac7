"""Narrow strided 1x1 convolutions are trained without oneDNN, whose kernel for them corrupts memory."""

import warnings

import pytest
import torch
from torch import nn

from dwindle.training import TrainingOptions, fit, safety
from dwindle.training.safety import safe_convolutions, unsafe_convolutions
from dwindle.zoo import residual_network

CPU = torch.device("cpu")


def test_the_narrow_ones_are_found():
    assert unsafe_convolutions(residual_network((8, 16), (1, 1))) == ["stages.1.0.shortcut.0"]
    assert unsafe_convolutions(residual_network((16, 32), (1, 1))) == []
    grouped = nn.Conv2d(32, 32, 1, stride=2, groups=4)
    others = nn.Conv2d(4, 4, 3, stride=2), nn.Conv2d(4, 4, 1)
    assert unsafe_convolutions(nn.Sequential(grouped, *others)) == ["0"]


def test_onednn_is_off_for_them_and_on_again(monkeypatch):
    monkeypatch.setattr(safety, "_told", set())
    narrow, wide = residual_network((4, 6), (1, 1)), residual_network((16, 32), (1, 1))
    with pytest.warns(UserWarning, match="stages.1.0.shortcut.0"), safe_convolutions(narrow, CPU):
        assert not torch._C._get_mkldnn_enabled()
    assert torch._C._get_mkldnn_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with safe_convolutions(narrow, CPU):  # it was said
            assert not torch._C._get_mkldnn_enabled()
        with safe_convolutions(wide, CPU):
            assert torch._C._get_mkldnn_enabled()
        with safe_convolutions(narrow, torch.device("cuda")):
            assert torch._C._get_mkldnn_enabled()


@pytest.mark.filterwarnings("ignore:training without oneDNN")
def test_channels_last_training_of_a_narrow_model_survives():
    images, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 3
    model = residual_network((4, 6), (1, 1), in_channels=3, classes=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = fit(
        model, [(images, labels)] * 4, optimizer, epochs=5, options=TrainingOptions(channels_last=True)
    )
    assert result.history[-1].loss < result.history[0].loss
