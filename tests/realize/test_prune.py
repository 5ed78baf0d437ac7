"""``dw.prune``: every argument does what it says, targets are met, errors come before any change."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

import dwindle as dw
from dwindle.config.history import history
from dwindle.graph.analysis import analyse
from dwindle.measure import count_macs
from dwindle.pruning.axis_importance import WeightImportance
from dwindle.realize.cost import CostModel


class Net(nn.Module):
    """Residual stage, depthwise convolution, attention-free head: several axes of different sizes."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.block = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, width, 1),
        )
        self.down = nn.Conv2d(width, 3 * width, 3, stride=2)
        self.fc1, self.fc2 = nn.Linear(3 * width, 48), nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(self.down(x + self.block(x))).mean((2, 3))
        return self.fc2(torch.relu(self.fc1(x)))


class Tokens(nn.Module):
    """Two encoder layers over an embedding, so that every kind of axis exists."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(50, 32), nn.Parameter(torch.randn(1, 6, 32))
        self.heads, self.width = 4, 8
        self.norm = nn.LayerNorm(32)
        self.query, self.key, self.value = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.out = nn.Linear(32, 32)
        self.fc1, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.place
        own = self.norm(x)
        query, key, value = (
            layer(own).view(*ids.shape, self.heads, self.width).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1)
        x = x + self.out((weights @ value).transpose(1, 2).flatten(2))
        x = x + self.fc2(torch.relu(self.fc1(x)))
        return self.head(x.mean(1))


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 12, 12)


def identifiers(batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 50, (batch, 6))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def size(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def macs(model: nn.Module, x: torch.Tensor) -> int:
    return count_macs(model, (x,))


# ratio


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_ratio_is_the_share_of_every_axis_that_goes(ratio: float) -> None:
    model = Net()
    result = dw.prune(model, images(), ratio=ratio)
    stay = 1 - ratio
    assert model.stem[0].out_channels == model.block[5].out_channels == round(32 * stay)
    assert (
        model.block[0].out_channels == model.block[3].groups == model.block[5].in_channels == round(64 * stay)
    )
    assert model.down.out_channels == model.fc1.in_features == round(96 * stay)
    assert model.fc1.out_features == round(48 * stay)
    assert model.fc2.out_features == 10
    assert result.parameters_after == parameters(model)
    assert all(cut["after"] == round(cut["before"] * stay) for cut in result.plan.cuts)


def test_the_least_important_go_by_l1_of_all_coupled_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    order = torch.randperm(8)
    with torch.no_grad():
        for rank, index in enumerate(order.tolist()):
            model[0].weight[index] = 0.1 * (rank + 1) * torch.sign(torch.randn(4))
            model[2].weight[:, index] = 0.2 * (rank + 1)
    expected = model[0].weight[order[4:].sort().values].clone()
    dw.prune(model, torch.randn(2, 4), ratio=0.5)
    assert torch.equal(model[0].weight, expected)


@pytest.mark.parametrize("importance", ["l1", "l2", "fpgm", "random"])
def test_every_importance(importance: str) -> None:
    model = Net()
    assert dw.prune(model, images(), ratio=0.5, importance=importance).verification.proven
    assert model.stem[0].out_channels == 16


def test_own_importance() -> None:
    """A function that wants the last indices: exactly these stay."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    expected = model[0].weight[4:].clone()
    dw.prune(
        model,
        torch.randn(2, 4),
        ratio=0.5,
        importance=lambda weight, dim: torch.arange(float(weight.shape[dim])),
    )
    assert torch.equal(model[0].weight, expected)


def test_nothing_to_cut_is_said_and_changes_nothing() -> None:
    model = Net()
    before, answer = copy.deepcopy(model.state_dict()), model.eval()(x := images())
    identity = [id(parameter) for parameter in model.parameters()]
    result = dw.prune(model, x, ratio=0.0)
    assert torch.equal(model(x), answer)
    assert [id(parameter) for parameter in model.parameters()] == identity
    assert all(torch.equal(held, before[key]) for key, held in model.state_dict().items())
    assert result.plan.is_empty()
    assert any("nothing was cut" in note for note in result.notes)
    lone = nn.Linear(4, 4)
    assert any("nothing was cut" in note for note in dw.prune(lone, torch.randn(2, 4), ratio=0.5).notes)


def test_ratio_one_keeps_one_index_of_each_axis() -> None:
    model = Net()
    dw.prune(model, images(), ratio=1.0)
    assert model.stem[0].out_channels == 1
    assert model(images()).shape == (2, 10)


