"""Channels ranked by activations: the published averages, where they are seen, and that the result can be cut."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dwindle as dw
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.pruning import ActivationAPoZRankPruner, ActivationMeanRankPruner
from dwindle.pruning.activation import ActivationPruner, share_not_positive, summed
from pruning.models import Attention, Residual, Simple, lively

KINDS = [ActivationAPoZRankPruner, ActivationMeanRankPruner]
IMAGES = [torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (4, 4, 3)]


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "gelu": gelu,
    "silu": silu,
    "identity": lambda x: x,
}


def reference(kind: type[ActivationPruner], values: np.ndarray) -> np.ndarray:
    """The published importance of each channel, in float64, one value after the other.

    APoZ (Hu et al., equation 1) is the share of zeros over all samples and places.
    """
    result = []
    for channel in np.moveaxis(values, 1, 0):
        flat = channel.reshape(-1)
        if kind is ActivationAPoZRankPruner:
            result.append(1 - sum(1 for value in flat if value <= 0) / flat.size)
        else:
            result.append(sum(flat) / flat.size)
    return np.array(result)


def gone(mask: Tensor) -> list[int]:
    return (mask.reshape(mask.shape[0], -1) == 0).all(1).nonzero().flatten().tolist()


def lowest(scores: np.ndarray, count: int) -> list[int]:
    return sorted(np.argsort(scores, kind="stable")[:count].tolist())


def test_zeros_behind_a_relu_are_values_that_are_not_positive() -> None:
    maps = torch.randn(5, 3, 7, dtype=torch.float64)
    silent, count = share_not_positive(maps.relu())
    assert count == 35
    assert silent.tolist() == [(maps[:, c].relu() == 0).sum().item() for c in range(3)]
    assert torch.equal(share_not_positive(maps)[0], silent)
    total, count = summed(maps)
    assert count == 35
    torch.testing.assert_close(total / count, maps.mean((0, 2)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", list(FUNCTIONS))
def test_the_module_s_own_output_as_in_nni(kind: type[ActivationPruner], activation: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 4, 3)).double()
    data = [images.double() for images in IMAGES]
    outputs = torch.cat([model[0](images) for images in data]).detach().numpy()
    expected = reference(kind, FUNCTIONS[activation](outputs))
    config = [{"op_names": ["0"], "sparse_ratio": 0.5}]
    pruner = kind(model, config, data=data, activation=activation)
    _, masks = pruner.compress()
    target = next(iter(pruner.plan.goals))
    weight = dict(model.named_parameters())["0.weight"]
    metric = pruner.metric(target, weight, pruner.plan.goals[target].granularity)
    np.testing.assert_allclose(metric.numpy(), expected, rtol=1e-12, atol=1e-13)
    assert gone(masks["0"]["weight"]) == lowest(expected, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_own_function_and_features_in_the_last_dimension(kind: type[ActivationPruner]) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 10)).double()
    x = torch.randn(5, 7, 6, dtype=torch.float64)
    expected = reference(kind, np.sin(model(x).detach().numpy()).transpose(0, 2, 1))
    _, masks = kind(
        model, [{"op_types": ["Linear"], "sparse_ratio": 0.3}], data=x, activation=torch.sin
    ).compress()
    assert gone(masks["0"]["weight"]) == lowest(expected, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_input_channels_are_seen_where_they_arrive(kind: type[ActivationPruner]) -> None:
    torch.manual_seed(2)
    model = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 3)).double().eval()
    )
    data = [images.double() for images in IMAGES]
    expected = reference(kind, torch.cat([model[:3](images) for images in data]).detach().numpy())
    config = [{"op_names": ["3"], "sparse_ratio": 0.5, "granularity": "in_channel"}]
    _, masks = kind(model, config, data=data, activation="relu").compress()
    assert gone(masks["3"]["weight"].transpose(0, 1)) == lowest(expected, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_channels_are_seen_behind_norm_and_function_and_branches_agree(kind: type[ActivationPruner]) -> None:
    """Where the next layer reads them: behind BatchNorm, ReLU and depthwise convolution, in one mask for a branch."""
    torch.manual_seed(3)
    model = lively(Residual()).double().eval()
    data = [images.double() for images in IMAGES]
    seen: dict[str, list[Tensor]] = {"expand": [], "project": []}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, name=name: seen[name].append(args[0])
        )
        for name in seen
    ]
    for images in data:
        model(images)
    for handle in handles:
        handle.remove()
    scores = {name: reference(kind, torch.cat(values).detach().numpy()) for name, values in seen.items()}
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    pruner = kind(model, config, data[:1], data=data)
    _, masks = pruner.compress()
    for name in ("stem", "project", "norm"):
        assert gone(masks[name]["weight"]) == lowest(scores["expand"], 4)
    for name in ("expand", "depthwise", "depthwise_norm"):
        assert gone(masks[name]["weight"]) == lowest(scores["project"], 8)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    masked = model(data[0])
    result = dw.realize(model, example_inputs=(data[0],))
    assert result.verification is not None
    assert result.verification.proven
    assert model.expand.weight.shape == (8, 4, 1, 1)
    torch.testing.assert_close(result.model(data[0]), masked)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", [Simple, Attention])
def test_groups_flattened_places_and_tokens(kind: type[ActivationPruner], build: type[nn.Module]) -> None:
    """A grouped convolution couples; a flattened map is still many places of one channel; heads sum their width."""
    torch.manual_seed(4)
    shape = (4, 1, 8, 8) if build is Simple else (4, 7, 24)
    model = lively(build()).eval()
    names = ["conv1", "conv2", "conv3", "fc1"] if build is Simple else ["query", "key", "value", "up"]
    data = [torch.randn(shape) for _ in range(2)]
    pruner = kind(model, [{"op_names": names, "sparse_ratio": 0.5}], (data[0],), data=data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, masks = pruner.compress()
    for name in names:
        assert (masks[name]["weight"] == 0).double().mean() == 0.5
    masked = model(data[0])
    result = dw.realize(model, example_inputs=(data[0],))
    assert result.verification is not None
    assert result.verification.proven
    torch.testing.assert_close(result.model(data[0]), masked, rtol=1e-5, atol=1e-5)


def test_gelu_is_ranked_by_its_negative_side() -> None:
    """Exact zeros never occur behind GELU: counting them, as NNI does, would rank nothing."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].bias.copy_(torch.linspace(-3, 3, 8)[torch.randperm(8)])
    x = torch.randn(64, 6)
    expected = lowest((model[0](x) > 0).double().mean(0).numpy(), 4)
    _, masks = ActivationAPoZRankPruner(
        model, [{"op_names": ["0"], "sparse_ratio": 0.5}], (x,), data=x
    ).compress()
    assert gone(masks["0"]["weight"]) == expected


