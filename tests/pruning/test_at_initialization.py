"""SNIP and SynFlow: the published scores by finite differences and by plain matrix products, and the rounds."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dwindle as dw
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.pruning import SNIPPruner, SynFlowPruner
from dwindle.pruning.at_initialization import synaptic_flow
from pruning.models import Residual, Simple

GLOBAL = [{"op_types": ["Linear"], "sparse_ratio": 0.5, "global_group_id": "all"}]


def deep(widths: tuple[int, ...] = (5, 7, 6, 4), seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for start, end in itertools.pairwise(widths):
        layers += [nn.Linear(start, end, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def weights_of(model: nn.Module) -> list[np.ndarray]:
    return [own.detach().double().numpy().copy() for own in model.parameters()]


def masks_of(masks: dict[str, dict[str, Tensor]]) -> list[np.ndarray]:
    return [own["weight"].numpy() for own in masks.values()]


def normed() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()


def test_snip_by_finite_differences_of_connections() -> None:
    """The derivative of the loss to a factor c = 1 on each connection, with the statistics of the batch."""
    model = normed()
    with torch.no_grad():
        model[1].running_mean.fill_(9.0)  # as meaningless as those of an untrained model
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(0, 3, (8,))
    weight = model[0].weight.detach()
    step = 1e-6

    def loss(row: int, column: int, factor: float) -> float:
        changed = weight.clone()
        changed[row, column] *= factor
        hidden = x @ changed.T + model[0].bias
        hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + model[1].eps).sqrt()
        outputs = model[3](torch.relu(hidden * model[1].weight + model[1].bias))
        return float(nn.functional.cross_entropy(outputs, y).detach())

    expected = np.array(
        [[abs(loss(r, c, 1 + step) - loss(r, c, 1 - step)) / (2 * step) for c in range(4)] for r in range(6)]
    )
    pruner = SNIPPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], data=[(x, y)])
    _, masks = pruner.compress()
    planned = next(iter(pruner.plan.goals.values()))
    metric = pruner.metric(planned.target, weight, planned.granularity)
    np.testing.assert_allclose(metric.numpy(), expected, rtol=1e-5, atol=1e-9)
    gone = np.argsort(expected.reshape(-1))[:12]
    assert sorted(np.flatnonzero(masks["0"]["weight"].numpy() == 0)) == sorted(gone)
    assert (model[1].running_mean == 9).all()
    assert int(model[1].num_batches_tracked) == 0
    assert model[1].training


def test_snip_takes_the_gradient_of_all_batches_before_the_absolute_value() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).double()
    data = [(torch.randn(5, 4, dtype=torch.float64), torch.randint(0, 3, (5,))) for _ in range(3)]
    pruner = SNIPPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], data=data)
    pruner.prepare()
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), [model[0].weight])
    planned = next(iter(pruner.plan.goals.values()))
    metric = pruner.metric(planned.target, model[0].weight.detach(), planned.granularity)
    torch.testing.assert_close(metric, (gradient * model[0].weight).abs().detach(), rtol=1e-10, atol=1e-14)


def flows(weights: list[np.ndarray]) -> list[np.ndarray]:
    """|w dR/dw| from R = 1' |W3| |W2| |W1| 1, by matrix products."""
    absolute = [np.abs(w) for w in weights]
    result = []
    for number, own in enumerate(absolute):
        before = np.ones(absolute[0].shape[1])
        for w in absolute[:number]:
            before = w @ before
        behind = np.ones(absolute[-1].shape[0])
        for w in reversed(absolute[number + 1 :]):
            behind = w.T @ behind
        result.append(own * np.outer(behind, before))
    return result


def test_the_flow_is_a_product_of_matrices() -> None:
    model = deep()
    expected = flows(weights_of(model))
    found = synaptic_flow(model.double(), (torch.randn(3, 5),), {})
    for own, other in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(own.numpy(), other, rtol=1e-12)
    sums = [float(own.sum()) for own in found.values()]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-12)  # the conservation law of the paper


