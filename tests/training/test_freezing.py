"""Modules that stand still for a time, bit for bit, and move again afterwards."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from dwindle import pruning
from dwindle.config.errors import ConfigError
from dwindle.training import Freezing, Staged, compress, fit, frozen


def net() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
    return nn.Sequential(body, nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


BODY = [{"op_names": ["0"]}]


def batches(count: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 4, generator=generator), torch.randint(0, 3, (8,), generator=generator))
        for _ in range(count)
    ]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, run: Any, steps: range) -> list[dict[str, Any]]:
    states = []
    for step in steps:
        x, y = batches()[step]
        model.train()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # momentum would go on with gradients of zero
        run.step()
        states.append(copy.deepcopy(model.state_dict()))
    return states


def moved(states: list[dict[str, Any]], key: str) -> list[bool]:
    return [not torch.equal(one[key], two[key]) for one, two in itertools.pairwise(states)]


@pytest.mark.parametrize("statistics", [True, False])
def test_stages(statistics: bool) -> None:
    model = net()
    model[0][0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    freezing = Freezing(model, BODY, statistics=statistics)
    assert freezing.op_names == ["0", "0.0", "0.1", "0.2"]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    start = copy.deepcopy(model.state_dict())
    with compress(model, [Staged(freezing, start=2, stop=4)]) as run:
        states = [start, *train(model, optimizer, run, range(6))]
        assert not freezing.is_frozen
    assert moved(states, "0.0.weight") == [True, True, False, False, True, True]
    assert moved(states, "0.0.bias") == [False] * 6
    assert moved(states, "0.1.weight") == [True, True, False, False, True, True]
    assert moved(states, "0.1.running_mean") == [True, True, not statistics, not statistics, True, True]
    assert moved(states, "1.weight") == moved(states, "2.running_mean") == [True] * 6
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_frozen_norm_answers_as_in_evaluation() -> None:
    model = net()
    x = batches()[0][0]
    model.train()
    with frozen(model, [{"op_types": ["BatchNorm1d"]}]) as names:
        assert names == ["0.1", "2"]
        inside = model(x)
        assert all(module.training for module in model.modules())
    assert torch.equal(inside, net().eval()(x))
    assert not torch.equal(model(x), inside)


def test_a_state_goes_on_in_the_middle_of_a_stage() -> None:
    def run_of(model: nn.Module, state: Any, steps: range) -> tuple[list[dict[str, Any]], Any, Any]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with compress(model, [Staged(Freezing(model, BODY), start=1, stop=4)]) as run:
            if state is not None:
                run.load_state_dict(state[0])
                model.load_state_dict(state[1])
                optimizer.load_state_dict(state[2])
            states = train(model, optimizer, run, steps)
            return states, run.state_dict(), copy.deepcopy(optimizer.state_dict())

    whole, _, _ = run_of(net(), None, range(6))
    for moment in range(1, 6):
        first, state, of_optimizer = run_of(net(), None, range(moment))
        rest, _, _ = run_of(net(), (state, first[-1], of_optimizer), range(moment, 6))
        assert all(torch.equal(value, rest[-1][key]) for key, value in whole[-1].items()), moment


def test_with_a_pruner_in_the_loop_of_the_house() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    pruner = pruning.LevelPruner(model, [{"op_names": ["1"], "sparse_ratio": 0.5}])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    fit(model, batches(), optimizer, epochs=2, compressors=[pruner, Freezing(model, BODY)])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key[0] == "0")
    assert not torch.equal(model[3].weight, before["3.weight"])
    assert int((model[1].weight == 0).sum()) == 15
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_selected() -> None:
    model = net()
    assert Freezing(model, [{"op_names_re": ["0.*"], "exclude_op_names": ["0.1"]}]).op_names == [
        "0",
        "0.0",
        "0.2",
    ]
    with frozen(model, [{"op_names": ["0"], "exclude_op_types": ["Linear"]}]):
        assert [parameter.requires_grad for parameter in model[0].parameters()] == [True, True, False, False]
    with pytest.raises(ConfigError, match="did you mean 'op_names'"):
        Freezing(model, [{"op_name": ["0"]}])
    with pytest.raises(ConfigError, match="'sparse_ratio' is not known for freezing"):
        Freezing(model, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    with pytest.raises(ConfigError, match="'7'"):
        Freezing(model, [{"op_names": ["7"]}])
    with pytest.raises(ConfigError, match="needs 'frozen'"):
        Freezing(model, BODY).load_state_dict({})
    with pytest.raises(ZeroDivisionError), frozen(model, BODY):
        raise ZeroDivisionError
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert Freezing(model, BODY).status() == {"frozen parameters": 0.0}
