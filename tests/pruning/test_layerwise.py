"""Wanda and SparseGPT: the published formulas in float64, exact shares, every kind of layer, errors."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dwindle as dw
from dwindle import simulate
from dwindle.config import Granularity, Target
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.pruning import LevelPruner, SparseGPTPruner, WandaPruner
from dwindle.pruning.brain_surgeon import Choice, block_errors, reconstruct
from dwindle.pruning.wanda import ranks_in_rows
from dwindle.training.linear_layers import columns, from_matrix, inverse_factor, to_matrix


class Conv1D(nn.Module):
    """Hugging Face's transposed linear layer (known by its name), so that the tests need no transformers."""

    def __init__(self, out: int, inside: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inside, out))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.t(), self.bias)


LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(6, 4), (5, 3, 6)),
    (Conv1D(4, 6), (5, 3, 6)),
    (nn.Conv1d(4, 6, 3, stride=2, padding="valid", dilation=2), (2, 4, 11)),
    (nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular"), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2), (3, 4, 9, 8)),
    (nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"), (4, 7, 7)),  # one image, no batch
    (nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: type(value).__name__)
def test_a_layer_is_its_matrix_times_its_columns(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer, x = copy.deepcopy(layer).double(), torch.randn(shape, dtype=torch.float64)
    nn.init.zeros_(layer.bias)
    matrix = to_matrix(layer, layer.weight)
    out = torch.cat(list(columns(layer, x)), 1) @ matrix.transpose(1, 2)  # [groups, samples, rows]
    expected = layer(x)
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        expected = expected.reshape(1, -1, expected.shape[-1])
    else:
        whole = expected if expected.dim() == layer.weight.dim() else expected[None]
        flat = whole.movedim(1, -1).reshape(-1, layer.groups, layer.out_channels // layer.groups)
        expected = flat.transpose(0, 1)
    assert torch.allclose(out, expected, atol=1e-12)
    assert torch.equal(from_matrix(layer, matrix, layer.weight.shape), layer.weight)


# Wanda.


def test_wanda_is_the_papers_formula() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 7)).double()
    data = [torch.randn(8, 10, dtype=torch.float64) for _ in range(3)]
    weight = model[2].weight.detach().numpy().copy()
    inputs = np.concatenate([model[1](model[0](x)).detach().numpy() for x in data])
    scores = np.abs(weight) * np.sqrt((inputs**2).sum(0))[None, :]
    expected = np.ones_like(weight)
    for row in range(7):
        expected[row, np.argsort(scores[row], kind="stable")[:3]] = 0  # half of every output's weights
    _, masks = WandaPruner(model, [{"op_names": ["2"], "sparse_ratio": 0.5}], data=data).compress()
    assert np.array_equal(masks["2"]["weight"].numpy(), expected)
    assert np.array_equal(
        model[2]._parameters["weight"].detach().numpy(), weight
    )  # what stays does not change


def test_wanda_keeps_the_best_of_neighbours() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 5).double(), torch.randn(20, 8, dtype=torch.float64)
    scores = (layer.weight.detach().abs() * x.norm(dim=0)).numpy().reshape(5, 2, 4)
    model = nn.Sequential(layer)
    config = [{"op_types": ["Linear"], "granularity": "2:4"}]
    _, masks = WandaPruner(model, config, data=x).compress()
    expected = np.zeros_like(scores)
    for row, window in itertools.product(range(5), range(2)):
        expected[row, window, np.argsort(-scores[row, window])[:2]] = 1
    assert np.array_equal(masks["0"]["weight"].numpy().reshape(5, 2, 4), expected)


@pytest.mark.parametrize(("layer", "shape"), LAYERS[1:5], ids=lambda value: type(value).__name__)
def test_wanda_scores_every_kind_of_layer(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """The norm of what a weight reads is found from gradients: d sum(layer(x²)) / d weight."""
    layer, x = copy.deepcopy(layer).double(), torch.randn(shape, dtype=torch.float64)
    squares = torch.autograd.grad(layer(x.square()).sum(), layer.weight)[0]
    scores = layer.weight.detach().abs() * squares.sqrt()
    if isinstance(layer, Conv1D):
        scores = scores.t()
    rows = scores.reshape(scores.shape[0], -1)
    model = nn.Sequential(layer)
    config = [{"op_names": ["0"], "sparse_ratio": 0.5}]
    _, masks = WandaPruner(model, config, data=[x]).compress()
    mask = masks["0"]["weight"]
    mask = (mask.t() if isinstance(layer, Conv1D) else mask).reshape(rows.shape)
    for own, kept in zip(rows, mask, strict=True):
        assert kept.sum() == len(own) - len(own) // 2
        assert own[kept == 0].max() <= own[kept == 1].min()


def test_ranks_take_equally_many_from_every_row() -> None:
    ranks = ranks_in_rows(torch.tensor([[3.0, 1.0, 2.0], [0.1, 0.3, 0.2]]))
    assert ranks.tolist() == [[2, 0, 1], [0, 2, 1]]


# SparseGPT: brute force by its definition.


def brute_force(weight: np.ndarray, hessian: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Column by column: what goes is set to zero, and the later weights minimise the error of the whole row."""
    result = weight.astype(np.float64).copy()
    for row in range(len(result)):
        for column in range(result.shape[1]):
            if mask[row, column]:
                continue
            later = np.arange(column + 1, result.shape[1])
            if len(later):  # minimise d' H d with d[column] = -w and d[earlier] = 0
                moved = np.linalg.solve(hessian[np.ix_(later, later)], hessian[later, column])
                result[row, later] += moved * result[row, column]
            result[row, column] = 0
    return result


def problem(rows: int = 5, count: int = 12, samples: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(count, count, generator=generator, dtype=torch.float64)
    inputs = torch.randn(samples, count, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(rows, count, generator=generator, dtype=torch.float64), inputs.t() @ inputs / samples


def damped(hessian: Tensor, share: float = 0.01) -> np.ndarray:
    return hessian.numpy() + share * hessian.diagonal().mean().item() * np.eye(len(hessian))


def test_the_factor_holds_the_inverses_of_all_the_rests() -> None:
    _, hessian = problem()
    factor, whole = inverse_factor(hessian).numpy(), damped(hessian)
    for i in range(len(whole)):
        rest = np.linalg.inv(whole[i:, i:])
        assert np.isclose(factor[i, i] ** 2, rest[0, 0], rtol=1e-9)
        assert np.allclose(factor[i, i:] / factor[i, i], rest[0] / rest[0, 0], rtol=1e-8)


@pytest.mark.parametrize("stripe", [1, 4, 5, 128])
def test_reconstruction_is_the_brute_force(stripe: int) -> None:
    weight, hessian = problem()
    new, kept = reconstruct(weight, hessian, Choice(removed=30), stripe=stripe)
    assert int((~kept).sum()) == 30
    assert np.allclose(new.numpy(), brute_force(weight.numpy(), damped(hessian), kept.numpy()), atol=1e-9)


def test_what_goes_is_chosen_as_the_paper_says() -> None:
    """One stripe: the smallest w² / [inv(H[i:, i:])]_00 over all rows; two: the second after what the first did."""
    weight, hessian = problem()
    whole = damped(hessian)
    inverses = np.array([np.linalg.inv(whole[i:, i:])[0, 0] for i in range(12)])
    scores = weight.numpy() ** 2 / inverses
    expected = np.ones(60, dtype=bool)
    expected[np.argsort(scores.reshape(-1))[:24]] = False
    _, kept = reconstruct(weight, hessian, Choice(removed=24))
    assert np.array_equal(kept.numpy(), expected.reshape(5, 12))

    first = np.ones(30, dtype=bool)
    first[np.argsort(scores[:, :6].reshape(-1))[:12]] = False
    half = np.concatenate([first.reshape(5, 6), np.ones((5, 6), dtype=bool)], 1)
    moved = brute_force(weight.numpy(), whole, half)
    second = np.ones(30, dtype=bool)
    second[np.argsort((moved[:, 6:] ** 2 / inverses[6:]).reshape(-1))[:12]] = False
    _, kept = reconstruct(weight, hessian, Choice(removed=24), stripe=6)
    assert np.array_equal(kept.numpy(), np.concatenate([first.reshape(5, 6), second.reshape(5, 6)], 1))


def test_neighbours_are_chosen_when_their_window_comes() -> None:
    weight, hessian = problem()
    whole, current = damped(hessian), weight.numpy().copy()
    expected = np.ones((5, 12), dtype=bool)
    for window in range(0, 12, 4):
        inverses = np.array([np.linalg.inv(whole[i:, i:])[0, 0] for i in range(window, window + 4)])
        for row in range(5):
            order = np.argsort(current[row, window : window + 4] ** 2 / inverses)
            expected[row, window + order[:2]] = False
        mask = np.ones((5, 12), dtype=bool)
        mask[:, : window + 4] = expected[:, : window + 4]
        current = brute_force(weight.numpy(), whole, mask)
    new, kept = reconstruct(weight, hessian, Choice(width=4, pattern=2))
    assert np.array_equal(kept.numpy(), expected)
    assert np.allclose(new.numpy(), current, atol=1e-9)


def test_the_error_of_a_block_is_exact() -> None:
    """Removing whole blocks at the front and making up for it with the rest: the least squares error itself."""
    weight, hessian = problem()
    whole = damped(hessian)
    errors = block_errors(weight, inverse_factor(hessian), 3).numpy()
    for block in range(4):
        rest = whole[block * 3 :, block * 3 :]
        inside = np.linalg.inv(rest)[:3, :3]
        for row in range(5):
            w = weight[row, block * 3 : block * 3 + 3].numpy()
            assert np.isclose(errors[row, block], w @ np.linalg.solve(inside, w), rtol=1e-8)
            later = np.linalg.solve(rest[3:, 3:], rest[3:, :3] @ w) if len(rest) > 3 else np.zeros(0)
            delta = np.concatenate([-w, later])
            assert np.isclose(errors[row, block], delta @ rest @ delta, rtol=1e-8)


def test_what_may_only_be_zero_stays_zero() -> None:
    weight, hessian = problem()
    allowed = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.3
    new, kept = reconstruct(weight * allowed, hessian, Choice(removed=9), allowed=allowed)
    assert bool((new[~allowed] == 0).all())
    assert bool(kept[~allowed].all())  # chosen is only among the others
    expected = brute_force((weight * allowed).numpy(), damped(hessian), (kept & allowed).numpy())
    assert np.allclose(new.numpy(), expected, atol=1e-9)


# SparseGPT on layers and models.

RATIO = 0.37
GRANULARITIES: list[Any] = ["element", "2:4", [2, 2], "in_channel"]


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize(
    "layer",
    [nn.Linear(8, 6), Conv1D(6, 8), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(8, 8, 2, groups=2)],
    ids=["linear", "Conv1D", "convolution", "groups"],
)
def test_every_layer_reaches_its_ratio_and_is_the_brute_force(layer: nn.Module, granularity: Any) -> None:
    torch.manual_seed(1)
    layer = copy.deepcopy(layer).double()
    convolution = isinstance(layer, nn.Conv2d)
    x = torch.randn((40, 8, 4, 4) if convolution else (150, 8), dtype=torch.float64)
    if granularity == [2, 2] and convolution:
        granularity = [2, 2, 1, 1]
    config: dict[str, Any] = {"op_names": ["0"], "granularity": granularity}
    if granularity != "2:4":
        config["sparse_ratio"] = RATIO
    model = nn.Sequential(layer)
    old = layer.weight.detach().clone()
    pruner = SparseGPTPruner(model, [config], data=x)
    _, masks = pruner.compress()
    mask = masks["0"]["weight"]
    target = Target("0", "weight")
    own = pruner.plan.goals[target].granularity
    blocks = own.reduce(mask, "max") if own.kind != "pattern" else mask
    assert torch.equal(mask, own.expand(blocks, mask.shape) if own.kind != "pattern" else mask)
    if granularity == "2:4":
        axis = Granularity.of_module("2:4", layer, target).axis
        windows = mask.movedim(axis, -1).reshape(-1, 4).sum(1)
        assert bool((windows == 2).all())
    else:
        assert int((blocks == 0).sum()) == int(blocks.numel() * RATIO)

    # The same, by brute force with the columns in the order that makes blocks neighbours.
    new, weight = to_matrix(layer, layer._parameters["weight"].detach()), to_matrix(layer, old)
    stays = to_matrix(layer, mask)
    inputs = torch.cat(list(columns(layer, x)), 1)
    taps = layer.kernel_size[0] * layer.kernel_size[1] if convolution else 1
    order = np.arange(weight.shape[2])
    if granularity not in ("element", "in_channel"):
        order = order.reshape(-1, taps)
        size = 4 if granularity == "2:4" else 2
        order = order.reshape(-1, size, taps).transpose(0, 2, 1).reshape(-1)
    for group in range(len(weight)):
        hessian = (inputs[group].t() @ inputs[group])[order][:, order]
        expected = brute_force(
            weight[group][:, order].numpy(), damped(hessian), stays[group][:, order].numpy() != 0
        )
        assert np.allclose(new[group][:, order].numpy(), expected, atol=1e-8)


def model_and_data(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    mixing = torch.randn(16, 16)
    return model.to(dtype), [(torch.randn(50, 16) @ mixing).to(dtype) for _ in range(4)]


def test_inputs_are_seen_through_the_layers_pruned_before() -> None:
    """With little memory each layer has a pass of its own, and its inputs come from pruned layers."""
    model, data = model_and_data(torch.float64)
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
    apart = copy.deepcopy(model)
    SparseGPTPruner(model, config, data=data, memory=1).compress()
    x = torch.cat(data)
    for index in (0, 2, 4):
        single = SparseGPTPruner(
            nn.Sequential(apart[index]), [{"op_names": ["0"], "sparse_ratio": 0.5}], data=x
        )
        single.compress()
        with torch.no_grad():
            x = functional.relu(single.model(x))
        simulate.detach(single.model)
        assert torch.allclose(apart[index].weight, model[index].weight, atol=1e-9)


def test_the_rest_of_the_forward_is_not_run() -> None:
    model, data = model_and_data()
    calls = []
    model[4].register_forward_hook(lambda *_: calls.append(1))
    config = [{"op_names": ["0", "2"], "sparse_ratio": 0.5}]
    SparseGPTPruner(model, config, data=iter(data), memory=1).compress()  # an iterator is read once
    assert len(calls) == 1  # the first look at the order of the layers


def test_a_layer_called_twice_has_the_inputs_of_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(functional.relu(self.layer(functional.relu(self.layer(x)))))

    torch.manual_seed(0)
    model, x = Twice().double(), torch.randn(30, 6, dtype=torch.float64)
    with torch.no_grad():
        inputs = torch.cat([x, functional.relu(model.layer(x))])
    old = model.layer.weight.detach().clone()
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
    _, masks = SparseGPTPruner(model, config, data=x, memory=1).compress()
    expected = brute_force(old.numpy(), damped(inputs.t() @ inputs), masks["layer"]["weight"].numpy() != 0)
    assert np.allclose(model.layer.weight.detach().numpy(), expected, atol=1e-9)


def test_half_precision_does_not_reach_the_mathematics() -> None:
    """Under autocast the model runs in bfloat16; the layer's problem is solved in full precision all the same."""
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 6), torch.randn(64, 12).bfloat16().float()
    config = [{"op_names": ["0"], "sparse_ratio": 0.5}]
    plain, cast = nn.Sequential(copy.deepcopy(layer)), nn.Sequential(layer)
    SparseGPTPruner(plain, config, data=x).compress()
    with torch.autocast("cpu", torch.bfloat16):
        SparseGPTPruner(cast, config, data=x).compress()
    assert torch.equal(cast[0].weight, plain[0].weight)


def lost(model: nn.Module, pruned: nn.Module, data: list[Tensor]) -> float:
    x = torch.cat(data)
    with torch.no_grad():
        return float((pruned(x) - model(x)).square().sum() / model(x).square().sum())


@pytest.mark.parametrize("granularity", ["element", "2:4"])
def test_sparse_gpt_loses_less_than_wanda_and_wanda_less_than_magnitude(granularity: str) -> None:
    model, data = model_and_data()
    config: dict[str, Any] = {"op_types": ["Linear"], "granularity": granularity}
    if granularity == "element":
        config["sparse_ratio"] = 0.5
    losses = []
    for make in (
        lambda own: SparseGPTPruner(own, [config], data=data),
        lambda own: WandaPruner(own, [config], data=data),
        lambda own: LevelPruner(own, [config]),
    ):
        own = copy.deepcopy(model)
        make(own).compress()
        losses.append(lost(model, own, data))
    assert losses[0] < losses[1] < losses[2], losses


def test_it_is_realized_with_proof() -> None:
    model, data = model_and_data()
    config = [{"op_names": ["2"], "sparse_ratio": 0.5, "granularity": "in_channel"}]
    pruner = SparseGPTPruner(model, config, data=data)
    pruner.compress()
    assert pruner.report().rows[0].achieved == 0.5
    with torch.no_grad():
        masked = model(data[0])
    result = dw.realize(model, example_inputs=(data[0],))
    assert result.verification is not None
    assert model[2].weight.shape == (32, 16)
    assert model[0].weight.shape == (16, 16)  # whose outputs nobody reads any more
    assert torch.allclose(model(data[0]), masked, atol=1e-4)


def test_what_was_masked_before_goes_first() -> None:
    model, data = model_and_data()
    LevelPruner(model, [{"op_names": ["2"], "sparse_ratio": 0.4}]).compress()
    before = simulate.get_masks(model)[Target("2", "weight")].clone()
    config = [{"op_names": ["2"], "sparse_ratio": 0.5}]
    _, masks = SparseGPTPruner(model, config, data=data).compress()
    assert int((masks["2"]["weight"] == 0).sum()) == 512
    assert bool((masks["2"]["weight"][before == 0] == 0).all())
    assert bool((model[2].weight[before == 0] == 0).all())


def test_rounds_go_on_from_where_they_are() -> None:
    model, data = model_and_data()
    pruner = SparseGPTPruner(model, [{"op_names": ["2"], "sparse_ratio": 0.5}], data=data)
    _, masks = pruner.compress(0.5)
    first = masks["2"]["weight"].clone()
    assert int((first == 0).sum()) == 256
    pruner.update(1.0)
    second = pruner.masks["2"]["weight"]
    assert int((second == 0).sum()) == 512
    assert pruner.errors[Target("2", "weight")] > 0


# Bad input: an error, and nothing has changed.


def bad_batch(data: list[Tensor]) -> list[Tensor]:
    return [*data[:-1], torch.full_like(data[-1], float("nan"))]


@pytest.mark.parametrize("kind", [WandaPruner, SparseGPTPruner])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: {"data": bad_batch(data)}, "NaN"),
        (lambda data: {"data": data, "batches": 5}, "data ended after 4 of 5"),
        (lambda data: {"data": []}, "data ended after 0 of"),
    ],
    ids=["NaN", "short", "empty"],
)
def test_bad_data_is_refused_before_any_change(kind: Any, change: Any, message: str) -> None:
    model, data = model_and_data()
    before = copy.deepcopy(model.state_dict())
    extra = {"memory": 1} if kind is SparseGPTPruner else {}
    pruner = kind(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}], **change(data), **extra)
    with pytest.raises(DwindleError, match=message):
        pruner.compress()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_late_failure_gives_every_weight_back() -> None:
    model, data = model_and_data()
    with torch.no_grad():
        model[4].weight[0, 0] = float("inf")
    before = copy.deepcopy(model.state_dict())
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
    with pytest.raises(DwindleError, match=r"4\.weight holds NaN or infinite"):
        SparseGPTPruner(model, config, data=data, memory=1).compress()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(model.state_dict()) == list(before)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize("kind", [WandaPruner, SparseGPTPruner])
