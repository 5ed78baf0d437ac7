"""Exact axes, and the proof that shares no code with the analysis."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dwindle as dw
from dwindle.graph.analysis import analyse
from dwindle.graph.inspect import describe, to_json
from support import independent
from support.architectures.example import Example


class Block(nn.Module):
    """A residual stage with batch norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.second = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = x + self.second(F.relu(self.norm(self.first(x))))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Linear attention: a feature map that is not zero at zero when ``shifted``."""

    def __init__(self, shifted: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 8) for _ in range(3))
        self.out = nn.Linear(8, 6)
        self.shifted = shifted

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.shifted:
            q, k = F.elu(q) + 1, F.elu(k) + 1
        return self.out(q @ (k.transpose(1, 2) @ v))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.middle = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 12)
        self.down = nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.sigmoid(self.middle(self.norm(self.up(x)))))


def _pruned(model: nn.Module, x: torch.Tensor, **options: object) -> tuple[Example, dw.ShrinkResult]:
    example = Example(copy.deepcopy(model), (x,))
    return example, dw.prune(model, (x,), ratio=0.5, **options)  # type: ignore[arg-type]


def test_it_imports_nothing_of_the_analysis() -> None:
    tree = ast.parse(Path(independent.__file__).read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if name.startswith("dwindle")]


def test_the_pruned_model_equals_the_plainly_masked_one_in_both_modes() -> None:
    example, result = _pruned(Block(), torch.randn(2, 3, 8, 8), exact=True)
    found = independent.compare(example.model, result.model, result.plan.keep, example)
    assert found.difference < 1e-12
    assert found.training_difference is not None
    assert found.training_difference < 1e-9
    assert found.moved > 1e-3
    assert found.batches == [1, 2, 3]
    plan = result.plan.to_json()["keep"]
    assert independent.independent_difference(example.model, result.model, plan, example) < 1e-9
    only = independent.compare(example.model, result.model, plan, example, producers_only=True)
    assert only.difference < 1e-12


@pytest.mark.parametrize("name", ["first.weight", "second.weight", "norm.bias", "head.weight"])
def test_one_index_off_by_one_is_seen(name: str) -> None:
    example, result = _pruned(Block(), torch.randn(2, 3, 8, 8), exact=True)
    keep = copy.deepcopy(result.plan.keep)
    dim = max(keep[name])
    size = dict(example.model.named_parameters())[name].shape[dim]
    keep[name][dim] = (keep[name][dim] + 1) % size
    found = independent.compare(example.model, result.model, keep, example)
    assert max(found.difference, found.training_difference or 0.0) > 1e-4


def test_a_norm_over_an_axis_makes_it_inexact() -> None:
    analysis = analyse(Normed(), (torch.randn(2, 6),))
    by_size = {info.size: info for info in analysis.selected()}
    assert not by_size[16].exact
    assert (by_size[16].inexact or "").startswith("layer_norm at ")
    assert by_size[12].exact  # a sigmoid in front of a masked weight does no harm
    assert "(mask inside layer_norm at " in describe(analysis)
    assert {entry["size"]: entry["exact"] for entry in to_json(analysis)["axes"]}[16] is False


def test_exact_leaves_the_inexact_axes_alone() -> None:
    example, result = _pruned(Normed(), torch.randn(4, 6), exact=True)
    assert [entry["before"] for entry in result.plan.cuts] == [12]
    assert result.verification is not None
    assert result.verification.reference == "the masked model itself"
    assert independent.independent_difference(example.model, result.model, result.plan.keep, example) < 1e-12
    example, result = _pruned(Normed(), torch.randn(4, 6))
    assert sorted(entry["before"] for entry in result.plan.cuts) == [12, 16]
    assert independent.independent_difference(example.model, result.model, result.plan.keep, example) > 1e-4


@pytest.mark.parametrize("shifted", [False, True])
def test_sums_of_activations_are_exact_only_where_zeros_arrive(shifted: bool) -> None:
    model, x = Attention(shifted), torch.randn(2, 5, 6)
    example, result = _pruned(copy.deepcopy(model), x)
    assert len(result.plan.cuts) == 2
    plain = independent.independent_difference(example.model, result.model, result.plan.keep, example)
    assert (plain < 1e-12) is not shifted
    example, result = _pruned(model, x, exact=True)
    assert len(result.plan.cuts) == (1 if shifted else 2)
    assert independent.independent_difference(example.model, result.model, result.plan.keep, example) < 1e-12
