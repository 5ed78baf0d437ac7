"""Slimming against the paper: subgradient of the penalty, global ranking of scales, gates that are folded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dwindle as dw
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.pruning import SlimPruner
from dwindle.training import compress
from pruning.models import Residual, lively
from pruning.training_runs import check_resume, classes, network, train, zeros


def test_scales_of_norms_step_by_step() -> None:
    """SGD with ``scale * sign(gamma)`` added to the gradient, in float64, is what a run with the penalty does."""
    model, twin = network().double(), network().double()
    with torch.no_grad():
        for own in (model, twin):
            own[1].weight.copy_(torch.linspace(-0.5, 1.5, 16))
            own[1].weight[3] = 0  # the subgradient at 0 is 0
    x, y = classes()
    pruner = SlimPruner(
        model, [{"op_types": ["BatchNorm1d"], "sparse_ratio": 0.4}], training_steps=7, regular_scale=0.03
    )
    updater = torch.optim.SGD(twin.parameters(), lr=0.1)
    for step in range(7):
        updater.zero_grad()
        functional.cross_entropy(twin(x.double()), y).backward()
        gamma = twin[1].weight
        assert gamma.grad is not None
        gamma.grad += 0.03 * torch.from_numpy(np.sign(gamma.detach().numpy()))
        updater.step()
        assert step < 7
    expected = twin[1].weight.detach()
    order = np.argsort(expected.abs().numpy(), kind="stable")[: int(16 * 0.4)]
    train(model, pruner, 7, batch=(x.double(), y))
    gone = np.flatnonzero(pruner_mask(model, order.size) == 0)
    assert sorted(gone) == sorted(order)
    kept = np.setdiff1d(np.arange(16), order)
    torch.testing.assert_close(model[1].weight[kept], expected[kept], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[0].weight, twin[0].weight, rtol=1e-12, atol=1e-12)


def pruner_mask(model: nn.Module, count: int) -> np.ndarray:
    weight = model[1].weight.detach().numpy()
    assert int((weight == 0).sum()) == count
    return (weight != 0).astype(int)


def test_the_paper_ranks_all_scales_together_and_channels_are_realized() -> None:
    model = lively(
        nn.Sequential(
            *(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 8)),
        )
    )
    with torch.no_grad():
        model[1].weight.mul_(1.5)
    x = torch.randn(8, 1, 8, 8)
    config = [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5, "global_group_id": 1}]
    pruner = SlimPruner(model, config, (x,), training_steps=3, regular_scale=1e-3)
    ranked: list[Tensor] = []

    def watch(step: int) -> None:
        if step == 3:
            scales = torch.cat([scale.detach().abs() for _, scale in pruner.scales()])
            ranked.append(scales.argsort(stable=True)[:20].sort().values)

    train(model, pruner, 5, batch=(x, torch.arange(8)), rate=0.01, watch=watch)
    gone = torch.cat([model[1].weight, model[4].weight]) == 0
    assert torch.equal(gone.nonzero()[:, 0], ranked[0])
    first = int(gone[:16].sum())
    assert 0 < first < 8  # its scales are larger, so fewer of them go
    assert torch.equal(model[0].weight.abs().sum((1, 2, 3)) == 0, gone[:16])
    result = dw.realize(model, (x,))
    assert result.verification.max_difference < 1e-9
    assert result.model[1].num_features == 16 - first
    assert result.model[4].num_features == 24 - (20 - first)


def test_gates_have_the_gradient_of_a_factor_and_of_the_penalty() -> None:
    model = network().double()
    x, y = classes()
    pruner = SlimPruner(
        model, [{"op_names": ["3"], "sparse_ratio": 0.5}], training_steps=5, regular_scale=0.2
    )

    def loss(factor: Tensor) -> Tensor:
        weight = model[3]._parameters["weight"]
        assert weight is not None
        parameters = {**dict(plain), "3.weight": weight.detach() * factor[:, None]}
        return functional.cross_entropy(torch.func.functional_call(twin, parameters, (x.double(),)), y)

    twin = network().double()
    plain = dict(twin.named_parameters())
    with compress(model, [pruner]) as run:
        gate = next(iter(pruner.parameters()))
        assert gate.shape == (16,)
        with torch.no_grad():
            gate.copy_(torch.linspace(-1.0, 2.0, 16))
        factor = gate.detach().double()
        (functional.cross_entropy(model(x.double()), y) + run.loss()).backward()
        expected = torch.zeros(16, dtype=torch.float64)
        for index in range(16):
            moved = torch.zeros(16, dtype=torch.float64)
            moved[index] = 1e-5
            expected[index] = (loss(factor + moved) - loss(factor - moved)) / 2e-5
        expected += 0.2 * factor.sign()
        assert gate.grad is not None
        torch.testing.assert_close(gate.grad.double(), expected, rtol=1e-5, atol=1e-6)
        pruner.finish()


def test_gates_are_folded() -> None:
    model = network()
    x, y = classes()
    pruner = SlimPruner(
        model,
        [{"op_names": ["0", "3"], "sparse_ratio": 0.5}],
        (x,),
        training_steps=20,
        regular_scale=0.01,
        learning_rate=0.05,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with compress(model, [pruner]) as run:
        assert run.add_parameters_to(optimizer) == 2
        for _ in range(25):
            optimizer.zero_grad()
            (functional.cross_entropy(model(x), y) + run.loss()).backward()
            optimizer.step()
            run.step()
        model.eval()
        inside = model(x)
        factors = [gate.detach().clone() for gate in pruner.parameters()]
        parameter = model[3]._parameters["weight"]
        assert parameter is not None
        raw = parameter.detach().clone()
        mask = pruner.masks["3"]["weight"]
    assert not torch.equal(factors[1], torch.ones(16))
    torch.testing.assert_close(model(x), inside)
    torch.testing.assert_close(model[3].weight, raw * factors[1][:, None] * mask)
    assert type(model[3]) is nn.Linear
    assert zeros(model, "3.weight") == 8 * 16
    result = run.realize(example_inputs=(x,))
    assert result.verification.max_difference < 1e-9
    assert result.model[3].out_features == 8
    with pytest.raises(ConfigError, match="called before"):
        pruner.compress()


def test_gates_are_realized_inside_the_run() -> None:
    model = lively(Residual())
    x = torch.randn(8, 3, 6, 6)
    pruner = SlimPruner(
        model,
        [{"op_names": ["expand", "project"], "sparse_ratio": 0.5}],
        (x,),
        training_steps=4,
        learning_rate=0.1,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with compress(model, [pruner]) as run:
        run.add_parameters_to(optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            (functional.cross_entropy(model(x), torch.arange(8) % 5) + run.loss()).backward()
            optimizer.step()
            run.step()
        model.eval()
        before = model(x).detach()
        result = run.realize(example_inputs=(x,))
        assert result.verification.max_difference < 1e-9
        assert result.model.expand.out_channels == 8
        torch.testing.assert_close(result.model(x), before, rtol=1e-4, atol=1e-5)


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    def make(model: nn.Module) -> SlimPruner:
        config = [{"op_names": ["1", "3"], "sparse_ratio": 0.5}]
        return SlimPruner(model, config, training_steps=14, regular_scale=0.01, learning_rate=0.1)

    check_resume(make, tmp_path / "state")


def test_gates_of_an_unfinished_run_cannot_go_on() -> None:
    model = network()
    pruner = SlimPruner(model, [{"op_names": ["3"], "sparse_ratio": 0.5}], training_steps=20)
    with pytest.warns(UserWarning, match="3 of 20"):
        train(model, pruner, 3)
    with pytest.raises(ConfigError, match="folded"), compress(model, [pruner]):
        pass


def test_errors() -> None:
    model = network()
    config = [{"op_names": ["3"], "sparse_ratio": 0.5}]
    with pytest.raises(ConfigError, match="regular_scale"):
        SlimPruner(model, config, training_steps=2, regular_scale=-1)
    with torch.no_grad():
        model[1].weight[0] = torch.nan
    pruner = SlimPruner(model, [{"op_names": ["1"], "sparse_ratio": 0.5}], training_steps=1)
    with pytest.raises(DwindleError, match="NaN"), compress(model, [pruner]):
        pruner.step()