# targets


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("scope", ["local", "global", "cost"])
@pytest.mark.parametrize("name", ["macs", "params", "bytes"])
def test_targets_are_met_within_two_percent(name: str, scope: str, share: float) -> None:
    model, x = Net(), images(1)
    cost = {
        "macs": lambda: macs(model, x),
        "params": lambda: parameters(model),
        "bytes": lambda: size(model),
    }[name]
    before = cost()
    dw.prune(model, x, target={name: share}, scope=scope)
    assert cost() / before == pytest.approx(share, rel=0.02)


@pytest.mark.parametrize("name", ["macs", "params"])
def test_targets_of_a_transformer(name: str) -> None:
    model, ids = Tokens(), identifiers(1)
    cost = {"macs": lambda: macs(model, ids), "params": lambda: parameters(model)}[name]
    before = cost()
    dw.prune(model, ids, target={name: 0.5})
    assert cost() / before == pytest.approx(0.5, rel=0.02)


def test_a_target_out_of_reach_says_what_is_in_reach() -> None:
    model = nn.Sequential(nn.Linear(100, 8), nn.ReLU(), nn.Linear(8, 100))
    with pytest.raises(dw.ConfigError, match=r"target: params = 0.01 .*no less than 0\.\d+"):
        dw.prune(model, torch.randn(2, 100), target={"params": 0.01})
    assert model[0].out_features == 8


# scope


def test_global_scope_takes_from_where_it_matters_least() -> None:
    model = Net()
    with torch.no_grad():
        for parameter in (model.fc1.weight, model.fc2.weight):
            parameter.copy_(torch.eye(48, 96) if parameter is model.fc1.weight else torch.eye(10, 48))
    result = dw.prune(model, images(), ratio=0.5, scope="global", largest_ratio=0.75)
    shares = {cut["parameters"][0]: cut["after"] / cut["before"] for cut in result.plan.cuts}
    assert len({round(share, 2) for share in shares.values()}) > 1
    total = sum(cut["before"] for cut in result.plan.cuts)
    assert sum(cut["after"] for cut in result.plan.cuts) / total == pytest.approx(0.5, abs=0.08)
    assert all(share >= 0.25 for share in shares.values())


