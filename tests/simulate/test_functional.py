"""Simulators on operations that are no modules."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.simulate import (
    MaskSimulator,
    OperationTarget,
    detach,
    disabled,
    operations,
    register_operation_simulator,
)


class Double(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return tensor * 2


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        y = y + x
        y += self.second(y.clone())
        return torch.softmax(y @ y.T, dim=-1)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = Branch()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + 1)


def test_operations_are_counted_for_their_own_module_only() -> None:
    model, x = Outer(), torch.randn(3, 4)
    counts = operations(model, "branch", x)
    assert {name: counts[name] for name in ("relu", "add", "matmul", "softmax")} == {
        "relu": 1,
        "add": 2,
        "matmul": 1,
        "softmax": 1,
    }
    assert operations(model, "", x) == {"add": 1, "relu": 1}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ConfigError, match="did you mean 'branch'"):
        operations(model, "brunch", x)


def test_the_named_call_is_simulated_and_no_other() -> None:
    model, x = Outer(), torch.randn(3, 4)
    branch = model.branch
    register_operation_simulator(model, OperationTarget("branch", "add", 1), Double(), "quantize")
    y = F.relu(branch.first(x)) + x
    y = (y + branch.second(y)) * 2
    expected = F.relu(torch.softmax(y @ y.T, dim=-1) + 1)
    assert torch.equal(model(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)


def test_an_input_of_a_softmax_gets_an_additive_mask() -> None:
    model, x = Outer(), torch.randn(3, 4)
    mask = torch.tensor([1.0, 0, 1])
    target = OperationTarget("branch", "softmax", 0, input=0)
    register_operation_simulator(model, target, MaskSimulator(mask, "add"))
    assert torch.equal(model.branch(x)[:, 1], torch.zeros(3))
    torch.testing.assert_close(model.branch(x).sum(1), torch.ones(3))


def test_disabled_and_detach_give_the_plain_model_back() -> None:
    model, x = Outer(), torch.randn(3, 4)
    plain, classes = model(x), [type(m) for m in model.modules()]
    register_operation_simulator(model, OperationTarget("branch", "relu"), Double())
    register_operation_simulator(model, OperationTarget("", "relu"), Double())
    assert not torch.equal(model(x), plain)
    with disabled(model):
        assert torch.equal(model(x), plain)
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 5))  # a failing call leaves no mode behind
    assert torch.equal(model(x), 2 * F.relu(model.branch(x) + 1))
    detach(model)
    assert torch.equal(model(x), plain)
    assert [type(m) for m in model.modules()] == classes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(m._forward_hooks_always_called for m in model.modules())


def test_gradients_flow_and_state_is_under_the_reserved_name() -> None:
    model, x = Outer(), torch.randn(3, 4, requires_grad=True)
    mask = torch.tensor([0.0, 1, 1, 1])
    register_operation_simulator(model, OperationTarget("branch", "relu"), MaskSimulator(mask))
    model(x).sum().backward()
    weight = model.branch.first.weight
    assert weight.grad is not None
    assert torch.equal(weight.grad[0], torch.zeros(4))
    assert any("_dwindle" in key for key in model.state_dict())
    assert [key for key in model.state_dict() if "_dwindle" not in key] == list(Outer().state_dict())
