"""The learning rate of compressors' own parameters, times a factor: with SGD, with Adam, and beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.training import compress
from support.counting_compressor import Counting


class Wishing(Counting):
    """Has wishes of its own."""

    def __init__(self, model: nn.Module, **wishes: Any) -> None:
        super().__init__(model)
        self.wishes = wishes

    def parameter_options(self) -> dict[str, Any]:
        return self.wishes

    def parameters(self) -> Iterator[nn.Parameter]:
        yield self.scale


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_rates_are_multiplied_and_steps_too(kind: Any) -> None:
    moved = []
    for multiplier in (1.0, 10.0):
        model = nn.Linear(2, 2)
        optimizer = kind(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        compressors = [Counting(model), Wishing(model, lr=0.002, weight_decay=0.0)]
        with compress(model, compressors) as run:
            run.add_parameters_to(optimizer, schedule=schedule, multiplier=multiplier)
            assert rates(optimizer) == pytest.approx([0.01, 0.01 * multiplier, 0.002 * multiplier])
            run.loss().backward()  # type: ignore[union-attr]
            optimizer.step()
            schedule.step()
        assert rates(optimizer) == pytest.approx([0.005, 0.005 * multiplier, 0.001 * multiplier])
        moved.append([float(1 - own.scale.detach()) for own in compressors])
    assert moved[1] == pytest.approx([10 * own for own in moved[0]], rel=1e-4)


def test_given_rates_and_those_of_adam_beside_sgd() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adaptive, faster = Wishing(model, adaptive=True), Wishing(model, adaptive=True, lr=0.5)
    with compress(model, [adaptive, faster, Counting(model)]) as run:
        apart = run.adaptive_optimizer(optimizer, multiplier=4.0)
        assert apart is not None
        assert rates(apart) == pytest.approx([0.004, 2.0])
        assert run.add_parameters_to(optimizer, lr=0.3, multiplier=2.0) == 1
        assert rates(optimizer) == pytest.approx([0.1, 0.6])
        for wrong in (0.0, -1.0, float("nan")):
            with pytest.raises(ConfigError, match="multiplier must be above 0"):
                run.add_parameters_to(optimizer, multiplier=wrong)
