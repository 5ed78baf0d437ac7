"""Config keys that choose by kind of axis, and that fix which sizes are allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dwindle as dw
from dwindle.config.errors import ConfigError


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.out = nn.Linear(32, 32)
        self.fc1, self.fc2 = nn.Linear(32, 60), nn.Linear(60, 32)
        self.heads = 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))


def entry(**keys: Any) -> list[dict[str, Any]]:
    return [{"op_types": ["Linear"], "sparse_ratio": 0.5, "granularity": "out_channel", **keys}]


def realized(keys: dict[str, Any]) -> nn.Module:
    model, x = Attention(), torch.randn(2, 6, 32)
    pruner = dw.pruning.L1NormPruner(model, entry(**keys), example_inputs=(x,))
    pruner.compress()
    return dw.realize(model, example_inputs=(x,)).model


def test_only_heads_go() -> None:
    model = realized({"axes": ["heads"]})
    assert (model.q.out_features, model.fc1.out_features, model.heads) == (16, 60, 4)


def test_only_feed_forward_goes() -> None:
    model = realized({"axes": ["feed_forward"]})
    assert (model.q.out_features, model.fc1.out_features) == (32, 30)


@pytest.mark.parametrize(
    ("keys", "width"), [({"round_to": 8}, 32), ({"minimum": 50}, 50), ({"minimum": 99}, 60)]
)
def test_sizes(keys: dict[str, Any], width: int) -> None:
    assert realized({"axes": ["feed_forward"], **keys}).fc1.out_features == width


def test_rounding_counts_the_width_of_heads() -> None:
    """Four of eight heads of width 4 are a multiple of 8 already."""
    model = realized({"axes": ["heads"], "round_to": 8})
    assert (model.q.out_features, model.heads) == (16, 4)


def test_sizes_without_axes() -> None:
    model = nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 4))
    config = [{"op_names": ["0"], "sparse_ratio": 0.5, "granularity": "out_channel", "round_to": 8}]
    _, masks = dw.pruning.L1NormPruner(model, config).compress()
    assert int(masks["0"]["weight"].any(1).sum()) == 16


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"granularity": "element", "round_to": 8}, "round_to counts whole channels"),
        ({"axes": ["head"]}, "axes"),
        ({"round_to": 8, "internal_metric_block": 4}, "exclude each other"),
    ],
)
def test_mistakes(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dw.pruning.L1NormPruner(Attention(), entry(**keys), example_inputs=(torch.randn(2, 6, 32),))


def test_axes_need_inputs() -> None:
    with pytest.raises(ConfigError, match="needs example_inputs"):
        dw.pruning.L1NormPruner(Attention(), entry(axes=["heads"]))
