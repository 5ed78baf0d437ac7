"""Attaching and detaching: exact inverses, and what the user's own tools see meanwhile."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from dwindle.config import Target
from dwindle.config.errors import ConfigError
from dwindle.simulate import (
    RESERVED,
    attach_mask,
    detach,
    disabled,
    get_masks,
    masks_as_nested,
    plain_state_dict,
    register_simulator,
    set_mask,
)


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))


def half(*shape: int) -> torch.Tensor:
    return (torch.arange(torch.Size(shape).numel()) % 2).float().reshape(shape)


class Halve(nn.Module):
    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor / 2 + 1


def test_parameter_keeps_identity_name_and_place() -> None:
    model = small()
    before = list(model.named_parameters())
    attach_mask(model, Target("0", "weight"), half(4, 1, 1, 1))
    after = list(model.named_parameters())
    assert [name for name, _ in before] == [name for name, _ in after]
    assert all(old is new for (_, old), (_, new) in zip(before, after, strict=True))
    assert model[0].weight is not dict(after)["0.weight"]
    assert torch.equal(model[0].weight, dict(after)["0.weight"] * half(4, 1, 1, 1))


def test_detach_is_the_exact_inverse() -> None:
    model = small()
    user_hooks = []
    model[4].register_forward_pre_hook(lambda module, args: user_hooks.append(1))
    classes = [type(module) for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    for target in (Target("0", "weight"), Target("4", "bias")):
        attach_mask(model, target)
    attach_mask(model, Target("4", "_input_0"), half(16))
    attach_mask(model, Target("4", "_output_0"), half(5))
    attach_mask(model, Target("", "_output_0"), half(5))
    assert [type(module) for module in model.modules()] != classes
    detach(model)
    assert [type(module) for module in model.modules()] == classes
    assert [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks_with_kwargs for m in model.modules())


@pytest.mark.parametrize("keep", [True, False])
def test_detach_leaves_masked_or_dense_values(keep: bool) -> None:
    model = small()
    dense = model[0].weight.clone()
    mask = half(4, 3, 3, 3)
    attach_mask(model, Target("0", "weight"), mask)
    detach(model, keep_values=keep)
    assert torch.equal(model[0].weight, dense * mask if keep else dense)


def test_state_dict_round_trips_and_fits_the_plain_model() -> None:
    model, other, plain = small(), small(), small()
    target = Target("0", "weight")
    attach_mask(model, target, half(4, 3, 3, 3))
    attach_mask(other, target)
    state = model.state_dict()
    own = [key for key in state if RESERVED not in key.split(".")]
    assert own == list(plain.state_dict())
    assert set(state) - set(own) == {f"0.{RESERVED}.weight.mask.value"}
    other.load_state_dict(state, strict=True)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(model.eval()(x), other.eval()(x))
    assert torch.equal(get_masks(other)[target], half(4, 3, 3, 3))
    plain.load_state_dict(plain_state_dict(model), strict=True)
    assert torch.equal(plain.eval()(x), model(x))
    dense = plain_state_dict(model, keep_values=False)
    assert torch.equal(dense["0.weight"], state["0.weight"])
    assert not torch.equal(dense["0.weight"], plain[0].weight)


def test_a_plain_checkpoint_loads_strictly_and_keeps_the_mask() -> None:
    model, plain = small(), small()
    attach_mask(model, Target("0", "weight"), half(4, 1, 1, 1))
    attach_mask(model, Target("4", "weight"), half(5, 16))
    result = model.load_state_dict(plain.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(model[0].weight, plain[0].weight * half(4, 1, 1, 1))
    broken = model.state_dict()
    del broken["0.weight"]
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        model.load_state_dict(broken, strict=True)


def test_optimizer_made_before_or_after_trains_the_same() -> None:
    x, y = torch.randn(8, 3, 4, 4), torch.randn(8, 5)
    results = []
    for early in (True, False):
        torch.manual_seed(1)
        model = small()
        if early:
            optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        attach_mask(model, Target("0", "weight"), half(4, 1, 1, 1))
        if not early:
            optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        results.append(model.state_dict()["0.weight"].clone())
        # The gradient of a masked entry is zero, so it does not move.
        assert torch.equal(model[0].weight[0], torch.zeros(3, 3, 3))
    assert torch.equal(results[0], results[1])


def test_disabled_gives_the_original_parameter_itself() -> None:
    model = small()
    parameter = model[0].weight
    x = torch.randn(2, 3, 4, 4)
    dense = model.eval()(x)
    attach_mask(model, Target("0", "weight"), half(4, 1, 1, 1))
    attach_mask(model, Target("2", "_output_0"), half(4), axis=1)
    masked = model(x)
    with disabled(model):
        assert model[0].weight is parameter
        assert torch.equal(model(x), dense)
        with disabled(model):
            pass
        assert model[0].weight is parameter
    assert torch.equal(model(x), masked)
    assert not torch.equal(masked, dense)


def test_deepcopy_and_pickle_are_independent() -> None:
    model = small().eval()
    target = Target("0", "weight")
    attach_mask(model, target, half(4, 1, 1, 1))
    attach_mask(model, Target("2", "_output_0"), half(4), axis=1)
    attach_mask(model, Target("", "_input_0"), half(4, 4))
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        set_mask(other, target, torch.zeros(()))
        detach(other)
        assert type(other[0]) is nn.Conv2d
        assert torch.equal(other[0].weight, torch.zeros(4, 3, 3, 3))
        assert torch.equal(model(x), expected)


def test_order_of_stages_is_mask_then_quantize_whatever_came_first() -> None:
    for order in (("mask", "quantize"), ("quantize", "mask")):
        model = small()
        target = Target("4", "weight")
        for stage in order:
            if stage == "mask":
                attach_mask(model, target, half(5, 16))
            else:
                register_simulator(model, target, Halve(), "quantize")
        own = dict(model.named_parameters())["4.weight"]
        assert torch.equal(model[4].weight, own * half(5, 16) / 2 + 1)
    with pytest.raises(ConfigError, match="taken"):
        register_simulator(model, target, Halve(), "quantize")
    with pytest.raises(ConfigError, match="did you mean 'quantize'"):
        register_simulator(model, target, Halve(), "quantise")


def test_masks_follow_dtype_and_mode() -> None:
    model = small()
    attach_mask(model, Target("0", "weight"), half(4, 1, 1, 1))
    attach_mask(model, Target("", "_output_0"), half(5))
    model.double()
    assert {mask.dtype for mask in get_masks(model).values()} == {torch.float64}
    assert model(torch.randn(2, 3, 4, 4, dtype=torch.float64)).dtype == torch.float64
    assert len(model) == 5
    assert [name for name, _ in model.named_children()] == ["0", "1", "2", "3", "4"]
    model.eval()
    assert not any(module.training for module in model.modules())


def test_containers_with_simulated_outputs_still_iterate_as_before() -> None:
    holder = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    members = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model = nn.Module()
    model.holder, model.members = holder, members
    holder.forward = lambda x: x
    attach_mask(model, Target("members", "_output_0"))
    attach_mask(model, Target("holder", "_output_0"))
    assert list(holder) == ["a", "b"]
    assert [key for key, _ in holder.items()] == ["a", "b"]
    assert len(holder.values()) == len(holder) == 2
    assert len(list(members)) == len(members) == 2
    assert members[-1] is list(members)[1]
    assert len(members[1:]) == 1


def test_unknown_targets_are_named_with_the_nearest() -> None:
    model = small()
    with pytest.raises(ConfigError, match="did you mean 'weight'"):
        attach_mask(model, Target("0", "wieght"))
    with pytest.raises(ConfigError, match="no module '9'"):
        attach_mask(model, Target("9", "weight"))
    with pytest.raises(ConfigError, match=r"\[2, 2\] does not fit"):
        attach_mask(model, Target("0", "weight"), torch.ones(2, 2))
    with pytest.raises(ConfigError, match="has no mask"):
        set_mask(model, Target("0", "weight"), torch.ones(()))
    assert all(RESERVED not in module._modules for module in model.modules())
    weight_normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="parametrization"):
        attach_mask(weight_normed, Target("", "weight"))


def test_nested_form_is_nnis() -> None:
    model = small()
    attach_mask(model, Target("0", "weight"), half(4, 1, 1, 1))
    attach_mask(model, Target("0", "bias"), half(4))
    nested = masks_as_nested(model)
    assert list(nested) == ["0"]
    assert nested["0"]["weight"].shape == (4, 3, 3, 3)
    assert torch.equal(nested["0"]["bias"], half(4))


def test_disabled_hides_every_trace_and_keeps_what_is_attached_inside() -> None:
    model = small()
    names = [name for name, _ in model.named_modules()]
    buffers = [name for name, _ in model.named_buffers()]
    attach_mask(model, Target("0", "weight"), half(4, 1, 1, 1))
    attach_mask(model, Target("4", "_input_0"), half(16))
    assert list(model[0].children()) == []
    x = torch.randn(2, 3, 4, 4)
    with disabled(model):
        assert [name for name, _ in model.named_modules()] == names
        assert [name for name, _ in model.named_buffers()] == buffers
        assert type(model[0]) is nn.Conv2d
        model.eval()
        attach_mask(model, Target("4", "_output_0"), torch.zeros(5))
        attach_mask(model, Target("0", "bias"), torch.zeros(4))
    assert torch.equal(model(x), torch.zeros(2, 5))
    assert torch.equal(model[0](x)[:, 0], torch.zeros(2, 2, 2))
    assert not any(module.training for module in model.modules())
    assert len(model[4]._forward_hooks) == len(model[4]._forward_pre_hooks) == 1
    detach(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_disabled_shows_and_copies_the_plain_model() -> None:
    model = small().eval()
    x = torch.randn(2, 3, 4, 4)
    names = [name for name, _ in model.named_modules()]
    state = list(model.state_dict())
    dense = model(x)
    for target in (Target("0", "weight"), Target("", "_output_0"), Target("4", "_input_0")):
        attach_mask(model, target, torch.zeros(()))
    masked = model(x)
    with disabled(model):
        assert [name for name, _ in model.named_modules()] == names
        assert list(model.state_dict()) == state
        assert type(model[0]) is nn.Conv2d
        assert type(model) is nn.Sequential
        copied = copy.deepcopy(model)
        with disabled(model):
            assert torch.equal(model(x), dense)
        with pytest.raises(ZeroDivisionError), disabled(model):
            raise ZeroDivisionError
    assert torch.equal(model(x), masked)
    assert len(get_masks(model)) == 3
    assert torch.equal(copied(x), dense)
    assert get_masks(copied) == {}
