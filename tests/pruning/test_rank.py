"""HRank and CHIP against numpy's ranks and nuclear norms, sample by sample, map by map."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dwindle as dw
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.pruning import CHIPPruner, HRankPruner
from dwindle.pruning import rank as module
from pruning.models import Residual, lively

DATA = [torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (3, 2)]


def independence(maps: np.ndarray) -> np.ndarray:
    """||A||_* - ||M_i * A||_* of one sample, by singular values of each matrix."""
    rows = maps.reshape(maps.shape[0], -1)
    whole = np.linalg.norm(rows, "nuc")
    result = []
    for number in range(len(rows)):
        without = rows.copy()
        without[number] = 0
        result.append(whole - np.linalg.norm(without, "nuc"))
    return np.array(result)


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (6, 6), (1, 4), (4, 1)])
@pytest.mark.parametrize("numbers", [1 << 24, 40])
def test_channel_independence(shape: tuple[int, int], numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NUMBERS_AT_ONCE", numbers)
    maps = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    np.testing.assert_allclose(
        module.channel_independence(maps).numpy(), independence(maps.numpy()), rtol=1e-7, atol=1e-7
    )


def test_a_repeated_channel_is_the_least_independent() -> None:
    maps = torch.randn(6, 30, dtype=torch.float64)
    maps[4] = maps[1]
    assert set(module.channel_independence(maps).argsort()[:2].tolist()) == {1, 4}


def test_ranks_in_the_precision_of_the_maps() -> None:
    low = torch.randn(2, 3, 8, 2) @ torch.randn(2, 3, 2, 8)
    low[0, 1] = 0
    assert module.matrix_ranks(low).tolist() == [[2, 0, 2], [2, 2, 2]]


def reference(kind: type[Any], model: nn.Module, name: str) -> np.ndarray:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda m, args: seen.append(args[0].detach())
    )
    for images in DATA:
        model(images)
    handle.remove()
    samples = [sample.numpy() for batch in seen for sample in batch]
    if kind is HRankPruner:
        return np.mean([[np.linalg.matrix_rank(one) for one in sample] for sample in samples], axis=0)
    return np.mean([independence(sample.astype(np.float64)) for sample in samples], axis=0)


@pytest.mark.parametrize("kind", [HRankPruner, CHIPPruner])
def test_maps_are_those_the_next_layer_reads_and_channels_are_cut(kind: type[Any]) -> None:
    torch.manual_seed(2)
    model = lively(Residual()).eval()
    scores = reference(kind, model, "project")
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    pruner = kind(model, config, (DATA[0],), data=DATA)
    pruner.prepare()
    goal = next(goal for goal in pruner.plan.goals if goal.module == "expand")
    metric = pruner.metric(goal, model.expand.weight.detach(), pruner.plan.goals[goal].granularity)
    np.testing.assert_allclose(metric.numpy(), scores, rtol=1e-5, atol=1e-6)
    _, masks = kind(model, config, (DATA[0],), data=DATA).compress()
    gone = np.flatnonzero(masks["expand"]["bias"].numpy() == 0)
    assert sorted(gone) == sorted(np.argsort(scores, kind="stable")[:8])
    assert torch.equal(masks["expand"]["bias"], masks["depthwise"]["bias"])
    result = dw.realize(model, example_inputs=(DATA[0],))
    assert result.verification is not None
    assert result.verification.proven


def test_fewer_samples() -> None:
    model = lively(Residual()).eval()
    config = [{"op_names": ["expand"], "sparse_ratio": 0.5}]
    few = CHIPPruner(model, config, (DATA[0],), data=DATA, samples=1)
    few.prepare()
    same = CHIPPruner(model, config, (DATA[0],), data=[images[:1] for images in DATA])
    same.prepare()
    place = next(iter(few.statistics))
    torch.testing.assert_close(few.mean(place), same.mean(place), rtol=1e-6, atol=1e-6)
    with pytest.raises(ConfigError, match="samples"):
        CHIPPruner(model, config, (DATA[0],), data=DATA, samples=0)


def test_layers_without_maps() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(5, 4)
    with pytest.raises(DwindleError, match="2 spatial dimensions"):
        HRankPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], (x,), data=x).compress()
