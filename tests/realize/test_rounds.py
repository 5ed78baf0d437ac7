"""Rounds of pruning: exact shares, real shrinking, lottery tickets against a reference written by hand."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

import dwindle as dw
from dwindle import simulate
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.pruning import (
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    LevelPruner,
    ObservingPruner,
    Pruner,
    RandomPruner,
)
from dwindle.realize import Round, lottery_ticket, prune_in_rounds
from dwindle.training import compress
from pruning.models import Residual


def images(number: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def residual() -> Residual:
    torch.manual_seed(0)
    return Residual()


class Trainer:
    """Trains with one optimizer that lives through all rounds, and remembers what it saw."""

    def __init__(self, model: nn.Module) -> None:
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
        self.rounds: list[Round] = []
        self.zeros: list[bool] = []

    def __call__(self, model: nn.Module, at: Round) -> None:
        self.rounds.append(at)
        with compress(model, at.compressors) as run:
            for step in range(3):
                model(images(seed=step)).square().mean().backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                run.step()


CONV: list[dict[str, Any]] = [{"op_names": ["stem", "expand", "project"], "sparse_ratio": 0.5}]


@pytest.mark.parametrize("kind", [L1NormPruner, FPGMPruner, L2NormPruner, RandomPruner])
def test_real_shrinking_in_every_round_ends_at_the_exact_ratio(kind: type[Pruner]) -> None:
    model = residual()
    train = Trainer(model)
    widths = []
    result = prune_in_rounds(
        model,
        CONV,
        kind,
        rounds=3,
        train=train,
        example_inputs=(images(),),
        shrink=True,
        optimizer=train.optimizer,
        evaluate=lambda small: widths.append((small.stem.out_channels, small.expand.out_channels)) or 0.25,
    )
    assert result.model is model
    assert widths == [(7, 14), (6, 11), (4, 8)]  # 8 and 16 less int(1/6), int(1/3), int(1/2) of them
    assert [record.metric for record in result.history] == [0.25] * 3
    assert [(at.number, at.rounds, at.first_step) for at in train.rounds] == [(1, 3, 0), (2, 3, 0), (3, 3, 0)]
    for record in result.history:
        assert record.shrink is not None
        assert record.shrink.verification is not None
        assert record.shrink.verification.max_difference < 1e-9
    assert set(train.optimizer.param_groups[0]["params"]) == set(model.parameters())
    assert result.history[-1].parameters == sum(p.numel() for p in model.parameters())
    assert not result.masks


@pytest.mark.parametrize("kind", [LevelPruner, RandomPruner])
@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        ("linear", lambda i: 0.8 * i / 4),
        ("agp", lambda i: 0.8 * (1 - (1 - i / 4) ** 3)),
        ("geometric", lambda i: 1 - 0.2 ** (i / 4)),
        (lambda goal, number, rounds: goal if number > 2 else 0.1, lambda i: 0.8 if i > 2 else 0.1),
    ],
)
def test_masked_rounds_follow_their_schedule_and_what_is_gone_stays_gone(
    kind: type[Pruner], schedule: Any, formula: Any
) -> None:
    model = residual()
    masks: list[torch.Tensor] = []

    def train(model: nn.Module, at: Round) -> None:
        Trainer(model)(model, at)
        masks.append(simulate.masks_as_nested(model)["expand"]["weight"].clone())

    result = prune_in_rounds(
        model,
        [{"op_names": ["expand"], "sparse_ratio": 0.8, "granularity": None}],
        kind,
        rounds=4,
        train=train,
        schedule=schedule,
    )
    assert [int((mask == 0).sum()) for mask in masks] == [int(128 * formula(i) + 1e-9) for i in range(1, 5)]
    assert all(bool((sooner >= later).all()) for sooner, later in itertools.pairwise(masks))
    assert result.history[-1].sparsity == pytest.approx(102 / 128)
    assert int((model.expand.weight == 0).sum()) == 102


def test_single_zeros_that_cannot_be_cut_stay_masked() -> None:
    model = residual()
    config = [{"op_names": ["expand", "head"], "sparse_ratio": 0.75, "granularity": None}]
    result = prune_in_rounds(
        model, config, rounds=2, train=Trainer(model), example_inputs=(images(),), shrink=True
    )
    zeros = int((model.expand.weight == 0).sum()) + 128 - model.expand.weight.numel()
    assert zeros == 96
    assert result.history[-1].sparsity == pytest.approx((96 + 30) / (128 + 40))
    assert set(result.masks) <= {"expand", "head"}


def test_global_groups_and_bounds() -> None:
    model = residual()
    config = [
        {"op_names": ["expand", "head"], "sparse_ratio": 0.5, "global_group_id": 1, "max_sparse_ratio": 0.7}
    ]
    result = prune_in_rounds(model, config, LevelPruner, rounds=3, train=Trainer(model))
    counts = [int((result.masks[name]["weight"] == 0).sum()) for name in ("expand", "head")]
    assert sum(counts) == 84
    assert counts[0] <= 128 * 0.7
    assert counts[1] <= 40 * 0.7


class Gradient(ObservingPruner):
    """Ranks by the gradient of the loss; needs a training run."""

    needs_gradients = True

    def gradients(self) -> None:
        modules = dict(self.model.named_modules())
        for target, planned in self.plan.goals.items():
            gradient = modules[target.module]._parameters[target.name].grad  # type: ignore[union-attr]
            self.add(target, planned.granularity.reduce(gradient.abs(), "sum"))  # type: ignore[union-attr]

    def metric(self, target: Any, weight: torch.Tensor, granularity: Any) -> torch.Tensor:
        return self.mean(target)


def test_pruners_with_data_and_pruners_with_a_training_of_their_own() -> None:
    data = [(images(seed=s), torch.arange(4)) for s in range(3)]
    model = residual()
    config = [{"op_names": ["expand"], "sparse_ratio": 0.5}]
    result = prune_in_rounds(
        model,
        config,
        Gradient,
        rounds=2,
        train=Trainer(model),
        options={"data": data},
        example_inputs=(images(),),
    )
    assert int((result.masks["expand"]["bias"] == 0).sum()) == 8
    model = residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def sparsify(model: nn.Module, pruner: Pruner, at: Round) -> None:
        dw.training.fit(model, data, optimizer, epochs=1, compressors=[pruner])

    result = prune_in_rounds(
        model,
        config,
        Gradient,
        rounds=2,
        train=Trainer(model),
        options={"training_steps": 2},
        sparsify=sparsify,
        example_inputs=(images(),),
        shrink=True,
    )
    assert model.expand.out_channels == model.depthwise.out_channels == 8


# The lottery ticket by hand, in float64: a linear layer, SGD with momentum, everything written out.


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(5, 4, generator=generator, dtype=torch.float64)


def by_hand(
    weight: torch.Tensor, rounds: int, goal: float, steps: int, rewind: int
) -> tuple[torch.Tensor, ...]:
    def train(weight: torch.Tensor, velocity: torch.Tensor, mask: torch.Tensor, first: int) -> Any:
        kept = None
        for step in range(first, steps):
            if step == rewind:
                kept = (weight.clone(), velocity.clone())
            rate = 0.1 * 0.9**step
            x, y = batch(step)
            error = x @ (weight * mask).T - y
            gradient = 2 * error.T @ x / error.numel() * mask
            velocity = 0.8 * velocity + gradient if step else gradient.clone()
            weight = weight - rate * velocity
        return weight, kept

    mask = torch.ones_like(weight)
    weight, kept = train(weight, torch.zeros_like(weight), mask, 0)
    for number in range(1, rounds + 1):
        gone = int(weight.numel() * (1 - (1 - goal) ** (number / rounds)) + 1e-9)
        order = (
            torch.where(mask == 0, torch.tensor(-1.0, dtype=torch.float64), weight.abs()).flatten().argsort()
        )
        mask = torch.ones_like(weight)
        mask.view(-1)[order[:gone]] = 0
        weight, _ = train(kept[0].clone(), kept[1].clone(), mask, rewind)
    return weight * mask, mask


@pytest.mark.parametrize("rewind", [0, 2])
def test_lottery_ticket_is_the_one_found_by_hand(rewind: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False).double()
    expected, mask = by_hand(model.weight.detach().clone(), 3, 0.7, 6, rewind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8)
    rates = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def train(model: nn.Module, at: Round) -> None:
        with compress(model, at.compressors) as run:
            for step in range(at.first_step, 6):
                x, y = batch(step)
                (model(x) - y).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                rates.step()
                run.step()

    result = lottery_ticket(
        model,
        [{"op_types": ["Linear"], "sparse_ratio": 0.7}],
        rounds=3,
        train=train,
        optimizer=optimizer,
        learning_rate_schedule=rates,
        rewind_step=rewind,
    )
    assert torch.equal(result.masks[""]["weight"], mask)
    assert torch.allclose(model.weight, expected, rtol=0, atol=1e-14)


def test_a_ticket_with_real_shrinking_is_the_small_model_at_its_early_weights() -> None:
    model = residual()
    first = copy.deepcopy(model.state_dict())
    trainer = Trainer(model)

    def train(model: nn.Module, at: Round) -> None:
        if at.number == 2:
            start.update(copy.deepcopy(model.state_dict()))
            return
        trainer(model, at)

    start: dict[str, torch.Tensor] = {}
    result = lottery_ticket(
        model,
        CONV,
        L1NormPruner,
        rounds=2,
        train=train,
        optimizer=trainer.optimizer,
        example_inputs=(images(),),
        shrink=True,
    )
    assert model.stem.out_channels == 4
    kept = torch.arange(8)
    for record in result.history:
        assert record.shrink is not None
        kept = kept[record.shrink.plan.keep["stem.weight"][0]]
    assert torch.equal(start["stem.weight"], first["stem.weight"][kept])
    assert not trainer.optimizer.state  # the optimizer is as new, as it was at step 0


@pytest.mark.parametrize(
    ("config", "given", "words"),
    [
        (CONV, {"rounds": 0}, "rounds must be"),
        (CONV, {"schedule": "cubic"}, "schedule must be one of"),
        (CONV, {"shrink": True}, "needs example_inputs"),
        (CONV, {"schedule": lambda goal, number, rounds: 1 - number / 3}, "must rise"),
        ([{"op_types": ["Conv2d"], "sparse_threshold": 0.1}], {}, "need a sparse_ratio"),
        ([{"op_names": ["project"], "granularity": "2:4"}], {}, "need a sparse_ratio"),
        ([{"op_names": ["project"], "sparse_ratio": 1.0}], {"schedule": "geometric"}, "below 1"),
    ],
)
def test_errors_leave_the_model_alone(config: Any, given: dict[str, Any], words: str) -> None:
    model = residual()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=words):
        prune_in_rounds(model, config, L1NormPruner, **{"rounds": 3, "train": Trainer(model), **given})
    assert not simulate.simulated_targets(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_training_that_does_not_come_to_the_step() -> None:
    model = residual()
    with pytest.raises(DwindleError, match="step 9 was never seen"):
        lottery_ticket(model, CONV, L1NormPruner, rounds=1, train=Trainer(model), rewind_step=9)