def test_a_training_run_is_watched() -> None:
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    data = [(torch.randn(4, 6, dtype=torch.float64), torch.randint(0, 3, (4,))) for _ in range(3)]
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
    seen = []
    for x, y in data:
        seen.append(twin[:2](x).detach())
        nn.functional.cross_entropy(twin(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    config = [{"op_names": ["0"], "sparse_ratio": 0.5}]
    pruner = ActivationAPoZRankPruner(model, config, (data[0][0],), training_steps=3)
    with dw.training.compress(model, [pruner]) as run:
        for x, y in data:
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
    expected = reference(ActivationAPoZRankPruner, torch.cat(seen).numpy())
    assert gone((model[0].weight != 0).double()) == lowest(expected, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activation": "rleu"}, "did you mean 'relu'"),
        ({}, "example_inputs"),
        ({"granularity": None, "activation": "relu"}, "ranks channels"),
    ],
)
def test_mistakes(options: dict[str, Any], words: str) -> None:
    entry: dict[str, Any] = {"op_types": ["Linear"], "sparse_ratio": 0.5}
    if "granularity" in options:
        entry["granularity"] = options.pop("granularity")
    with pytest.raises(ConfigError, match=words):
        ActivationAPoZRankPruner(nn.Sequential(nn.Linear(4, 4)), [entry], data=torch.ones(2, 4), **options)


def test_an_output_that_is_no_channel_of_the_weight() -> None:
    """The output of a recurrent layer has its hidden size, its weight four times as many rows."""
    model = nn.Sequential(nn.LSTM(4, 5))
    config = [{"op_types": ["LSTM"], "sparse_ratio": 0.5, "target_names": ["weight_ih_l0"]}]
    pruner = ActivationMeanRankPruner(model, config, data=torch.randn(3, 2, 4), activation="relu")
    with pytest.raises(DwindleError, match="20 channels"):
        pruner.compress()
