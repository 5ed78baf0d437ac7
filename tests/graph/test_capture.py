"""Recordings leave a model as it was, and look into branches that the example inputs do not take."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import dwindle as dw
from dwindle.graph import analyse
from dwindle.graph.capture import unreached
from dwindle.graph.stand_ins import copied


class Keeping(nn.Module):
    """Keeps what it computed, counts its calls, and holds a cache that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.calls = 0
        self.register_buffer("total", torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.features = self.first(x).relu()
        self.total += self.features.sum(0)
        return self.head(self.features)


@pytest.mark.parametrize("training", [True, False])
def test_what_a_forward_assigns_is_taken_back(training: bool) -> None:
    model = Keeping().train(training)
    before = dict(vars(model))
    dw.prune(model, torch.randn(2, 6), ratio=0.5)
    assert set(vars(model)) - {"_dwindle_history"} == set(before)
    assert model.calls == 0
    assert torch.equal(model.total, torch.zeros(8))
    model(torch.randn(2, 6))
    assert model.features.shape == (2, 8)


def test_a_kept_tensor_with_history_is_copied_without_it() -> None:
    model = Keeping()
    model(torch.randn(2, 6))
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    twin = copied(model)
    assert twin.features.grad_fn is None
    assert torch.equal(twin.features, model.features)
    assert twin.first.weight is not model.first.weight


class Choosing(nn.Module):
    """Which of two layers runs depends on the numbers."""

    def __init__(self, read: Any) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.one, self.other = nn.Linear(16, 16), nn.Linear(16, 16)
        self.read = read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.head(self.one(x) if self.read(x) else self.other(x))


def test_the_branch_not_taken_shrinks_too() -> None:
    model = Choosing(lambda x: x.mean() < 1e9)
    analysis = analyse(model, (torch.randn(2, 6),))
    assert len(analysis.traces) == 3
    assert analysis.trace.choices[0].free
    assert unreached(analysis.traces) == set()
    dw.prune(model, torch.randn(2, 6), ratio=0.5)
    model.read = lambda x: False
    assert model(torch.randn(5, 6)).shape == (5, 3)
    assert model.other.weight.shape == (8, 8)


def test_a_branch_that_cannot_be_tried_is_told() -> None:
    model = Choosing(lambda x: float(x.detach().mean()) < 1e9)
    result = dw.prune(model, torch.randn(2, 6), ratio=0.5)
    (note,) = [note for note in result.notes if "reads values of tensors" in note]
    assert "test_capture.py" in note
    assert "other.weight" in note


def test_a_model_that_reads_values_but_reaches_everything_has_no_note() -> None:
    def forward(x: torch.Tensor) -> bool:
        return bool(x.sum() > -1e9)

    model = Choosing(forward)
    del model.other
    assert not any("reads values" in note for note in dw.prune(model, torch.randn(2, 6), ratio=0.5).notes)


def test_sizes_read_from_a_layer_follow_its_weight() -> None:
    """``out_features`` sizes another tensor: both must stay equal."""

    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift, self.mix, self.head = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            start = torch.zeros(x.shape[0], self.lift.out_features, dtype=x.dtype)
            return self.head(self.mix(self.lift(x) + start).relu() + start[:, : self.mix.out_features])

    model = Sized()
    result = dw.prune(model, torch.randn(2, 6), ratio=0.5)
    assert result.verification.proven
    assert model.lift.out_features == model.lift.weight.shape[0]
    assert model.mix.out_features == model.mix.weight.shape[0] == 6
