"""Pruners with example inputs: what belongs together is masked together, so that ``dw.realize`` can cut it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dwindle.pruning import FPGMPruner, L1NormPruner, L2NormPruner, LevelPruner, Pruner, RandomPruner
from dwindle.realize.from_masks import realize
from pruning.models import Attention, Residual, Simple, lively

CONVOLUTIONS = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
IMAGE = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),)
TOKENS = (torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1)),)


def gone(masks: dict[str, dict[str, torch.Tensor]], module: str, name: str = "weight") -> list[int]:
    """Indices of dimension 0 that are masked as a whole."""
    mask = masks[module][name]
    return (mask.reshape(mask.shape[0], -1) == 0).all(1).nonzero().flatten().tolist()


@pytest.mark.parametrize("kind", [L1NormPruner, L2NormPruner, FPGMPruner, RandomPruner])
def test_the_matrix_of_nni_with_groups_found_by_analysis(kind: type[Pruner]) -> None:
    model = lively(Simple()).eval()
    config = [
        {"op_types": ["Conv2d"], "sparse_ratio": 0.75},
        {"op_names": ["fc1"], "sparse_ratio": 0.75},
    ]
    x = torch.randn(2, 1, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner = kind(model, config, example_inputs=(x,))
        _, masks = pruner.compress()
    for name in ("conv1", "conv2", "conv3", "fc1"):
        assert (masks[name]["weight"] == 0).double().mean() == 0.75
        assert gone(masks, name) == gone(masks, name, "bias")
    assert gone(masks, "conv2") == gone(masks, "conv3") == gone(masks, "bn2") == gone(masks, "bn3", "bias")
    assert gone(masks, "bn1") == gone(masks, "bn1", "bias") == gone(masks, "conv1")
    masked = model(x)
    before = sum(parameter.numel() for parameter in model.parameters())
    result = realize(model, (x,))
    assert result.verification is not None
    assert result.verification.proven
    assert [
        result.model.get_submodule(name).weight.shape[0] for name in ("conv1", "conv2", "conv3", "fc1")
    ] == [
        4,
        8,
        8,
        25,
    ]
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.08 * before
    torch.testing.assert_close(result.model(x), masked, rtol=1e-5, atol=1e-6)


def test_residual_and_depthwise_channels_go_together() -> None:
    model = lively(Residual()).eval()
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    pruner = L1NormPruner(model, CONVOLUTIONS, example_inputs=IMAGE)
    _, masks = pruner.compress()
    scores = (
        weights["stem.weight"].abs().sum((1, 2, 3)) + weights["project.weight"].abs().sum((1, 2, 3))
    ).numpy()
    expected = sorted(np.argsort(scores)[:4].tolist())
    stream = [("stem", "weight"), ("stem", "bias"), ("norm", "weight"), ("norm", "bias")]
    for module, name in [*stream, ("project", "weight"), ("project", "bias")]:
        assert gone(masks, module, name) == expected
    inner = gone(masks, "expand")
    assert len(inner) == 8
    for module in ("expand", "depthwise", "depthwise_norm"):
        assert gone(masks, module, "weight") == gone(masks, module, "bias") == inner
    assert set(masks) == {"stem", "norm", "expand", "depthwise", "depthwise_norm", "project"}
    rows = {row.target: row for row in pruner.report().rows}
    assert rows["norm.bias"].follows is not None
    assert "stem.weight" in rows["norm.bias"].follows
    assert rows["stem.weight"].achieved == 0.5


def test_one_configured_layer_takes_its_branch_along() -> None:
    """A depthwise convolution, or the other side of an add, that is not configured stops nothing."""
    for name, followers in (("expand", ["depthwise", "depthwise_norm"]), ("stem", ["norm", "project"])):
        model = lively(Residual()).eval()
        _, masks = L1NormPruner(
            model, [{"op_names": [name], "sparse_ratio": 0.5}], example_inputs=IMAGE
        ).compress()
        assert set(masks) == {name, *followers}
        for follower in followers:
            assert gone(masks, follower) == gone(masks, follower, "bias") == gone(masks, name)
        masked = model(*IMAGE)
        size = model.get_submodule(name).weight.shape[0]
        realize(model, IMAGE)
        assert model.get_submodule(name).weight.shape[0] == size // 2
        torch.testing.assert_close(model(*IMAGE), masked, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [L1NormPruner, FPGMPruner, RandomPruner])
def test_masked_channels_are_exactly_zero_inside(kind: type[Pruner]) -> None:
    model = lively(Residual()).eval()
    _, masks = kind(model, CONVOLUTIONS, example_inputs=IMAGE).compress()
    seen: dict[str, torch.Tensor] = {}
    for name in ("norm", "project", "depthwise_norm"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, output)
        )
    model(*IMAGE)
    for name, output in seen.items():
        channels = gone(masks, name)
        assert channels
        assert not output[:, channels].any()
        assert output[:, [c for c in range(output.shape[1]) if c not in channels]].any()


def test_whole_heads_go_with_all_their_projections() -> None:
    model = lively(Attention()).eval()
    query = model.query.weight.detach().clone()
    pruner = L1NormPruner(model, [{"op_names": ["query", "up"], "sparse_ratio": 0.5}], example_inputs=TOKENS)
    _, masks = pruner.compress()
    scores = query.abs().sum(1).reshape(4, 6).sum(1)
    heads = scores.argsort()[:2].sort().values
    rows = [int(head) * 6 + offset for head in heads for offset in range(6)]
    for name in ("query", "key", "value"):
        assert gone(masks, name) == gone(masks, name, "bias") == rows
    assert gone(masks, "up") == gone(masks, "up", "bias")
    assert len(gone(masks, "up")) == 24
    masked = model(*TOKENS)
    realize(model, TOKENS)
    assert model.query.weight.shape == (12, 24)
    assert model.heads == 2
    assert model.down.weight.shape == (24, 24)
    torch.testing.assert_close(model(*TOKENS), masked, rtol=1e-5, atol=1e-6)


def test_channels_of_the_models_output_stay_and_it_says_so() -> None:
    model = Residual()
    pruner = L1NormPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}], example_inputs=IMAGE)
    with pytest.warns(UserWarning, match="head.weight 0% of 50%"):
        _, masks = pruner.compress()
    assert gone(masks, "head") == []
    assert [row.target for row in pruner.report().missed] == ["head.weight"]
    assert any("head.weight" in note for note in pruner.report().notes)


def test_an_excluded_module_holds_its_channels() -> None:
    config = [{"op_types": ["Conv2d"], "exclude_op_names": ["project"], "sparse_ratio": 0.5}]
    model = lively(Residual()).eval()
    with pytest.warns(UserWarning, match="project"):
        _, masks = L1NormPruner(model, config, example_inputs=IMAGE).compress()
    assert gone(masks, "stem") == []
    assert "project" not in masks
    assert len(gone(masks, "expand")) == len(gone(masks, "depthwise")) == 8


def test_different_ratios_of_coupled_layers_use_the_smallest() -> None:
    config = [{"op_names": ["stem"], "sparse_ratio": 0.5}, {"op_names": ["project"], "sparse_ratio": 0.25}]
    with pytest.warns(UserWarning, match="different ratios|25% of 50%"):
        _, masks = L1NormPruner(Residual(), config, example_inputs=IMAGE).compress()
    assert len(gone(masks, "stem")) == len(gone(masks, "project")) == 2


def test_global_ranking_over_coupled_channels() -> None:
    config: list[dict[str, Any]] = [
        {"op_types": ["Conv2d"], "sparse_ratio": 0.5, "global_group_id": 1, "max_sparse_ratio": 0.75}
    ]
    model = lively(Residual()).eval()
    _, masks = L1NormPruner(model, config, example_inputs=IMAGE).compress()
    assert gone(masks, "stem") == gone(masks, "project")
    assert gone(masks, "expand") == gone(masks, "depthwise")
    assert len(gone(masks, "stem")) <= 6
    assert len(gone(masks, "expand")) <= 12
    sizes = {"stem": 27, "project": 16, "expand": 8, "depthwise": 9}
    total = 8 * (27 + 16) + 16 * (8 + 9)
    removed = sum(len(gone(masks, name)) * size for name, size in sizes.items())
    assert total / 2 - 43 < removed <= total / 2


def test_single_weights_are_not_coupled() -> None:
    model = Residual()
    _, masks = LevelPruner(
        model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], example_inputs=IMAGE
    ).compress()
    for name in ("stem", "expand", "depthwise", "project"):
        mask = masks[name]["weight"]
        assert int((mask == 0).sum()) == mask.numel() // 2
    assert "norm" not in masks


def test_training_after_masking_then_realizing_in_the_middle() -> None:
    model = lively(Residual()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    pruner = L1NormPruner(model, CONVOLUTIONS, example_inputs=IMAGE)
    pruner.compress()
    target = torch.randint(5, (2,))
    for _ in range(3):
        nn.functional.cross_entropy(model(*IMAGE), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    model.eval()
    masked = model(*IMAGE)
    realize(model, IMAGE, optimizer=optimizer)
    assert model.stem.weight.shape == (4, 3, 3, 3)
    torch.testing.assert_close(model(*IMAGE), masked, rtol=1e-5, atol=1e-6)
    nn.functional.cross_entropy(model(*IMAGE), target).backward()
    optimizer.step()


def test_the_model_is_not_changed_by_analysing_it() -> None:
    model = lively(Residual()).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = [id(parameter) for parameter in model.parameters()]
    L1NormPruner(model, CONVOLUTIONS, example_inputs=IMAGE).compress()
    assert model.training
    assert [id(parameter) for parameter in model.parameters()] == parameters
    after = {name: value for name, value in model.state_dict().items() if "_dwindle" not in name}
    assert list(after) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in after.items())


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norms_over_masked_channels_are_masked_with_them(norm: type[nn.Module]) -> None:
    """The norm then averages over fewer channels when cut: the proof says that it applies the mask inside."""
    model = nn.Sequential(nn.Linear(8, 16), norm(16), nn.Linear(16, 4))
    lively(model).eval()
    x = torch.randn(2, 8)
    _, masks = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], example_inputs=x).compress()
    for own in masks["1"]:
        assert gone(masks, "1", own) == gone(masks, "0")
    assert set(masks["1"]) == ({"weight", "bias"} if norm is nn.LayerNorm else {"weight"})
    assert not model[:2](x)[:, gone(masks, "0")].any()
    result = realize(model, (x,))
    assert result.verification is not None
    assert any("norm" in operator for operator in result.verification.inside)
    assert model[2].weight.shape == (4, 8)
