"""Which arguments of a forward a batch gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.training.inputs import forward_inputs, input_batches

X, Y, LABELS = torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([0, 1])


class One(nn.Module):
    def forward(self, x: Any, scale: float = 1.0) -> Any:
        return x


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor, z: Tensor | None = None) -> Tensor:
        return x + y


class Single(nn.Module):
    def forward(self, state: Any) -> Any:
        return state


@pytest.mark.parametrize(
    ("model", "batch", "args", "kwargs"),
    [
        (One(), X, (X,), {}),
        (One(), (X, LABELS), (X,), {}),
        (One(), [X, LABELS], (X,), {}),
        (One(), ((X,), LABELS), (X,), {}),
        (One(), ([X, Y], LABELS), ([X, Y],), {}),  # a detector's list of images is one argument
        (Single(), ((X, Y), LABELS), ((X, Y),), {}),  # so is a tuple of too many
        (Two(), (X, Y, LABELS), (X, Y), {}),
        (Two(), ((X, Y), LABELS), (X, Y), {}),
        (Two(), ([X, Y], LABELS), (X, Y), {}),
        (Two(), ((X, Y, X), LABELS), (X, Y, X), {}),
        (Two(), (X, Y), (X, Y), {}),
        (Two(), ({"x": X, "y": Y}, LABELS), (), {"x": X, "y": Y}),
        (Single(), ({"x": X}, LABELS), ({"x": X},), {}),  # a forward that takes the whole dictionary
        (Two(), {"x": X, "y": Y, "labels": LABELS, "other": X}, (), {"x": X, "y": Y}),
    ],
)
def test_arguments(model: nn.Module, batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    found = forward_inputs(model, batch)
    assert found[1].keys() == kwargs.keys()
    assert all(found[1][key] is value for key, value in kwargs.items())
    assert len(found[0]) == len(args)
    for own, wanted in zip(found[0], args, strict=True):
        several = isinstance(wanted, tuple | list | dict)
        assert all(a is b for a, b in zip(own, wanted, strict=True)) if several else own is wanted


def test_adapt_and_errors() -> None:
    assert forward_inputs(Two(), 5, lambda number: (X, Y))[0] == (X, Y)
    assert torch.equal(forward_inputs(One(), np.zeros((2, 3), np.float32))[0][0], X)
    with pytest.raises(ConfigError, match="no key of the batch"):
        forward_inputs(Two(), {"labels": LABELS})
    with pytest.raises(ConfigError, match="adapt=function"):
        forward_inputs(One(), 5)
    with pytest.raises(ConfigError, match="empty"):
        forward_inputs(One(), ())
    with pytest.raises(ConfigError, match="gave no batch"):
        list(input_batches(One(), []))
