"""Ranks that are learned: the gates against their formula, the goal, resuming, and the small model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import dwindle as dw
from dwindle import simulate
from dwindle.config import Target
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.factorization import LowRankTraining
from dwindle.factorization.directions import GatedDirections, principal_directions
from dwindle.simulate.hard_concrete import hard_concrete, median_when_open, open_probability
from factorization.models import network, perceptron


def data(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(16, 2, generator=generator, dtype=torch.float64)
    y = (x @ weight) @ torch.randn(2, 8, generator=generator, dtype=torch.float64)
    return x, y / y.std()


def train(model: nn.Module, compressors: list[Any], steps: int) -> Any:
    x, y = data()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with dw.compress(model, compressors) as run:
        run.add_parameters_to(optimizer)
        for _ in range(steps):
            loss = nn.functional.mse_loss(model(x), y) + run.loss()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
        simulated = copy.deepcopy(model).eval()(x).detach()
    return run, simulated


def test_a_gate_that_stays_gets_the_median_of_what_it_was_when_open() -> None:
    log_alpha = torch.tensor([-2.0, 0.0, 1.0, 4.0], dtype=torch.float64)
    noise = torch.logit((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    samples = hard_concrete(log_alpha, noise[:, None])
    by_hand = [own[own > 0].median() for own in samples.t()]
    torch.testing.assert_close(median_when_open(log_alpha), torch.stack(by_hand), atol=1e-4, rtol=0)


def test_gates_multiply_directions() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(6, 5, 3, 3, dtype=torch.float64)
    bases = [principal_directions(kernel, mode)[0] for mode in (0, 1)]
    own = GatedDirections(bases, (0, 1), [torch.full((basis.shape[1],), 2.0) for basis in bases]).eval()
    own.sampling = False
    factors = [torch.rand(size, dtype=torch.float64) for size in (6, 5)]
    with torch.no_grad():
        for gate, value in zip(own.gates, factors, strict=True):
            gate.copy_(value)
    by_hand = [basis @ torch.diag(factor) @ basis.t() for basis, factor in zip(bases, factors, strict=True)]
    torch.testing.assert_close(own(kernel), torch.einsum("oihw,po,qi->pqhw", kernel, *by_hand))
    # principal: the first r directions hold the most energy there is in r
    values = torch.linalg.svdvals(kernel.reshape(6, -1))
    torch.testing.assert_close(principal_directions(kernel, 0)[1], values.square())
    kept = torch.linalg.vector_norm(bases[0][:, :2].t() @ kernel.reshape(6, -1))
    torch.testing.assert_close(kept, values[:2].square().sum().sqrt())
    own.train()
    own.sampling = True
    drawn = kernel.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda value: own(value), (drawn,))
    own.close([torch.tensor([True] * 2 + [False] * 4), torch.tensor([True] * 5)])
    assert own.ranks() == (2, 5)
    assert int(torch.linalg.matrix_rank(own(kernel).reshape(6, -1))) == 2


def test_learned_ranks_meet_the_target_and_the_small_model_equals_the_simulated_one() -> None:
    torch.manual_seed(0)
    model = perceptron().double()
    x, y = data()
    whole = dw.measure.count_macs(model, (x,))
    low_rank = LowRankTraining(model, example_inputs=x, training_steps=120, target={"macs": 0.5})
    keys = list(model.state_dict())
    run, simulated = train(model, [low_rank], 320)
    assert run.steps == 320
    assert low_rank.finished
    assert list(model.state_dict()) == keys
    result = dw.factorize(model, low_rank.config_list(), example_inputs=x)
    for name, ranks in result.ranks.items():
        assert ranks == low_rank.ranks()[name]
        assert result.layers[name].weight_error < 1e-12
    assert result.macs_after <= 0.5 * whole
    assert result.macs_after == dw.measure.count_macs(model, (x,))
    torch.testing.assert_close(model.eval()(x), simulated, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert float(nn.functional.mse_loss(model(x), y)) < 0.5 * float(y.square().mean())


def test_the_penalty_is_the_distance_of_the_expected_cost() -> None:
    torch.manual_seed(0)
    model = perceptron().double()
    x, _ = data(4)
    low_rank = LowRankTraining(
        model, [{"op_names": ["2"]}], example_inputs=x, training_steps=10, target={"params": 0.7}, width=0.1
    )
    low_rank.attach()
    low_rank.steps = 9  # the schedule is at its end
    gate = low_rank.simulators["2"].gates[0]
    with torch.no_grad():
        gate.copy_(torch.linspace(-3, 3, 24))
    total = sum(own.numel() for own in model.parameters() if own is not gate)
    rest = total - 24 * 24
    expected = float(open_probability(gate.detach()).sum()) * 48
    by_hand = ((expected - (0.7 * total - rest)) / (24 * 24 * 0.1)) ** 2
    penalty = low_rank.loss()
    assert isinstance(penalty, torch.Tensor)
    assert float(penalty.detach()) == pytest.approx(by_hand, rel=1e-6)
    penalty.backward()
    assert gate.grad is not None
    assert bool((gate.grad != 0).all())


def test_convolutions_learn_both_ranks() -> None:
    model, x = network().train(), torch.randn(4, 3, 12, 12)
    low_rank = LowRankTraining(
        model, [{"op_names": ["conv2"], "rank": [9, 5]}, {"op_names": ["head"], "rank": 6}],
        example_inputs=x, training_steps=3,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with dw.compress(model, [low_rank]) as run:
        run.add_parameters_to(optimizer)
        for _ in range(3):
            (model(x).square().mean() + run.loss()).backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
    assert low_rank.ranks() == {"conv2": (9, 5), "head": (6,)}
    expected = model.eval()(x)
    result = dw.factorize(model, low_rank.config_list(), example_inputs=x)
    assert result.ranks == low_rank.ranks()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_with_a_pruner_whose_masks_are_realized_first() -> None:
    torch.manual_seed(0)
    model = perceptron().double()
    x, _ = data()
    pruner = dw.pruning.L1NormPruner(
        model, [{"op_names": ["0", "2"], "sparse_ratio": 0.25}], example_inputs=(x,)
    )
    low_rank = LowRankTraining(model, [{"op_names": ["2"], "rank": 5}], example_inputs=x, training_steps=5)
    _, simulated = train(model, [pruner, low_rank], 8)
    small = dw.realize(model, (x,)).model
    assert small[2].weight.shape == (18, 18)
    result = dw.factorize(small, low_rank.config_list(), example_inputs=x)
    assert result.layers["2"].weight_error < 1e-10
    torch.testing.assert_close(small.eval()(x), simulated, rtol=1e-9, atol=1e-10)


def test_a_resumed_run_is_the_uninterrupted_one() -> None:
    def start() -> tuple[nn.Module, LowRankTraining, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = perceptron().double()
        own = LowRankTraining(model, example_inputs=data()[0], training_steps=6, target={"macs": 0.6}, seed=5)
        return model, own, torch.optim.SGD(model.parameters(), lr=1e-2)

    def go(model: nn.Module, run: Any, optimizer: Any, steps: int) -> None:
        x, y = data()
        for _ in range(steps):
            (nn.functional.mse_loss(model(x), y) + run.loss()).backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()

    model, own, optimizer = start()
    with dw.compress(model, [own]) as run:
        run.add_parameters_to(optimizer)
        go(model, run, optimizer, 4)
        saved = copy.deepcopy((model.state_dict(), run.state_dict(), optimizer.state_dict()))
        go(model, run, optimizer, 5)
    again, other, optimizer = start()
    with dw.compress(again, [other]) as run:
        run.add_parameters_to(optimizer)
        run.load_state_dict(saved[1])
        again.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[2])
        go(again, run, optimizer, 5)
    assert own.ranks() == other.ranks()
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_an_exception_takes_everything_back_and_mistakes_are_named() -> None:
    torch.manual_seed(0)
    model = perceptron().double()
    x, _ = data(4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    low_rank = LowRankTraining(model, example_inputs=x, training_steps=4, target={"macs": 0.5})

    def interrupted() -> None:
        with dw.compress(model, [low_rank]):
            assert simulate.simulator_of(model, Target("2", "weight"), "low_rank") is not None
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not simulate.simulated_targets(model)
    with pytest.raises(DwindleError, match="stand after 4 steps"):
        low_rank.ranks()
    for options, message in (
        ({"target": {"macs": 0.001}}, "cannot be reached"),
        ({}, "no rank"),
        ({"target": {"macs": 0.5}, "training_steps": 0}, "training_steps"),
    ):
        with pytest.raises(ConfigError, match=message):
            LowRankTraining(model, example_inputs=x, **{"training_steps": 4, **options})
    with pytest.warns(UserWarning, match="not final"), dw.compress(model, [low_rank]):
        pass


def test_gates_that_nobody_trains_are_noticed() -> None:
    model, (x, y) = perceptron().double(), data(4)
    low_rank = LowRankTraining(model, example_inputs=x, training_steps=1, target={"macs": 0.5})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run_without() -> None:
        with dw.compress(model, [low_rank]) as run:
            (nn.functional.mse_loss(model(x), y) + run.loss()).backward()
            optimizer.step()
            run.step()

    with pytest.raises(DwindleError, match="no optimizer trains them"):
        run_without()
