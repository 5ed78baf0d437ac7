"""A group that joins an optimizer late follows its scheduler as if it had been there from the beginning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from dwindle.training import compress
from dwindle.training.parameter_groups import follow_new_groups

MAKERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 10),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (step + 1)),
    "steps": lambda o: schedulers.StepLR(o, 2),
    "multiply": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "sequence": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, 1.0, 3), schedulers.CosineAnnealingLR(o, 10)], [3]
    ),
    "chain": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 2), schedulers.ExponentialLR(o, 0.9)]
    ),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "one cycle": lambda o: schedulers.OneCycleLR(o, [g["lr"] for g in o.param_groups], total_steps=20),
}


def rates(optimizer: torch.optim.Optimizer, schedule: Any) -> list[list[float]]:
    seen = []
    for _ in range(8):
        optimizer.step()
        schedule.step()
        seen.append([group["lr"] for group in optimizer.param_groups])
    return seen


@pytest.mark.parametrize("name", list(MAKERS))
def test_late_equals_early(name: str) -> None:
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    early = torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 0.02}], lr=0.1, momentum=0.9)
    expected = rates(early, MAKERS[name](early))
    late = torch.optim.SGD([first], lr=0.1, momentum=0.9)
    schedule = MAKERS[name](late)
    late.add_param_group({"params": [second], "lr": 0.02})
    follow_new_groups(schedule, late, 1)
    for seen, wanted in zip(rates(late, schedule), expected, strict=True):
        assert seen == pytest.approx(wanted, rel=1e-12)


class Scores:
    """A compressor with a parameter that wants options of its own."""

    def __init__(self, **options: Any) -> None:
        self.score, self.options = nn.Parameter(torch.zeros(3)), options

    def step(self) -> None: ...
    def loss(self) -> float:
        return 0.0

    def parameters(self):
        yield self.score

    def parameter_options(self) -> dict[str, Any]:
        return self.options

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None: ...


def test_a_compressor_says_how_its_parameters_are_trained() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3, weight_decay=0.1)
    scores = [Scores(weight_decay=0.0, momentum=0.7), Scores(lr=0.01), Scores(lr=0.01)]
    with compress(model, scores) as run:
        assert run.add_parameters_to(optimizer) == 3
        assert run.add_parameters_to(optimizer) == 0
    groups = optimizer.param_groups
    assert [group["lr"] for group in groups] == [0.3, 0.3, 0.01, 0.01]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1, 0.1]
    assert "momentum" not in groups[1]  # AdamW knows no such option
