"""Rewinding gives back a training as it was at one step, bit by bit, also after a cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dwindle import simulate
from dwindle.config import Target
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.training import Rewinding, compress


class Setting:
    """A model with batch norm, AdamW, a schedule, and the same batch at the same step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05, weight_decay=0.1)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.8)

    def train(self, first: int, last: int, rewinding: Rewinding | None = None) -> list[float]:
        losses = []
        with compress(self.model, [] if rewinding is None else [rewinding]) as run:
            for step in range(first, last):
                x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
                loss = (self.model(x) - x[:, :2]).square().mean()
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.schedule.step()
                run.step()
                losses.append(float(loss.detach()))
        return losses


@pytest.mark.parametrize("step", [0, 3])
def test_training_goes_on_as_it_did_from_that_step(step: int) -> None:
    own = Setting()
    rewinding = Rewinding(own.model, own.optimizer, own.schedule, step=step)
    parameters = list(own.model.parameters())
    first = own.train(0, 7, rewinding)
    end = copy.deepcopy(own.model.state_dict())
    assert rewinding.restore() == rewinding.steps == step
    assert own.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.8**step)
    assert list(map(id, own.model.parameters())) == list(map(id, parameters))
    assert own.train(step, 7, rewinding) == first[step:]
    assert all(torch.equal(value, end[key]) for key, value in own.model.state_dict().items())
    rewinding.restore()  # what was kept is not used up
    assert own.train(step, 7) == first[step:]


def test_masks_stay() -> None:
    own = Setting()
    rewinding = Rewinding(own.model, own.optimizer, own.schedule)
    before = own.model[0].weight.detach().clone()
    own.train(0, 3)
    mask = (torch.arange(8) % 2).float()[:, None]
    simulate.attach_mask(own.model, Target("0", "weight"), mask)
    rewinding.restore()
    assert torch.equal(own.model[0].weight, before * mask)


def test_a_saved_state_is_taken_over() -> None:
    own, other = Setting(), Setting()
    rewinding = Rewinding(own.model, own.optimizer, own.schedule, step=2)
    losses = own.train(0, 5, rewinding)
    again = Rewinding(other.model, other.optimizer, other.schedule, step=2)
    again.load_state_dict(rewinding.state_dict())
    assert again.restore() == 2
    assert other.train(2, 5) == losses[2:]


def test_after_a_cut_the_kept_state_is_cut_too() -> None:
    own = Setting()
    rewinding = Rewinding(own.model, own.optimizer, own.schedule, step=2)
    own.train(0, 4, rewinding)
    weight, moment = (
        rewinding._kept["tensors"]["0.weight"],
        rewinding._kept["optimizer"]["0.weight"]["exp_avg"],
    )  # type: ignore[index]
    stays = torch.tensor([1, 4, 6])
    keep = {f"0.{n}": {0: stays} for n in ("weight", "bias")} | {"3.weight": {1: stays}}
    keep |= {f"1.{n}": {0: stays} for n in ("weight", "bias", "running_mean", "running_var")}
    small = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    rewinding.model, rewinding.schedule = small, None
    rewinding.optimizer = torch.optim.AdamW(small.parameters(), lr=1.0)
    with pytest.raises(DwindleError, match=r"0.weight has shape \[3, 5\] and had shape \[8, 5\]"):
        rewinding.restore()
    rewinding.follow(keep)
    rewinding.restore()
    assert torch.equal(small[0].weight, weight[stays])
    assert torch.equal(rewinding.optimizer.state[small[0].weight]["exp_avg"], moment[stays])
    assert rewinding.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.8**2)


@pytest.mark.parametrize("step", [-1, True, 1.5])
def test_errors(step: Any) -> None:
    own = Setting()
    with pytest.raises(ConfigError, match="step must be"):
        Rewinding(own.model, step=step)
    with pytest.raises(DwindleError, match="step 3 was never seen"):
        Rewinding(own.model, step=3).restore()
    with pytest.raises(ConfigError, match="needs kept"):
        Rewinding(own.model).load_state_dict({"steps": 0})
