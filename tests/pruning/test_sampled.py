"""Learned probabilities: RB as NNCF's formula, L0 as the paper's equations, both drawn the same for everyone."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor, nn

import dwindle as dw
from dwindle.config import Granularity
from dwindle.config.errors import ConfigError
from dwindle.pruning import L0Pruner, RBPruner, TrainingPruner
from dwindle.pruning.l0 import expected_gate, hard_concrete, open_probability
from dwindle.pruning.regularized import SampledMask, kept_share
from dwindle.pruning.sampling import logistic_noise, share_penalty
from dwindle.training import TrainingOptions, compress, fit
from pruning.models import Residual, lively
from pruning.training_runs import check_resume, classes, network, train, zeros

CONFIG: list[dict[str, Any]] = [{"op_names": ["0", "3"], "sparse_ratio": 0.6}]


def sigmoid(value: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-value))


def test_noise_is_a_function_of_seed_step_and_name() -> None:
    first = logistic_noise((40, 50), 3, 7, "a.weight")
    assert torch.equal(first, logistic_noise((40, 50), 3, 7, "a.weight"))
    for other in ((4, 7, "a.weight"), (3, 8, "a.weight"), (3, 7, "b.weight")):
        assert not torch.equal(first, logistic_noise((40, 50), *other))
    uniform = np.sort(sigmoid(logistic_noise((20000,), 0, 0, "x").double().numpy()))
    distance = np.abs(uniform - (np.arange(20000) + 0.5) / 20000).max()
    assert distance < 1.63 / math.sqrt(20000)  # Kolmogorov and Smirnov at 1 %


@pytest.mark.parametrize("kind", ["element", "rows"])
def test_rb_forward_and_gradient(kind: str) -> None:
    granularity = Granularity("element") if kind == "element" else Granularity("channel", axis=0)
    generator = np.random.default_rng(1)
    weight = generator.normal(size=(6, 5))
    shape = granularity.block_shape((6, 5))
    score, noise, slope = (
        generator.normal(size=shape),
        generator.normal(size=shape),
        generator.normal(size=(6, 5)),
    )
    simulator = SampledMask(torch.from_numpy(score), granularity, torch.from_numpy(noise)).train()
    trained = torch.from_numpy(weight).requires_grad_()
    value = simulator(trained)
    (value * torch.from_numpy(slope)).sum().backward()
    soft = sigmoid(score + noise)
    mask = soft > 0.5
    wide = mask if kind == "element" else mask[:, None]
    block = slope * weight if kind == "element" else (slope * weight).sum(1)
    np.testing.assert_allclose(value.detach().numpy(), weight * wide)
    assert simulator.score.grad is not None
    assert trained.grad is not None
    np.testing.assert_allclose(simulator.score.grad.numpy(), block * soft * (1 - soft), rtol=1e-12)
    np.testing.assert_allclose(trained.grad.numpy(), slope * wide)
    simulator.value = simulator.deterministic(torch.Size((6, 5)))
    expected = weight * (score > 0 if kind == "element" else (score > 0)[:, None])
    np.testing.assert_allclose(simulator.eval()(torch.from_numpy(weight)).detach().numpy(), expected)


def test_rb_penalty_and_its_gradient() -> None:
    generator = np.random.default_rng(2)
    scores, sizes = [generator.normal(size=9), generator.normal(size=(4, 3))], [2, 5]
    tensors = [torch.from_numpy(score).requires_grad_() for score in scores]
    share = kept_share(tensors, sizes)
    total = 9 * 2 + 12 * 5
    kept = sum(size * (score > 0).sum() for size, score in zip(sizes, scores, strict=True)) / total
    assert share.item() == pytest.approx(kept, abs=1e-15)
    penalty = share_penalty(share, 0.7, 0.05)
    assert penalty.item() == pytest.approx(((kept - 0.3) / 0.05) ** 2)
    penalty.backward()
    for tensor, score, size in zip(tensors, scores, sizes, strict=True):
        slope = 2 * (kept - 0.3) / 0.05**2 * size / total * sigmoid(score) * (1 - sigmoid(score))
        assert tensor.grad is not None
        np.testing.assert_allclose(tensor.grad.numpy(), slope, rtol=1e-10)


def test_hard_concrete_is_the_papers_distribution() -> None:
    alpha = torch.linspace(-3, 3, 7, dtype=torch.float64)
    uniform = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    noise = torch.logit(uniform)[:, None]
    gates = hard_concrete(alpha, noise.expand(-1, 7))
    torch.testing.assert_close(
        (gates > 0).double().mean(0), open_probability(alpha), atol=1e-5, rtol=0
    )  # eq. 12
    for position, location in enumerate(alpha.tolist()):

        def density(s: float, location: float = location) -> float:
            """The concrete density of the appendix, at a gate between 0 and 1."""
            beta, u = 2 / 3, (s + 0.1) / 1.2
            a = math.exp(location)
            top = beta * a * u ** (-beta - 1) * (1 - u) ** (-beta - 1)
            return s * top / (a * u**-beta + (1 - u) ** -beta) ** 2 / 1.2

        u = 1.1 / 1.2
        at_one = 1 - sigmoid(np.array(2 / 3 * math.log(u / (1 - u)) - location))
        mean = integrate.quad(density, 0, 1)[0] + at_one
        assert gates[:, position].mean().item() == pytest.approx(mean, abs=1e-5)
    np.testing.assert_allclose(
        expected_gate(alpha).numpy(), np.clip(sigmoid(alpha.numpy()) * 1.2 - 0.1, 0, 1), rtol=1e-12
    )
    picked = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64, requires_grad=True)
    drawn = torch.tensor([0.4, 0.9, -1.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda value: hard_concrete(value, drawn), (picked,))
    assert torch.autograd.gradcheck(open_probability, (picked,))


def test_the_two_penalties_of_l0() -> None:
    model = network()
    config = [
        {"op_names": ["0"], "sparse_ratio": 0.5, "granularity": "out_channel"},
        CONFIG[0] | {"op_names": ["3"]},
    ]
    for scale in (0.01, None):
        pruner = L0Pruner(model, config, training_steps=10, regular_scale=scale, first_closed=0.2)
        with compress(model, [pruner]):
            generator = np.random.default_rng(3)
            alphas = [generator.normal(size=16), generator.normal(size=(16, 16))]
            for parameter, alpha in zip(pruner.parameters(), alphas, strict=True):
                start = 1 / (1 + math.exp(-(parameter[0].max().item() - 2 / 3 * math.log(0.1 / 1.1))))
                assert start == pytest.approx(0.8)
                parameter.data.copy_(torch.from_numpy(alpha))
            pruner.steps = 3
            opened = [sigmoid(alpha - 2 / 3 * math.log(0.1 / 1.1)).sum() for alpha in alphas]
            if scale is not None:
                expected = scale * (8 * opened[0] + opened[1])
            else:
                level = 1 - (1 - 3 / 6) ** 3
                shares = [opened[0] / 16 - (1 - 0.5 * level), opened[1] / 256 - (1 - 0.6 * level)]
                expected = np.mean([(share / 0.05) ** 2 for share in shares])
            penalty = pruner.loss()
            assert isinstance(penalty, Tensor)
            assert float(penalty.detach()) == pytest.approx(expected, rel=1e-5)
            pruner.finish()


@pytest.mark.parametrize("kind", [RBPruner, L0Pruner])
def test_a_run_reaches_its_ratio_and_is_the_same_inside_and_after(kind: type[TrainingPruner]) -> None:
    model = network()
    pruner = kind(model, CONFIG, training_steps=60, learning_rate=0.3)
    drawn: list[Tensor] = []

    def watch(step: int) -> None:
        weight = model[3].weight.detach()
        drawn.append(weight == 0)
        assert torch.equal(model[3].weight == 0, drawn[-1])  # one mask in a step
        if step == 59:
            masks = [s for s in pruner.simulators.values() if isinstance(s, SampledMask)]
            shares = [float((mask.score > 0).float().mean()) for mask in masks]
            assert all(abs(share - 0.4) < 0.1 for share in shares)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = train(model, pruner, 80, watch=watch, optimizer=torch.optim.Adam, rate=0.02)
    assert not torch.equal(drawn[5], drawn[6])
    assert torch.equal(drawn[62], drawn[61])
    assert zeros(model, "0.weight") == int(128 * 0.6)
    assert zeros(model, "3.weight") == int(256 * 0.6)
    assert losses[-1] < 0.5
    gone = model[3].weight == 0
    train(model, pruner, 3)  # a second run goes on with the same masks
    assert torch.equal(model[3].weight == 0, gone)
    assert pruner.loss() == 0.0


@pytest.mark.parametrize("kind", [RBPruner, L0Pruner])
def test_channels_are_realized_with_proof(kind: type[TrainingPruner]) -> None:
    model = lively(Residual())
    x = torch.randn(8, 3, 6, 6)
    config = [{"op_names": ["stem", "expand"], "sparse_ratio": 0.5, "granularity": "out_channel"}]
    pruner = kind(model, config, (x,), training_steps=15, learning_rate=0.5)
    train(model, pruner, 17, batch=(x, torch.arange(8) % 5), rate=0.01, optimizer=torch.optim.Adam)
    result = dw.realize(model, (x,))
    assert result.verification.max_difference < 1e-9
    assert result.model.expand.out_channels == 8
    assert result.model.stem.out_channels == 4


@pytest.mark.parametrize("kind", [RBPruner, L0Pruner])
@pytest.mark.parametrize("steps", [10, 20])
def test_resumed_equals_uninterrupted(kind: type[TrainingPruner], steps: int, tmp_path: Path) -> None:
    def make(model: nn.Module) -> TrainingPruner:
        return kind(model, CONFIG, training_steps=steps, learning_rate=0.3)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few steps: the rest goes at once
        check_resume(make, tmp_path / "state")
        check_resume(make, tmp_path / "plain", optimizer=torch.optim.SGD)


def test_beside_sgd_the_logits_have_an_optimizer_of_their_own() -> None:
    model = network()
    pruner = RBPruner(model, CONFIG, training_steps=60)
    x, y = classes()
    weights = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that the scores stayed behind
        fit(
            model, [(x, y)], weights, epochs=70, compressors=[pruner], options=TrainingOptions(progress=False)
        )
    assert len(weights.param_groups) == 1
    assert zeros(model, "3.weight") == int(256 * 0.6)
    with compress(model, []) as run:
        assert run.adaptive_optimizer(weights) is None
    other = network()
    own = [*other.parameters()]
    with compress(other, [RBPruner(other, CONFIG, training_steps=4)]) as run:
        assert run.adaptive_optimizer(torch.optim.AdamW(own)) is None
        assert (
            run.adaptive_optimizer(torch.optim.SGD(other.parameters(), lr=0.1)) is None
        )  # it has the scores
        made = run.adaptive_optimizer(torch.optim.SGD(own, lr=0.1))
        assert made is not None
        assert [group["lr"] for group in made.param_groups] == [0.1]
        assert run.add_parameters_to(torch.optim.SGD(own, lr=0.1)) == 0
        run.compressors[0].finish()  # type: ignore[attr-defined]


def test_the_prior_is_the_logit_of_the_rank() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[3] = 0.25  # ties keep their order
    sizes = [np.abs(model[number].weight.detach().numpy()).ravel() for number in (0, 3)]
    with compress(model, [RBPruner(model, CONFIG, training_steps=4, prior=1.5)]) as run:
        scores = [own.detach().numpy().ravel() for own in run.parameters()]
        run.compressors[0].finish()  # type: ignore[attr-defined]
    for size, score in zip(sizes, scores, strict=True):
        rank = np.empty(len(size))
        rank[np.argsort(size, kind="stable")] = (np.arange(len(size)) + 0.5) / len(size)
        assert np.allclose(score, np.log(99.0) + 1.5 * np.log(rank / (1 - rank)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("steps", "rate"), [(50, 0.1), (3000, 0.01)])
def test_the_default_learning_rate_lets_logits_cross_their_range(steps: int, rate: float) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with compress(model, [RBPruner(model, CONFIG, training_steps=steps)]) as run:
        run.add_parameters_to(optimizer)
        assert optimizer.param_groups[1]["lr"] == pytest.approx(rate)
        next(iter(run.compressors)).finish()  # type: ignore[attr-defined]


def test_rb_says_when_its_scores_stayed_behind() -> None:
    model = network()
    pruner = RBPruner(model, CONFIG, training_steps=5, learning_rate=1e-4, prior=0.0)
    with pytest.warns(UserWarning, match=r"masked 0.0% .* where 60.0% were asked"):
        train(model, pruner, 5)
    assert zeros(model, "3.weight") == int(256 * 0.6)


def test_a_group_has_one_penalty_and_one_ranking() -> None:
    model = network()
    config = [{"op_names": ["0", "3"], "sparse_ratio": 0.5, "global_group_id": 1}]
    pruner = RBPruner(model, config, training_steps=3)
    with compress(model, [pruner]):
        first, second = pruner.parameters()
        with torch.no_grad():
            first.copy_(torch.linspace(1, 2, 128).reshape(16, 8))
            second.copy_(torch.linspace(-1.01, 1.5, 256).reshape(16, 16))
        pruner.steps = 2
        kept = (128 + int((second > 0).sum())) / 384
        assert float(pruner.penalty().detach()) == pytest.approx(((kept - 0.5) / 0.05) ** 2, rel=1e-5)
        every = torch.cat([first.flatten(), second.flatten()])
        pruner.finish()
        masks = torch.cat([pruner.masks[name]["weight"].flatten() for name in ("0", "3")])
        assert int((masks == 0).sum()) == 192
        assert every[masks == 0].max() <= every[masks == 1].min()


def test_errors() -> None:
    model = network()
    for kind in (RBPruner, L0Pruner):
        with pytest.raises(ConfigError, match="sparse_ratio"):
            kind(model, [{"op_names": ["0"], "sparse_threshold": 0.5}], training_steps=5)
        with pytest.raises(ConfigError, match="N:M"):
            kind(model, [{"op_names": ["0"], "granularity": "2:4"}], training_steps=5)
        with pytest.raises(ConfigError, match="width"):
            kind(model, CONFIG, training_steps=5, width=0.0)
        with pytest.raises(ConfigError, match="seed"):
            kind(model, CONFIG, training_steps=5, seed=-1)
    with pytest.raises(ConfigError, match="prior"):
        RBPruner(model, CONFIG, training_steps=5, prior=-1.0)
    with pytest.raises(ConfigError, match="first_closed"):
        L0Pruner(model, CONFIG, training_steps=5, first_closed=1.0)
