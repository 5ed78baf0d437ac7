"""Opaque leaf modules: a registered class is one node of the recording, pruned by its rule, proven like the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dwindle as dw
from dwindle.config.errors import RealizeError
from dwindle.graph import analyse
from dwindle.graph.opaque import opaque_modules
from dwindle.graph.rules import registry


class Kernel(nn.Module):
    """Arithmetic by numpy, which no recording can follow: (x + shift) @ weight.T, doubled where the sum is positive."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.rand(out, channels) - 0.5)
        self.shift = nn.Parameter(torch.rand(channels))
        self.register_buffer("scale", torch.rand(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[1] == self.channels
        signs = np.sign(x.detach().numpy().sum(1, keepdims=True))
        gain = torch.from_numpy(np.where(signs > 0, 2.0, 1.0)).to(x.dtype)
        return ((x * self.scale + self.shift) @ self.weight.T) * gain


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.kernel, self.head = nn.Linear(6, 16), Kernel(16, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.kernel(self.first(x).relu()).tanh())


def kernel_rule(node: Any, scope: Any) -> None:
    (data,) = node.data
    weight = node.parameters["weight"]
    for name in ("shift", "scale"):
        scope.unify(node.parameters[name].axes[0], weight.axes[1])
    scope.unify(data.axes[1], weight.axes[1])
    scope.number("channels", [data.axes[1]])
    node.output.axes = [data.axes[0], weight.axes[0]]


@pytest.fixture(autouse=True)
def _rules() -> Iterator[None]:
    before = dict(registry._MODULE_RULES)
    yield
    registry._MODULE_RULES.clear()
    registry._MODULE_RULES.update(before)


def test_without_a_rule_the_model_still_runs_and_is_proven() -> None:
    result = dw.prune(Around(), torch.randn(2, 6), ratio=0.5)
    assert result.verification.proven


def test_one_node_with_its_parameters() -> None:
    dw.register_axis_rule(Kernel)(kernel_rule)
    model = Around()
    analysis = analyse(model, (torch.randn(2, 6),))
    names = [node.name for node in analysis.trace.nodes]
    assert names.count("Kernel") == 1
    node = next(node for node in analysis.trace.nodes if node.name == "Kernel")
    assert node.module == "kernel"
    assert list(node.parameters) == ["weight", "shift", "scale"]
    assert [value.shape for value in node.data] == [(2, 16)]
    assert "mul" not in names
    assert "forward" not in vars(model.kernel)


def test_pruned_in_place_with_its_numbers() -> None:
    dw.register_axis_rule(Kernel)(kernel_rule)
    model = Around()
    result = dw.prune(model, torch.randn(2, 6), ratio=0.5)
    assert result.verification.proven
    assert model.kernel.weight.shape == (6, 8)
    assert model.kernel.shift.shape == model.kernel.scale.shape == (8,)
    assert model.kernel.channels == 8
    for mode in (True, False):
        model.train(mode)
        model(torch.randn(5, 6)).square().mean().backward()
        assert model.kernel.weight.grad.shape == (6, 8)


def test_a_subclass_has_the_rule_too() -> None:
    class Special(Kernel):
        pass

    dw.register_axis_rule(Kernel)(kernel_rule)
    model = Around()
    model.kernel = Special(16, 12)
    assert dw.prune(model, torch.randn(2, 6), ratio=0.5).model.kernel.channels == 8


def test_the_outermost_opaque_module_is_the_leaf() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Kernel(4, 4)

    model = nn.Sequential(Pair(), Kernel(4, 4))
    assert list(opaque_modules(model, (Pair, Kernel))) == ["0", "1"]


def test_a_rule_that_forgets_a_number_is_refuted_and_the_model_untouched() -> None:
    def forgetful(node: Any, scope: Any) -> None:
        (data,) = node.data
        weight = node.parameters["weight"]
        for name in ("shift", "scale"):
            scope.unify(node.parameters[name].axes[0], weight.axes[1])
        scope.unify(data.axes[1], weight.axes[1])
        node.output.axes = [data.axes[0], weight.axes[0]]

    dw.register_axis_rule(Kernel)(forgetful)
    model = Around()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(RealizeError):
        dw.prune(model, torch.randn(2, 6), ratio=0.5)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_wrong_rule_is_refuted() -> None:
    """Rows of the weight coupled with its columns."""

    def wrong(node: Any, scope: Any) -> None:
        kernel_rule(node, scope)
        scope.unify(node.parameters["weight"].axes[0], node.parameters["weight"].axes[1])

    dw.register_axis_rule(Kernel)(wrong)
    model = Around()
    model.kernel = Kernel(16, 16)
    model.head = nn.Linear(16, 3)
    result = dw.prune(model, torch.randn(2, 6), ratio=0.5)  # too strict, so still right
    assert result.verification.proven
    dw.register_axis_rule(Kernel)(lambda node, scope: _loose(node))
    with pytest.raises(RealizeError):
        dw.prune(Around(), torch.randn(2, 6), ratio=0.5)


def _loose(node: Any) -> None:
    """The input has nothing to do with the weight, it says."""
    weight = node.parameters["weight"]
    node.output.axes = [node.data[0].axes[0], weight.axes[0]]


@pytest.mark.parametrize("rewrite", [False, True])
def test_zeros_are_realized(rewrite: bool) -> None:
    dw.register_axis_rule(Kernel)(kernel_rule)
    model = Around()
    with torch.no_grad():
        model.first.weight[5] = model.first.bias[5] = 0
        model.kernel.weight[:, 5] = model.kernel.shift[5] = model.kernel.scale[5] = 0
        model.first.weight[7] = model.first.bias[7] = 0  # but the shift still shows
        model.head.weight[:, 2] = 0
    dense = model(x := torch.randn(3, 6))
    result = dw.realize(model, torch.randn(2, 6), rewrite=rewrite)
    assert result.plan.keep["kernel.weight"][1].numel() == 15
    assert result.plan.keep["kernel.weight"][0].numel() == 11
    assert torch.allclose(result.model(x), dense, atol=1e-6)
    result.model.train()(x).sum().backward()
