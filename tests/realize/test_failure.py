"""An operation succeeds, or raises and leaves the model exactly as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import dwindle as dw
from dwindle.config.errors import CaptureError, RealizeError
from dwindle.config.history import history, record
from dwindle.graph.rules import registry
from dwindle.realize import shrink as shrinking
from dwindle.realize.plan import AttributeChange, Plan


class Attention(nn.Module):
    """Attention written by hand, sized by its own attributes."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_width = heads, width // heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, self.head_width).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        scores = (query @ key.transpose(-1, -2) * self.head_width**-0.5).softmax(-1)
        return self.out((scores @ value).transpose(1, 2).reshape(batch, length, -1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(6, 32), Attention()
        self.norm, self.head = nn.BatchNorm1d(5), nn.Linear(32, 3)
        self.note = {"kept": [1, 2]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.attention(self.embed(x))))


def inputs(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 5, 6)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that an aborted operation must leave: identities, bits, attributes, hooks, history."""
    own: dict[str, Any] = {"history": copy.deepcopy(history(model))}
    for path, module in model.named_modules():
        for key, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None:
                grad = None if tensor.grad is None else tensor.grad.clone()
                own[f"{path}.{key}"] = (id(tensor), tensor.detach().clone(), tensor.requires_grad, grad)
        own[f"{path} attributes"] = {
            key: (type(held), copy.deepcopy(held))
            for key, held in vars(module).items()
            if not key.startswith("_") and not isinstance(held, nn.Module)
        }
        own[f"{path} hooks"] = (
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._backward_hooks),
        )
    return own


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return isinstance(b, torch.Tensor) and torch.equal(a, b)
        if isinstance(a, tuple):
            return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
        return bool(a == b)

    return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)


@pytest.fixture
def net() -> Net:
    model = Net()
    record(model, {"kind": "trained", "epochs": 3})
    model(inputs()).sum().backward()
    return model.eval()


@pytest.fixture
def rules() -> Iterator[dict[str, Any]]:
    """User rules that are forgotten again."""
    before = dict(registry._USER_RULES)
    yield registry._USER_RULES
    registry._USER_RULES.clear()
    registry._USER_RULES.update(before)


def wrong_plan(change: Callable[[Plan], None], monkeypatch: pytest.MonkeyPatch) -> None:
    original = shrinking.make_plan

    def make(*args: Any, **kwargs: Any) -> Plan:
        plan = original(*args, **kwargs)
        change(plan)
        return plan

    monkeypatch.setattr(shrinking, "make_plan", make)


def refused(model: nn.Module, x: torch.Tensor, error: type[Exception] = RealizeError, **options: Any) -> str:
    """Prune with an optimizer, expect the error, and check that nothing at all has changed."""
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step()
    parameters = list(model.parameters())
    moments = {p: {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items()}
    before, random_state, answer = snapshot(model), torch.get_rng_state(), model(x)
    with pytest.raises(error) as caught:
        dw.prune(model, x, ratio=0.5, optimizer=optimizer, **options)
    assert same(before, snapshot(model))
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(a is b for a, b in zip(parameters, optimizer.param_groups[0]["params"], strict=True))
    assert optimizer.state.keys() == moments.keys()
    for parameter, state in moments.items():
        assert all(torch.equal(optimizer.state[parameter][key], held) for key, held in state.items())
    assert torch.equal(answer, model(x))
    return str(caught.value)


def test_the_same_model_succeeds_when_nothing_is_wrong(net: Net) -> None:
    result = dw.prune(net, inputs(), ratio=0.5)
    assert net.attention.num_heads == 2
    assert net.attention.head_width == 8
    assert result.parameters_after < 0.5 * result.parameters_before
    assert [entry["kind"] for entry in history(net)] == ["trained", "shrink"]


def test_wrong_number_of_heads_is_caught(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything runs with 4 heads of half the width, it is only wrong: the proof sees it."""

    def change(plan: Plan) -> None:
        owners = [entry for entry in plan.attributes if entry.key in ("num_heads", "head_width")]
        assert [(entry.key, entry.new) for entry in owners] == [("num_heads", 2)]
        plan.attributes = [
            AttributeChange("attention", "num_heads", None, 4, 4),
            AttributeChange("attention", "head_width", None, 8, 4),
        ]

    wrong_plan(change, monkeypatch)
    assert "not equal to the masked one" in refused(net, inputs())


def test_a_scale_that_moves_with_the_width_is_caught(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(plan: Plan) -> None:
        plan.attributes += [AttributeChange("attention", "head_width", None, 8, 16)]
        for entry in plan.attributes:
            if entry.key == "num_heads":
                entry.new = 1

    wrong_plan(change, monkeypatch)
    assert "not equal to the masked one" in refused(net, inputs())


def test_attributes_left_as_they_were_are_caught(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_plan(lambda plan: plan.attributes.clear(), monkeypatch)
    assert "does not run" in refused(net, inputs())


def test_other_indices_of_one_parameter_are_caught(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(plan: Plan) -> None:
        index = plan.keep["head.weight"][1]
        others = sorted(set(range(32)) - set(index.tolist()))
        plan.keep["head.weight"][1] = torch.tensor(others[: len(index)])

    wrong_plan(change, monkeypatch)
    assert "not equal to the masked one" in refused(net, inputs())


def test_a_bias_that_is_not_cut_is_caught(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_plan(lambda plan: plan.keep.pop("embed.bias") and None, monkeypatch)
    assert "does not run" in refused(net, inputs())


def test_a_plan_for_another_model_is_refused(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_plan(lambda plan: plan.keep.update({"nothing.weight": {0: torch.arange(2)}}), monkeypatch)
    assert "nothing.weight" in refused(net, inputs(), verify=False)


def test_a_wrong_rule_is_caught(rules: dict[str, Any]) -> None:
    """A rule that calls a flip element-wise couples index i with i, which is not true."""

    class Flipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.flip(torch.relu(self.first(x)), [-1]))

    @dw.register_axis_rule("flip")
    def flip(node: Any, scope: Any) -> None:
        node.output.axes = list(next(node.inputs()).axes)

    model = Flipped()
    with torch.no_grad():  # an unambiguous choice that is not a palindrome
        model.first.weight.mul_(torch.arange(1.0, 9)[:, None])
    model(torch.randn(2, 4)).sum().backward()
    assert "not equal to the masked one" in refused(model, torch.randn(2, 4))


def test_a_failure_in_the_middle_of_the_cut_is_undone(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the proof the cut is the first to meet the wrong plan; it takes back what it had done."""
    wrong_plan(
        lambda plan: plan.attributes.append(AttributeChange("attention", "missing", None, 1, 2)), monkeypatch
    )
    refused(net, inputs(), Exception, verify=False)


def test_indices_out_of_range_are_refused_before_anything_is_cut(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_plan(lambda plan: plan.keep.update({"head.bias": {0: torch.tensor([0, 9])}}), monkeypatch)
    message = refused(net, inputs(), verify=False)
    assert "'head.bias'" in message
    assert "index 9" in message


def test_realize_leaves_the_model_too(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(plan: Plan) -> None:
        index = plan.keep["attention.qkv.weight"][1]
        others = sorted(set(range(32)) - set(index.tolist()))
        plan.keep["attention.qkv.weight"][1] = torch.tensor(others[: len(index)])

    wrong_plan(change, monkeypatch)
    keep = torch.ones(32)
    keep[16:] = 0
    masks = {"embed": {"weight": keep[:, None].expand(32, 6).clone(), "bias": keep}}
    before = snapshot(net)
    with pytest.raises(RealizeError, match="not equal"):
        dw.realize(net, inputs(), masks=masks)
    assert same(before, snapshot(net))


def test_inputs_that_do_not_fit_leave_the_model(net: Net) -> None:
    assert "Net could not be run" in refused_inputs(net)


def refused_inputs(net: Net) -> str:
    before = snapshot(net)
    with pytest.raises(CaptureError) as caught:
        dw.prune(net, torch.randn(2, 5, 7), ratio=0.5)
    assert same(before, snapshot(net))
    return str(caught.value)


def test_a_plan_that_does_not_fit_a_fresh_model_changes_nothing(net: Net) -> None:
    plan = dw.prune(net, inputs(), ratio=0.5).plan.to_json()
    other = nn.Sequential(nn.Linear(4, 4))
    before = snapshot(other)
    with pytest.raises(RealizeError, match="does not have"):
        dw.apply_plan(other, plan)
    assert same(before, snapshot(other))
    narrow = Net()
    narrow.embed = nn.Linear(6, 8)
    before = snapshot(narrow)
    with pytest.raises(RealizeError, match="made for another model"):
        dw.apply_plan(narrow, plan)
    assert same(before, snapshot(narrow))
