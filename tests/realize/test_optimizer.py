"""Surgery in the middle of a run: the live optimizer goes on as a new one over the same sliced state would."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dwindle as dw


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.norm(self.conv(x))))).mean((2, 3))
        return self.head(torch.relu(self.hidden(x)))


def batches(number: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(0, 5, (6,), generator=generator),
        )
        for _ in range(number)
    ]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, steps: int = 3) -> list[float]:
    losses = []
    for x, y in batches(steps, seed):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.8, 0.95)),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
}


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups with settings of their own, in an order that is not the model's."""
    norms = [
        parameter for name, parameter in model.named_parameters() if "norm" in name or name.endswith("bias")
    ]
    others = [parameter for parameter in model.parameters() if all(parameter is not norm for norm in norms)]
    return [{"params": norms[::-1], "weight_decay": 0.0}, {"params": others, "lr": 5e-3}]


def sliced_by_hand(tensor: torch.Tensor, dims: dict[int, torch.Tensor]) -> torch.Tensor:
    for dim, index in dims.items():
        tensor = tensor[(slice(None),) * dim + (index,)]
    return tensor


def small_by_hand(dense: Net, keep: dict[str, dict[int, torch.Tensor]]) -> Net:
    """A new small model from the dense one's values: nothing of the library takes part."""
    small = copy.deepcopy(dense)
    for name, tensor in [*dense.named_parameters(), *dense.named_buffers()]:
        module, _, key = name.rpartition(".")
        own = sliced_by_hand(tensor.detach(), keep.get(name, {})).clone()
        holder = small.get_submodule(module)
        if key in holder._parameters:
            holder._parameters[key] = nn.Parameter(own)
        else:
            holder._buffers[key] = own
    small.depthwise.groups = small.depthwise.weight.shape[0]
    return small


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("grouped", [False, True], ids=["one_group", "groups"])
def test_goes_on_as_a_new_optimizer_from_the_same_state(name: str, grouped: bool) -> None:
    model = Net().double()
    make = lambda own: OPTIMIZERS[name](groups_of(own) if grouped else own.parameters())
    optimizer = make(model)
    train(model, optimizer, seed=1)
    dense, dense_optimizer = copy.deepcopy((model, optimizer))
    names = {id(parameter): key for key, parameter in dense.named_parameters()}
    settings = [
        {key: held for key, held in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    order = [[names[id(p)] for p in group["params"]] for group in dense_optimizer.param_groups]

    result = dw.prune(model, batches(1, 0)[0][0], ratio=0.5, optimizer=optimizer)
    assert result.parameters_after < 0.6 * result.parameters_before

    # groups hold exactly the live parameters, in order, with their settings
    live = dict(model.named_parameters())
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
        [id(live[key]) for key in keys] for keys in order
    ]
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == settings
    assert {id(p) for p in optimizer.state} <= {id(p) for p in live.values()}

    # the small model and its state, sliced here by hand, under an optimizer that is new
    small = small_by_hand(dense, result.plan.keep)
    new = make(small)
    saved = dense_optimizer.state_dict()
    old_order = [key for keys in order for key in keys]
    for number, state in saved["state"].items():
        shape = dict(dense.named_parameters())[old_order[number]].shape
        dims = result.plan.keep.get(old_order[number], {})
        saved["state"][number] = {
            key: sliced_by_hand(held, dims).clone()
            if isinstance(held, torch.Tensor) and held.shape == shape
            else held
            for key, held in state.items()
        }
    new.load_state_dict(saved)
    assert train(model, optimizer, seed=2) == pytest.approx(train(small, new, seed=2), abs=1e-12)
    for key, parameter in small.named_parameters():
        assert live[key].shape == parameter.shape
        assert (live[key] - parameter).abs().max() <= 1e-12, key


def test_checkpoints_of_the_optimizer_load_into_one_over_the_small_model() -> None:
    model = Net().double()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer, seed=1)
    dw.prune(model, batches(1, 0)[0][0], ratio=0.5, optimizer=optimizer)
    again = OPTIMIZERS["adamw"](model.parameters())
    again.load_state_dict(optimizer.state_dict())
    twin, twin_optimizer = copy.deepcopy((model, again))
    assert train(model, optimizer, seed=3) == train(twin, twin_optimizer, seed=3)


def test_frozen_parameters_and_ones_of_other_models_keep_their_place() -> None:
    model, stranger = Net().double(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    model.conv.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([*model.parameters(), stranger], lr=0.1, momentum=0.9)
    train(model, optimizer, seed=1)
    dw.prune(model, batches(1, 0)[0][0], ratio=0.5, optimizer=optimizer)
    assert optimizer.param_groups[0]["params"][-1] is stranger
    assert model.conv.weight.requires_grad is False
    before = model.conv.weight.clone()
    train(model, optimizer, seed=2)
    assert torch.equal(before, model.conv.weight)


def test_an_optimizer_without_state_goes_on() -> None:
    model = Net().double()
    optimizer = torch.optim.Adam(model.parameters())
    dw.prune(model, batches(1, 0)[0][0], ratio=0.5, optimizer=optimizer)
    losses = train(model, optimizer, seed=1, steps=20)
    assert losses[-1] < losses[0]


def test_a_scheduler_keeps_driving_the_live_groups() -> None:
    model = Net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer, seed=1, steps=1)
    scheduler.step()
    dw.prune(model, batches(1, 0)[0][0], ratio=0.5, optimizer=optimizer)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    before = model.head.bias.detach().clone()
    train(model, optimizer, seed=2, steps=1)
    assert not torch.equal(before, model.head.bias)


def test_momentum_of_a_folded_bias_survives() -> None:
    """Realizing masks adds constants to a bias: the parameter is new, its momentum is the old one's."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(5, 4, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    momentum = optimizer.state[model[2].bias]["momentum_buffer"].clone()
    bias = model[2].bias.detach().clone()
    keep = torch.ones(8)
    keep[:4] = 0
    columns = model[2].weight.detach()[:, :4].clone()
    masks = {"0": {"weight": keep[:, None].expand(8, 4).clone(), "bias": keep}}
    dw.realize(model, torch.randn(2, 4, dtype=torch.float64), masks=masks, optimizer=optimizer)
    assert model[0].out_features == 4
    assert torch.allclose(model[2].bias, bias + 0.5 * columns.sum(1), atol=1e-12)  # sigmoid(0) = 0.5
    assert torch.equal(optimizer.state[model[2].bias]["momentum_buffer"], momentum)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