def test_global_scope_is_one_threshold_over_all_axes() -> None:
    """Two axes with known scores; the ranking over both is counted by hand."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    scores = {8: torch.arange(8.0), 16: torch.arange(16.0) / 2 + 0.25}
    result = dw.prune(
        model,
        torch.randn(2, 4),
        ratio=0.5,
        scope="global",
        importance=lambda weight, dim: scores.get(weight.shape[dim], torch.ones(weight.shape[dim])),
    )
    ranked = sorted((float(s / own.mean()), name) for name, own in scores.items() for s in own)[12:]
    assert model[0].out_features == sum(name == 8 for _, name in ranked)
    assert model[2].out_features == sum(name == 16 for _, name in ranked)
    assert sum(cut["after"] for cut in result.plan.cuts) == 12


def test_cost_scope_gives_the_most_importance_for_the_cost() -> None:
    """Against all pairs of counts, tried one by one."""
    torch.manual_seed(0)
    values = {24: torch.rand(24).double() * 3, 40: torch.rand(40).double()}

    def make() -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 2))

    importance = WeightImportance(lambda weight, dim: values[weight.shape[dim]])
    importance.reduce, importance.normalize = "mean", "none"
    model = make()
    dw.prune(
        model,
        torch.randn(2, 6),
        target={"params": 0.5},
        scope="cost",
        importance=importance,
        largest_ratio=0.95,
    )

    def cost(first: int, second: int) -> int:
        return (6 + 1) * first + (first + 1) * second + (second + 1) * 2

    def worth(first: int, second: int) -> float:
        best = [
            values[size].sort(descending=True).values[:count] for size, count in ((24, first), (40, second))
        ]
        return float(sum(own.sum() for own in best))

    full = cost(24, 40)
    found = model[0].out_features, model[2].out_features
    assert cost(*found) / full == pytest.approx(0.5, rel=0.02)
    within = [
        (first, second)
        for first in range(1, 25)
        for second in range(1, 41)
        if cost(first, second) <= max(cost(*found), 0.51 * full)
    ]
    assert worth(*found) >= 0.98 * max(worth(*pair) for pair in within)


def test_prices_are_differences_of_the_cost() -> None:
    model = Net()
    analysis = analyse(model, (images(1),))
    cost = CostModel.of(analysis)
    axes = [info.axis for info in analysis.selected()]
    counts = {axis: max(1, axis.size - number) for number, axis in enumerate(axes)}
    for name in ("macs", "params", "bytes"):
        for axis, price in cost.prices(name, counts, axes).items():
            fewer = cost.cost(name, {**counts, axis: counts[axis] - 1})
            assert price == pytest.approx(cost.cost(name, counts) - fewer, rel=1e-12)
            assert price > 0


# where


@pytest.mark.parametrize("pattern", ["block", "block.0.weight", "block.*"])
def test_ignored_axes_stay(pattern: str) -> None:
    model = Net()
    dw.prune(model, images(), ratio=0.5, ignore=[pattern])
    assert model.block[0].out_channels == 64
    assert model.fc1.out_features == 24


def test_ratios_by_name() -> None:
    model = Net()
    dw.prune(model, images(), ratio=0.5, ratios={"fc1.bias": 0.75, "block.3": 0.25, "down.*": 0.0})
    assert model.fc1.out_features == 12
    assert model.block[0].out_channels == 48
    assert model.down.out_channels == 96
    assert model.stem[0].out_channels in (
        16,
        32,
    )  # the stage is an input of down as well: the first pattern wins


@pytest.mark.parametrize("multiple", [4, 8, 16])
def test_round_to(multiple: int) -> None:
    model = Net()
    result = dw.prune(model, images(), ratio=0.6, round_to=multiple)
    assert result.plan.cuts
    assert all(cut["after"] % multiple == 0 for cut in result.plan.cuts)
    assert all(cut["after"] >= cut["before"] * 0.4 for cut in result.plan.cuts)


@pytest.mark.parametrize(("multiple", "heads"), [(8, 2), (16, 2), (32, 4)])
def test_rounding_counts_the_width_of_heads(multiple: int, heads: int) -> None:
    """Heads of width 8: any number is a multiple of 8, an even one of 16, and half of the four would be 16 of 32."""
    model = Tokens()
    dw.prune(model, identifiers(), ratio=0.6, round_to=multiple)
    assert (model.heads, model.query.out_features) == (heads, 8 * heads)
    assert (model.embed.embedding_dim % multiple, model.fc1.out_features % multiple) == (0, 0)


@pytest.mark.parametrize("kind", ["heads", "head_width", "embedding", "feed_forward"])
def test_kinds_of_axes(kind: str) -> None:
    model = Tokens()
    result = dw.prune(model, identifiers(), ratio=0.5, axes=[kind])
    assert {cut["kind"] for cut in result.plan.cuts} == {kind}
    widths = {
        "embedding": model.embed.embedding_dim == 16 and list(model.place.shape) == [1, 6, 16],
        "heads": model.heads == 2 and model.width == 8 and model.query.out_features == 16,
        "head_width": model.heads == 4 and model.width == 4 and model.value.out_features == 16,
        "feed_forward": model.fc1.out_features == 32,
    }
    assert [name for name, cut in widths.items() if cut] == [kind]


def test_heads_go_whole() -> None:
    model = Tokens()
    dense = copy.deepcopy(model)
    result = dw.prune(model, identifiers(), ratio=0.5, axes=["heads"])
    rows = result.plan.keep["query.weight"][0]
    heads = (rows // 8).unique()
    assert rows.tolist() == [head * 8 + place for head in heads.tolist() for place in range(8)]
    assert torch.equal(model.query.weight, dense.query.weight[rows])
    assert torch.equal(result.plan.keep["out.weight"][1], rows)


# errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either ratio= .* or target="),
        ({"ratio": 0.5, "target": {"macs": 0.5}}, "either ratio= .* or target="),
        ({"ratio": 1.5}, "ratio: 1.5"),
        ({"ratio": -0.1}, "ratio: -0.1"),
        ({"target": {"mac": 0.5}}, "target: 'mac'.*macs"),
        ({"target": {"macs": 0.0}}, "target: macs = 0"),
        ({"target": {"macs": 0.5, "params": 0.5}}, "target: give exactly one"),
        ({"ratio": 0.5, "importance": "l1_norm"}, "importance: 'l1_norm'.*l1, l2"),
        ({"ratio": 0.5, "scope": "globl"}, "scope: 'globl'.*global"),
        ({"ratio": 0.5, "scope": "cost"}, "scope: 'cost' .* give target="),
        ({"target": {"macs": 0.5}, "scope": "cost", "axes": ["block"]}, "blocks are ranked"),
        ({"ratio": 0.5, "axes": ["head"]}, "axes: 'head'.*heads"),
        ({"ratio": 0.5, "round_to": 0}, "round_to: 0"),
    ],
)
def test_errors_name_the_argument_and_leave_the_model(options: dict[str, Any], message: str) -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    attributes = {path: dict(vars(module)) for path, module in model.named_modules()}
    with pytest.raises(dw.ConfigError, match=message):
        dw.prune(model, images(), **options)
    assert all(torch.equal(held, before[key]) for key, held in model.state_dict().items())
    assert attributes == {path: dict(vars(module)) for path, module in model.named_modules()}


# plans


@pytest.mark.parametrize("make", [Net, Tokens])
def test_a_plan_in_json_rebuilds_the_small_model(make: type[nn.Module]) -> None:
    x = images(5) if make is Net else identifiers(5)
    model = make()
    plan = json.loads(json.dumps(dw.prune(model, x[:2], ratio=0.5).plan.to_json()))
    fresh = make()
    assert dw.apply_plan(fresh, plan) is fresh
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), fresh.eval()(x))
    assert str(fresh) == str(model)


def test_plans_of_two_rounds_apply_one_after_the_other() -> None:
    model, x = Net(), images(5)
    plans = [dw.prune(model, x[:2], ratio=ratio).plan.to_json() for ratio in (0.25, 0.5)]
    assert [entry["plan"] for entry in history(model)] == json.loads(json.dumps(plans))
    fresh = Net()
    for plan in plans:
        dw.apply_plan(fresh, plan)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), fresh.eval()(x))


def test_copies_and_state_of_the_small_model() -> None:
    model, x = Net(), images()
    keys = list(model.state_dict())
    dw.prune(model, x, ratio=0.5)
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    assert torch.equal(twin.eval()(x), model.eval()(x))
    assert history(twin) == history(model)
    with torch.no_grad():
        twin.fc1.weight.zero_()
    assert model.fc1.weight.abs().sum() > 0


# what surgery keeps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_stay(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    dw.prune(model, images().to(dtype), ratio=0.5)
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {dtype}
    assert model.stem[0].out_channels == 16
    assert model(images().to(dtype)).dtype is dtype


def test_memory_format_stays() -> None:
    model = Net().to(memory_format=torch.channels_last)
    dw.prune(model, images(), ratio=0.5)
    for weight in (model.stem[0].weight, model.down.weight):
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()


def test_gradients_and_requires_grad_stay() -> None:
    model = Net()
    model.stem[0].weight.requires_grad_(False)
    model(images()).square().sum().backward()
    dense = {name: (p.detach().clone(), p.grad) for name, p in model.named_parameters()}
    result = dw.prune(model, images(), ratio=0.5)
    for name, parameter in model.named_parameters():
        value, grad = dense[name]
        for dim, index in result.plan.keep.get(name, {}).items():
            value, grad = (
                value.index_select(dim, index),
                None if grad is None else grad.index_select(dim, index),
            )
        assert torch.equal(parameter, value)
        assert parameter.requires_grad is (name != "stem.0.weight")
        assert (parameter.grad is None) if grad is None else torch.equal(parameter.grad, grad)


def test_training_mode_random_state_and_statistics_stay() -> None:
    model = Net().train()
    model.block.eval()
    statistics, state = model.stem[1].running_mean.clone(), torch.get_rng_state()
    x = images()
    state = torch.get_rng_state()
    result = dw.prune(model, x, ratio=0.5)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert not model.block[0].training
    assert torch.equal(model.stem[1].running_mean, statistics[result.plan.keep["stem.1.running_mean"][0]])


def test_masked_by_hand_equals_the_small_model() -> None:
    """The proof, done again here without the library: zero what went, compare in float64."""
    model = Net().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    dense = copy.deepcopy(model)
    result = dw.prune(model, images().double(), ratio=0.5)
    for name, parameter in dense.named_parameters():
        for dim, index in result.plan.keep.get(name, {}).items():
            gone = torch.ones(parameter.shape[dim])
            gone[index] = 0
            parameter.data.movedim(dim, 0)[gone.bool()] = 0
    x = images(5).double()
    assert (dense(x) - model(x)).abs().max() < 1e-12
    assert (dense(x) - dense(x).mean()).abs().max() > 1e-3


def test_no_proof_when_not_asked() -> None:
    result = dw.prune(Net(), images(), ratio=0.5, verify=False)
    assert result.verification is None
    assert "proven" not in result.summary()


def test_result_says_what_happened() -> None:
    result = dw.prune(Net(), images(), ratio=0.5)
    assert f"{result.parameters_after:,}" in result.summary()
    assert "proven equal" in result.summary()
    assert json.loads(json.dumps(result.to_json()))["cuts"] == result.plan.cuts
    assert set(result.seconds) >= {"capture", "analyse", "shrink", "prove"}
    reasons = {entry["parameters"][0]: entry["reason"] for entry in result.frozen}
    assert "output" in reasons["fc2.weight[0]"]
