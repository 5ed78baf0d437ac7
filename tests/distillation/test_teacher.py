"""How the teacher is asked, and teachers that are no other model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.distillation import Distiller, divergence, moving_average
from dwindle.training import LinearSchedule, MultistepSchedule, compress

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Linear(5, 3))


def train(model: nn.Module, distiller: Distiller, steps: int, state: dict | None = None) -> list[float]:
    """Steps of the user's loop; returns the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with compress(model, [distiller]) as run:
        if state is not None:
            run.load_state_dict(state)
        run.add_parameters_to(optimizer)
        for _ in range(steps):
            outputs = model(X)
            loss = outputs.square().mean() + run.loss()
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
        distiller.last_state = run.state_dict()  # type: ignore[attr-defined]
    return losses


class Watch(nn.Module):
    """Notes in which mode it is called, and keeps a tensor of its own making, as rotary embeddings do."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.seen, self.scale = inner, [], None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled(), self.training))
        if self.scale is None:
            self.scale = torch.ones(3) * 2
        return self.inner(x) * self.scale


def test_inference_mode_and_normal_tensors() -> None:
    model, teacher = network(), Watch(network(1))
    teacher.train()
    config = [
        {"op_names": ["1"], "link": "inner.1"},
        {"op_names": ["3"], "link": "inner.3", "apply_method": "kl"},
    ]
    distiller = Distiller(model, config, teacher=teacher)
    train(model, distiller, 2)
    assert teacher.seen == [(True, False, False)] * 2
    assert teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_teacher_that_shares_tensors_is_asked_without_inference_mode() -> None:
    body = network()
    model, teacher = nn.Sequential(body, nn.Linear(3, 3)), Watch(body)
    distiller = Distiller(model, teacher=teacher)
    train(model, distiller, 1)
    assert teacher.seen == [(False, False, False)]


def test_schedules_of_lambda_and_options() -> None:
    model, teacher = network(), network(1)
    entry = {
        "op_names": ["3"],
        "apply_method": "kl",
        "lambda": {"linear": {"start": 2.0, "end": 0.0, "steps": 4}},
        "options": {"temperature": MultistepSchedule((2.0, 1.0), (1,))},
    }
    distiller = Distiller(model, [entry], teacher=teacher, logits_weight=0.0)
    assert distiller.links[0].weight == LinearSchedule(2.0, 0.0, 4)
    taught = copy.deepcopy(teacher).eval()(X).detach()
    with compress(model, [distiller]) as run:
        for weight, temperature in ((2.0, 2.0), (1.5, 1.0), (1.0, 1.0)):
            outputs = model(X)
            expected = weight * float(divergence(outputs.detach(), taught, temperature))
            assert float(run.loss().detach()) == pytest.approx(expected, rel=1e-5)
            run.step()
    for words, message in (
        ({"linea": {}}, "did you mean 'linear'"),
        ({"linear": {"begin": 1}}, "no argument 'begin'"),
        ({"linear": {"start": 1.0}}, "missing"),
        ({}, "a schedule is one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            Distiller(model, [{**entry, "lambda": words}], teacher=teacher)


@pytest.mark.parametrize("name", ["dkd", "dist"])
def test_other_losses_of_outputs(name: str) -> None:
    model, teacher = network(), network(1)
    distiller = Distiller(model, teacher=teacher, logits_loss=name, logits_weight=1.0, temperature=1.0)
    losses = train(model, distiller, 30)
    assert losses[-1] < losses[0]
    with pytest.raises(ConfigError, match="'dk' is not one of kl, binary, dkd, dist; did you mean 'dkd'"):
        Distiller(model, teacher=teacher, logits_loss="dk")
    with pytest.raises(ConfigError, match="no option 'alpha'"):
        Distiller(model, teacher=teacher, logits_loss=name, logits_options={"alpha": 1.0})


def test_moving_average_is_the_mean_first_and_slow_later() -> None:
    values = torch.randn(6, 3, dtype=torch.float64)
    average = torch.zeros(3, dtype=torch.float64)
    expected = torch.zeros(3, dtype=torch.float64)
    for step, value in enumerate(values, 1):
        moving_average(average, value, 0.75, step)
        expected = values[:step].mean(0) if step <= 4 else 0.75 * expected + 0.25 * value
        torch.testing.assert_close(average, expected, rtol=1e-12, atol=1e-14)
    count = torch.tensor(3)
    moving_average(count, torch.tensor(7), 0.9, 2)
    assert int(count) == 7


def test_the_moving_average_of_the_model_is_its_teacher() -> None:
    model = network()
    distiller = Distiller(model, teacher="ema", ema_decay=0.5, logits_weight=1.0, temperature=2.0)
    expected = copy.deepcopy(model).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with compress(model, [distiller]) as run:
        for step in range(1, 4):
            outputs = model(X)
            loss = run.loss()
            with torch.no_grad():
                by_hand = divergence(outputs, expected(X), 2.0)
            assert float(loss.detach()) == pytest.approx(float(by_hand), rel=1e-5, abs=1e-8)
            (outputs.square().mean() + loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
            with torch.no_grad():
                share = 1 - min(0.5, 1 - 1 / step)
                for own, other in zip(
                    expected.state_dict().values(), model.state_dict().values(), strict=True
                ):
                    own.copy_((1 - share) * own + share * other if own.is_floating_point() else other)
    for own, other in zip(
        distiller.teacher.state_dict().values(), expected.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(own, other)
    assert not any(parameter.requires_grad for parameter in distiller.teacher.parameters())
    assert not list(distiller.parameters())


def test_a_resumed_moving_average_goes_on_bit_by_bit() -> None:
    whole = network()
    expected = train(whole, Distiller(whole, teacher="ema", ema_decay=0.8), 6)
    model = network()
    first = Distiller(model, teacher="ema", ema_decay=0.8)
    begun = train(model, first, 3)
    fresh = network(7)
    second = Distiller(fresh, teacher="ema", ema_decay=0.8)
    fresh.load_state_dict(model.state_dict())
    assert begun + train(fresh, second, 3, first.last_state) == expected  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), whole.parameters(), strict=True))
    with pytest.raises(ConfigError, match="another kind of teacher"):
        Distiller(model, teacher=whole).load_state_dict(first.state_dict())


def test_a_model_that_teaches_itself() -> None:
    model = network()
    config = [{"op_names": ["0"], "link": "1", "lambda": 2.0}]
    distiller = Distiller(model, config, teacher="self", logits_weight=0.0)
    with compress(model, [distiller]) as run:
        first = model[0](X)
        second = model[1](first)
        model(X)
        loss = run.loss()
        loss.backward()
    assert float(loss.detach()) == pytest.approx(
        2 * float((first - second).square().mean().detach()), rel=1e-5
    )
    assert model[0].weight.grad is not None
    assert model[1].weight.grad is None  # the deeper one takes no gradient
    hint = [{"op_names": ["0"], "link": "3", "apply_method": "hint"}]
    assert list(Distiller(model, hint, teacher="self", logits_weight=0.0, example_inputs=X).parameters())


def test_own_teachers_are_checked() -> None:
    model = network()
    with pytest.raises(ConfigError, match="did you mean 'ema'"):
        Distiller(model, teacher="emma")
    with pytest.raises(ConfigError, match="logits_weight=0"):
        Distiller(model, [{"op_names": ["0"], "link": "1"}], teacher="self")
    with pytest.raises(ConfigError, match="another module"):
        Distiller(model, [{"op_names": ["0"]}], teacher="self", logits_weight=0.0)
    with pytest.raises(ConfigError, match="nothing can be kept"):
        Distiller(model, teacher="ema", cache="somewhere")
    with pytest.raises(ConfigError, match="ema_decay must be 0 to 1"):
        Distiller(model, teacher="ema", ema_decay=2.0)
