"""NNI 2.x's sensitivity analysis and masks applied for good."""

from __future__ import annotations

import copy
import csv
from typing import Any

import pytest
import torch
from torch import nn

from compat.nni_loops import DUMMY, padded
from dwindle import simulate
from dwindle.compat.nni.compression.pytorch.utils import SensitivityAnalysis, apply_compression_results
from dwindle.compat.nni.v2 import L1NormPruner
from dwindle.config.errors import ConfigError


def left(model: nn.Module, scale: float = 1.0) -> float:
    """The share of the first convolution that is not masked."""
    return scale * float((model.conv1.weight != 0).float().mean())  # type: ignore[operator, union-attr]


def test_each_layer_is_measured_alone(tmp_path: Any) -> None:
    model = padded()
    before = copy.deepcopy(model.state_dict())
    analysis = SensitivityAnalysis(model, left, sparsities=[0.5, 0.25])
    found = analysis.analysis(val_args=[2.0])
    assert found == {
        "conv1": {0.0: 2.0, 0.25: 1.5, 0.5: 1.0},
        "conv2": {0.0: 2.0, 0.25: 2.0, 0.5: 2.0},
        "conv3": {0.0: 2.0, 0.25: 2.0, 0.5: 2.0},
    }
    assert not simulate.simulated_targets(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    analysis.export(tmp_path / "table.csv")
    rows = list(csv.reader((tmp_path / "table.csv").open()))
    assert rows[:2] == [["layername", "0.0", "0.25", "0.5"], ["conv1", "2.0", "1.5", "1.0"]]


@pytest.mark.parametrize(("mode", "value"), [("minimize", 0.8), ("dropped", 0.2)])
def test_early_stop(mode: str, value: float) -> None:
    analysis = SensitivityAnalysis(
        padded(), left, [0.25, 0.5, 0.75], "fine-grained", early_stop_mode=mode, early_stop_value=value
    )
    assert list(analysis.analysis(specified_layers=["conv1"])["conv1"]) == [0.0, 0.25]


def test_masks_for_good(tmp_path: Any) -> None:
    model, plain = padded().eval(), padded().eval()
    _, masks = L1NormPruner(model, [{"sparsity": 0.5, "op_types": ["Conv2d"]}]).compress()
    torch.save(masks, tmp_path / "masks.pth")
    apply_compression_results(plain, tmp_path / "masks.pth")
    assert torch.equal(plain(DUMMY), model(DUMMY))
    before = copy.deepcopy(plain.state_dict())
    with pytest.raises(ConfigError, match="there is no parameter"):
        apply_compression_results(
            plain, {"conv1": {"weight": torch.zeros(8, 3, 3, 3), "wait": torch.zeros(1)}}
        )
    with pytest.raises(ConfigError, match="its mask"):
        apply_compression_results(plain, {"conv1": {"weight": torch.zeros(8)}})
    assert torch.equal(plain.conv1.weight, before["conv1.weight"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prune_type": "l3"}, "prune_type"),
        ({"early_stop_mode": "drop", "early_stop_value": 1}, "did you mean 'dropped'"),
        ({"early_stop_mode": "dropped"}, "go together"),
        ({"sparsities": [0.5, 2]}, "between 0 and 1"),
    ],
)
def test_errors(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SensitivityAnalysis(padded(), left, **given)