def test_a_layer_that_never_runs_is_named(kind: Any) -> None:
    pruner = kind(Unused(), [{"op_types": ["Linear"], "sparse_ratio": 0.5}], data=torch.randn(5, 4))
    with pytest.raises(DwindleError, match=r"unused\.weight"):
        pruner.compress()


def test_configs_that_do_not_fit() -> None:
    x = torch.randn(5, 8)
    linear = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    cases: list[tuple[nn.Module, dict[str, Any], str]] = [
        (linear, {"sparse_ratio": 0.5, "granularity": "out_channel"}, "whole output"),
        (linear, {"sparse_ratio": 0.5, "global_group_id": 1}, "global_group_id"),
        (linear, {"sparse_threshold": 0.5}, "sparse_threshold"),
        (linear, {"sparse_ratio": 1.5}, "sparse_ratio"),
        (nn.Sequential(nn.BatchNorm1d(8)), {"op_types": ["BatchNorm1d"], "sparse_ratio": 0.5}, "Linear"),
        (
            nn.Sequential(nn.ConvTranspose1d(8, 4, 2)),
            {"op_types": ["ConvTranspose1d"], "sparse_ratio": 0.5},
            "Linear",
        ),
    ]
    for model, entry, message in cases:
        with pytest.raises(ConfigError, match=message):
            SparseGPTPruner(model, [{"op_types": ["Linear"], **entry}], data=x)
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    with pytest.raises(ConfigError, match=r"is also"):
        SparseGPTPruner(tied, [{"op_types": ["Linear"], "sparse_ratio": 0.5}], data=x)
    with pytest.raises(ConfigError, match="needs data"):
        SparseGPTPruner(linear, [{"op_types": ["Linear"], "sparse_ratio": 0.5}], data=None)
