"""Pruners under schedules: the share after every step, what observers see, resuming, realizing, errors."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

import dwindle as dw
from dwindle import simulate
from dwindle.config import Target
from dwindle.config.errors import ConfigError
from dwindle.pruning import (
    AGPPruner,
    FPGMPruner,
    L1NormPruner,
    LevelPruner,
    LinearPruner,
    ObservingPruner,
    Pruner,
    ScheduledPruner,
)
from dwindle.training import (
    AdaptiveSchedule,
    ExponentialSchedule,
    LinearSchedule,
    MultistepSchedule,
    compress,
)
from pruning.models import Residual

LINEAR: list[dict[str, Any]] = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]


class MeanOutput(ObservingPruner):
    """Ranks output features by their mean absolute value in training."""

    def watch(self) -> Iterator[RemovableHandle]:
        modules = dict(self.model.named_modules())
        for target in self.plan.goals:
            yield modules[target.module].register_forward_hook(
                lambda module, args, output, target=target: self.add(
                    target, output.detach().abs().mean(0).reshape(-1)
                )
            )

    def metric(self, target: Target, weight: torch.Tensor, granularity: Any) -> torch.Tensor:
        return self.mean(target)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 17), nn.ReLU(), nn.Linear(17, 3))


def trained(model: nn.Module, compressor: Any, steps: int, seed: int = 1) -> Iterator[int]:
    """Train inside a run; yields after every step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with compress(model, [compressor]) as run:
        for step in range(1, steps + 1):
            x = torch.randn(8, 10, generator=generator)
            loss = (model(x) - x[:, :3]).square().mean() + run.loss()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
            yield step


def masked(model: nn.Module, path: str = "0.weight") -> int:
    mask = {str(target): mask for target, mask in simulate.get_masks(model).items()}.get(path)
    return 0 if mask is None else int((mask == 0).sum())


