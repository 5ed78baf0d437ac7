"""Optimal Brain Damage: the Hessian's diagonal, exact and in expectation, and what it promises of the loss."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dwindle as dw
from dwindle.config import Target
from dwindle.config.errors import ConfigError
from dwindle.pruning import OBDPruner
from dwindle.pruning.second_order import hutchinson, saliency, samples_of
from pruning.models import Attention, Residual, lively

Batch = tuple[Tensor, Tensor]
WEIGHT = Target("0", "weight")


def regression(seed: int = 0) -> tuple[nn.Sequential, list[Batch]]:
    """A linear model at its least-squares solution: the gradient is zero; inputs are orthogonal, so the Hessian is
    diagonal and one random direction tells all of it."""
    torch.manual_seed(seed)
    x = torch.linalg.qr(torch.randn(40, 5, dtype=torch.float64)).Q * torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    y = torch.randn(40, 2, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(5, 2, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    return model, [(x, y)]


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def labelled(count: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(5, 4, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (5,), generator=generator),
        )
        for _ in range(count)
    ]


def config(ratio: float = 0.5, **keys: Any) -> list[dict[str, Any]]:
    return [{"op_types": ["Linear"], "sparse_ratio": ratio, **keys}]


def test_the_saliency_is_what_the_loss_gains_at_a_minimum() -> None:
    """On a parabola the promise holds exactly: |h| w^2 / 2 is the rise of the loss, weight by weight."""
    model, data = regression()
    pruner = OBDPruner(model, config(), data=data, loss=nn.functional.mse_loss, curvature="hutchinson")
    pruner.prepare()
    x, y = data[0]
    exact = (x.square().mean(0) * 2 / 2).expand(2, 5)  # d^2/dw^2 of the mean over samples and both outputs
    np.testing.assert_allclose(pruner.mean(WEIGHT).numpy(), exact.numpy(), rtol=1e-9)
    weight = model[0].weight.detach()
    lowest = nn.functional.mse_loss(model(x), y).detach()
    for row in range(2):
        for column in range(5):
            changed = weight.clone()
            changed[row, column] = 0
            rise = nn.functional.mse_loss(x @ changed.T, y) - lowest
            assert float(saliency(weight, exact)[row, column]) == pytest.approx(float(rise), rel=1e-9)


def test_hutchinson_is_exact_where_the_hessian_is_diagonal() -> None:
    weights = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    unused = torch.randn(2, dtype=torch.float64, requires_grad=True)
    loss = weights[0].pow(4).sum() + weights[1].exp().sum() + 3 * unused.sum()
    found = hutchinson(loss, [*weights, unused], torch.Generator().manual_seed(0))
    assert found[2] is None
    torch.testing.assert_close(found[0], 12 * weights[0].square())
    torch.testing.assert_close(found[1], weights[1].exp())


def test_hutchinson_has_the_diagonal_as_its_mean() -> None:
    """Within five standard errors; the variance of an estimate is the sum of squares beside the diagonal."""
    torch.manual_seed(4)
    matrix = torch.randn(4, 4, dtype=torch.float64)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def loss(w: Tensor) -> Tensor:
        return (matrix @ w).tanh().square().sum()

    full = torch.autograd.functional.hessian(loss, weight.detach())
    generator = torch.Generator().manual_seed(0)
    estimates = [hutchinson(loss(weight), [weight], generator)[0] for _ in range(400)]
    mean = torch.stack([own for own in estimates if own is not None]).mean(0)
    spread = (full.square().sum(1) - full.diagonal().square()).sqrt()
    assert ((mean - full.diagonal()).abs() < 5 * spread / 400**0.5).all()


@pytest.mark.parametrize("per_sample", [True, False])
def test_fisher_information(per_sample: bool) -> None:
    model, data = network(), labelled()
    groups = [
        (x[n], y[n])
        for x, y in data
        for n in ([slice(i, i + 1) for i in range(5)] if per_sample else [slice(5)])
    ]
    expected = np.zeros((6, 4))
    for x, y in groups:
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), [model[0].weight])
        expected += gradient.numpy() ** 2 / len(groups)
    pruner = OBDPruner(model, config(0.4), data=data, per_sample=per_sample)
    _, masks = pruner.compress()
    np.testing.assert_allclose(pruner.mean(WEIGHT).numpy(), expected, rtol=1e-10)
    scores = expected * dict(model.named_parameters())["0.weight"].detach().numpy() ** 2 / 2
    gone = np.argsort(scores.reshape(-1), kind="stable")[: int(24 * 0.4)]
    assert sorted(np.flatnonzero(masks["0"]["weight"].numpy() == 0)) == sorted(gone)


def test_the_same_seed_gives_the_same_masks() -> None:
    def masks(seed: int) -> Tensor:
        pruner = OBDPruner(network(), config(), data=labelled(), curvature="hutchinson", seed=seed)
        pruner.compress()
        pruner.update(1.0)
        return pruner.masks["0"]["weight"]

    assert torch.equal(masks(1), masks(1))
    assert any(not torch.equal(masks(1), masks(seed)) for seed in (2, 3, 4))


def test_samples_of_a_batch() -> None:
    batch = {"a": torch.arange(6).reshape(3, 2), "b": [torch.arange(3), "text"]}
    parts = list(samples_of(batch))
    assert len(parts) == 3
    assert parts[1]["a"].tolist() == [[2, 3]]
    assert parts[2]["b"][0].tolist() == [2]
    assert parts[2]["b"][1] == "text"


class Classifier(nn.Module):
    """Attention, whose fused kernels cannot be differentiated twice, before a head."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Attention(), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))


@pytest.mark.parametrize("curvature", ["fisher", "hutchinson"])
def test_attention_and_channels_are_cut(curvature: Any) -> None:
    torch.manual_seed(5)
    x = torch.randn(4, 7, 24)
    model = lively(Classifier()).eval()
    names = ["block.query", "block.key", "block.value", "block.up"]
    config = [{"op_names": names, "sparse_ratio": 0.5, "granularity": "out_channel"}]
    data = [(x, torch.tensor([0, 1, 2, 0]))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OBDPruner(model, config, (x,), data=data, curvature=curvature).compress()
    result = dw.realize(model, example_inputs=(x,))
    assert result.verification is not None
    assert result.verification.proven
    assert model.block.up.out_features == 24
    assert model.block.heads == 2


def test_residual_channels_sum_their_saliency() -> None:
    torch.manual_seed(6)
    model = lively(Residual()).eval()
    x = torch.randn(4, 3, 8, 8)
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "granularity": "out_channel"}]
    _, masks = OBDPruner(model, config, (x,), data=[(x, torch.tensor([0, 1, 2, 0]))]).compress()
    assert torch.equal(masks["stem"]["bias"], masks["project"]["bias"])
    assert int(masks["stem"]["bias"].sum()) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"curvature": "fischer"}, "did you mean 'fisher'"),
        ({"probes": 0}, "probes"),
        ({"curvature": "hutchinson", "training_steps": 3}, "differentiates twice"),
    ],
)
def test_mistakes(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        OBDPruner(network(), config(), **options)