@pytest.mark.parametrize(("ratio", "iterations"), [(0.5, 1), (0.7, 10), (0.93, 30)])
def test_rounds_against_a_plain_loop(ratio: float, iterations: int) -> None:
    """Algorithm 1 of the paper with numpy: score, keep the share (1 - ratio) ** (k / n) of all weights, again."""
    model = deep()
    weights = weights_of(model)
    masks = [np.ones_like(w) for w in weights]
    total = sum(w.size for w in weights)
    for number in range(1, iterations + 1):
        scores = np.concatenate(
            [s.ravel() for s in flows([w * m for w, m in zip(weights, masks, strict=True)])]
        )
        count = int(total * (1 - (1 - ratio) ** (number / iterations)))
        keep = np.ones(total)
        keep[np.argsort(scores, kind="stable")[:count]] = 0
        masks = [
            part.reshape(w.shape)
            for part, w in zip(
                np.split(keep, np.cumsum([w.size for w in weights])[:-1]), weights, strict=True
            )
        ]
    config = [{**GLOBAL[0], "sparse_ratio": ratio}]
    pruner = SynFlowPruner(model, config, (torch.randn(2, 5),), iterations=iterations)
    _, found = pruner.compress()
    assert sum(int((own == 0).sum()) for own in masks_of(found)) == int(total * ratio)
    for own, other in zip(masks_of(found), masks, strict=True):
        np.testing.assert_array_equal(own, other)
    for own, before in zip(model.parameters(), weights, strict=True):
        np.testing.assert_array_equal(own.detach().double().numpy(), before)


def test_rounds_keep_the_flow_where_one_shot_cuts_it_off() -> None:
    """Score once and a wide layer loses everything; score again and again and what is rare becomes precious."""

    def flow(iterations: int) -> float:
        model = deep((4, 60, 2, 60, 4), seed=0)
        config = [{**GLOBAL[0], "sparse_ratio": 0.97}]
        _, masks = SynFlowPruner(model, config, (torch.ones(1, 4),), iterations=iterations).compress()
        current = np.ones(4)
        for w, m in zip(weights_of(model), masks_of(masks), strict=True):
            current = np.abs(w * m) @ current
        return float(current.sum())

    assert flow(1) == 0
    assert flow(30) > 0


@pytest.mark.parametrize("build", [Simple, Residual])
def test_channels_are_cut(build: type[nn.Module]) -> None:
    torch.manual_seed(3)
    model, x = build().eval(), torch.randn(2, 1 if build is Simple else 3, 8, 8)
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "granularity": "out_channel"}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, masks = SynFlowPruner(model, config, (x,), iterations=3).compress()
    for own in masks.values():
        assert (own["bias"] == 0).double().mean() == 0.5
    result = dw.realize(model, example_inputs=(x,))
    assert result.verification is not None
    assert result.verification.proven


def test_integers_stay_and_an_earlier_mask_holds() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    from dwindle import simulate
    from dwindle.config import Target

    old = (torch.arange(6) % 2).float().expand(8, 6)
    simulate.attach_mask(model, Target("1", "weight"), old)
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.75, "global_group_id": 1}]
    _, masks = SynFlowPruner(model, config, (torch.randint(0, 9, (2, 4)),), iterations=5).compress()
    assert (masks["1"]["weight"][:, ::2] == 0).all()
    assert sum(int((own["weight"] == 0).sum()) for own in masks.values()) == 54


@pytest.mark.parametrize(
    ("options", "words"),
    [({"iterations": 0}, "iterations"), ({"iterations": 2, "example_inputs": None}, "example_inputs")],
)
def test_mistakes(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SynFlowPruner(deep(), GLOBAL, **{"example_inputs": (torch.ones(1, 5),), **options})


def test_weights_that_are_not_finite() -> None:
    model = deep()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(DwindleError, match="finite"):
        SynFlowPruner(model, GLOBAL, (torch.ones(1, 5),), iterations=2).compress()
    from dwindle import simulate

    assert not simulate.simulated_targets(model)