@pytest.mark.parametrize(
    ("kind", "share"),
    [(LinearPruner, lambda k, n: k / n), (AGPPruner, lambda k, n: 1 - (1 - k / n) ** 3)],
)
def test_the_share_after_every_step_is_the_formula(kind: type[ScheduledPruner], share: Any) -> None:
    model = network()
    pruner = kind(LevelPruner(model, LINEAR), 3, 5)  # type: ignore[call-arg, arg-type]
    counts = [masked(model) for _ in trained(model, pruner, 20)]
    expected = [math.floor(170 * 0.5 * share(min(step // 3, 5), 5) + 1e-9) for step in range(1, 21)]
    assert counts == expected
    assert pruner.finished
    assert int((model[0].weight == 0).sum()) == 85  # zeros stay when the block is left


def test_a_structured_pruner_reaches_its_goal_and_is_realized_with_proof() -> None:
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(4, 3, 8, 8)
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    pruner = AGPPruner(L1NormPruner(model, config, example_inputs=(x,)), 1, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with dw.compress(model, [pruner]) as run:
        for _ in range(5):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
        result = run.realize(example_inputs=(x,))
    assert (model.stem.out_channels, model.expand.out_channels, model.project.out_channels) == (4, 8, 4)
    assert result.verification is not None
    assert result.verification.max_difference < 1e-9


def test_weights_come_back_when_others_become_smaller() -> None:
    model = nn.Linear(4, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    pruner = LinearPruner(LevelPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}]), 1, 2)
    with compress(model, [pruner]) as run:
        run.step()
        assert pruner.masks[""]["weight"].tolist() == [[0, 1, 1, 1]]
        with torch.no_grad():
            model._parameters["weight"].copy_(torch.tensor([[1.0, 0.1, 0.2, 4.0]]))  # type: ignore[union-attr]
        run.step()
        assert pruner.masks[""]["weight"].tolist() == [[1, 0, 0, 1]]


def test_masks_come_from_what_was_seen_since_the_last_update() -> None:
    model = network()
    inner = MeanOutput(model, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    pruner = ScheduledPruner(inner, LinearSchedule(0.0, 1.0, steps=4), 2)
    seen: list[torch.Tensor] = []
    handle = model[0].register_forward_hook(lambda m, a, output: seen.append(output.detach().abs().mean(0)))
    counts = []
    for step in trained(model, pruner, 6):
        counts.append(masked(model, "0.bias"))
        if step in (2, 4):
            expected = torch.stack(seen).double().mean(0).argsort()[: 4 * step // 2]
            assert sorted((pruner.masks["0"]["bias"] == 0).nonzero().flatten().tolist()) == sorted(
                expected.tolist()
            )
            seen.clear()
    handle.remove()
    assert counts == [0, 4, 4, 8, 8, 8]
    assert not inner._handles  # nothing is watched once the goal is reached


def test_values_may_be_ratios() -> None:
    model = network()
    config = [*LINEAR, {"op_names": ["none"], "sparse_ratio": 0.0}][:1]
    pruner = ScheduledPruner(
        LevelPruner(model, config), ExponentialSchedule(0.0, 0.5, steps=4), values="ratio"
    )
    counts = [masked(model) for _ in trained(model, pruner, 5)]
    assert counts == [math.floor(170 * (1 - 0.5 ** (min(step, 4) / 4)) + 1e-9) for step in range(1, 6)]


def test_multistep_and_adaptive() -> None:
    model = network()
    schedule = MultistepSchedule([0.0, 0.5, 1.0], [2, 4])
    counts = [masked(model) for _ in trained(model, ScheduledPruner(LevelPruner(model, LINEAR), schedule), 5)]
    assert counts == [0, 42, 42, 85, 85]
    model = network()
    adaptive = AdaptiveSchedule(increment=0.5)
    counts = []
    for step in trained(model, ScheduledPruner(LevelPruner(model, LINEAR), adaptive), 5):
        counts.append(masked(model))
        adaptive.report({1: 1.0, 2: 5.0, 3: 5.0}.get(step, 0.5))
    assert counts == [0, 42, 42, 42, 85]


def test_patterns_and_thresholds_grow_too() -> None:
    model = nn.Linear(8, 4)
    pruner = LinearPruner(LevelPruner(model, [{"op_types": ["Linear"], "granularity": "2:4"}]), 1, 4)
    with compress(model, [pruner]) as run:
        counts = []
        for _ in range(4):
            run.step()
            counts.append(masked(model, "weight"))
    assert counts == [0, 8, 8, 16]  # of every 4 none, 1, 1, 2
    model = nn.Linear(10, 10)
    pruner = LinearPruner(LevelPruner(model, [{"op_types": ["Linear"], "sparse_threshold": 0.2}]), 1, 2)
    weight = model.weight.detach().clone().abs()
    with compress(model, [pruner]) as run:
        assert masked(model, "weight") == 0
        run.step()
        assert masked(model, "weight") == int((weight < 0.1).sum())
        run.step()
        assert masked(model, "weight") == int((weight < 0.2).sum())


def test_a_resumed_run_gives_the_same_masks() -> None:
    def build() -> tuple[nn.Sequential, AGPPruner]:
        model = network()
        inner: Pruner = MeanOutput(model, [{"op_names": ["0"], "sparse_ratio": 0.6}])
        return model, AGPPruner(inner, 2, 4)

    model, pruner = build()
    saved: dict[str, Any] = {}
    for step in trained(model, pruner, 10):
        if step == 3:
            saved = copy.deepcopy({"model": model.state_dict(), "pruner": pruner.state_dict()})
        if step == 4:
            after_four = pruner.masks["0"]["bias"].clone()
            share = pruner.progress
    other, again = build()
    with compress(other, [again]):
        again.load_state_dict(saved["pruner"])
        other.load_state_dict(saved["model"])
        assert (again.steps, again.progress) == (3, pytest.approx(1 - (3 / 4) ** 3))
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            torch.randn(8, 10, generator=generator)
        other(torch.randn(8, 10, generator=generator))
        again.step()
        assert again.progress == share
        assert torch.equal(again.masks["0"]["bias"], after_four)


@pytest.mark.parametrize("kind", [L1NormPruner, FPGMPruner])
def test_what_is_masked_already_goes_first(kind: type[Pruner]) -> None:
    model = nn.Linear(6, 10)
    with torch.no_grad():
        model.weight[3:5] *= 100  # the most important ones by any measure
    simulate.attach_mask(
        model, Target("", "weight"), (~torch.isin(torch.arange(10), torch.tensor([3, 4])))[:, None]
    )
    _, masks = kind(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}]).compress()
    gone = (masks[""]["weight"].sum(1) == 0).nonzero().flatten().tolist()
    assert len(gone) == 5
    assert {3, 4} < set(gone)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda inner: AGPPruner(inner, 0, 3), "interval_steps"),
        (lambda inner: LinearPruner(inner, 2, True), "total_times"),
        (lambda inner: ScheduledPruner(inner, 0.5), "schedule must be"),
        (lambda inner: ScheduledPruner(inner, LinearSchedule(0, 1, 2), 0), "interval"),
        (
            lambda inner: ScheduledPruner(LinearPruner(inner, 1, 1), LinearSchedule(0, 1, 2)),
            "must be a pruner",
        ),
        (
            lambda inner: ScheduledPruner(inner, LinearSchedule(0, 1, 2), values="share"),
            "'progress' or 'ratio'",
        ),
        (
            lambda inner: ScheduledPruner(
                LevelPruner(inner.model, [{"op_types": ["Linear"], "sparse_threshold": 0.1}]),
                LinearSchedule(0, 1, 2),
                values="ratio",
            ),
            "above 0",
        ),
        (
            lambda inner: ScheduledPruner(
                MeanOutput(inner.model, LINEAR, training_steps=3), LinearSchedule(0, 1, 2)
            ),
            "training_steps and a schedule",
        ),
    ],
)
def test_errors(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(LevelPruner(network(), LINEAR))


def test_a_schedule_out_of_range_is_refused_before_anything_changed() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with (
        pytest.raises(ConfigError, match="not between 0 and 1"),
        compress(model, [ScheduledPruner(LevelPruner(model, LINEAR), lambda step: 1.5)]),
    ):
        pass
    assert not simulate.simulated_targets(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ConfigError, match="needs pruner, schedule"):
        LinearPruner(LevelPruner(model, LINEAR), 1, 1).load_state_dict({"steps": 1, "progress": 0})
    assert dw.pruning.AGPPruner is AGPPruner
