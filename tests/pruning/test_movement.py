"""Movement pruning against the paper's formulas, written out in NumPy and by finite differences."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dwindle as dw
from dwindle.config import Granularity
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.pruning import MovementPruner
from dwindle.simulate import straight_through
from dwindle.training import compress
from pruning.models import Attention, Residual, lively
from pruning.training_runs import check_resume, classes, network, train, zeros

BLOCKS = {
    "element": (Granularity("element"), (4, 6)),
    "blocks": (Granularity("blocks", kernel=(2, 3)), (4, 6)),
    "rows": (Granularity("channel", axis=0), (4, 6)),
    "columns": (Granularity("channel", axis=1), (4, 6)),
    "grouped": (Granularity("channel", axis=1, groups=2), (4, 3, 2, 2)),
}


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_the_score_has_the_gradient_of_the_mask(kind: str) -> None:
    """Finite differences of a loss over the mask, each block of which is moved by itself."""
    granularity, shape = BLOCKS[kind]
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    grid = granularity.block_shape(shape)
    blocks = (torch.rand(grid, generator=generator) > 0.4).double()

    def loss(mask: Tensor) -> Tensor:
        return torch.sin(weight * granularity.expand(mask, shape)).square().sum()

    score = torch.randn(grid, generator=generator, dtype=torch.float64, requires_grad=True)
    trained = weight.clone().requires_grad_()
    value = straight_through(trained, score, granularity.compact(blocks, shape), granularity)
    assert torch.equal(value, weight * granularity.expand(blocks, shape))
    torch.sin(value).square().sum().backward()
    expected = torch.zeros(grid, dtype=torch.float64)
    for index in np.ndindex(*grid):
        moved = torch.zeros(grid, dtype=torch.float64)
        moved[index] = 1e-5
        expected[index] = (loss(blocks + moved) - loss(blocks - moved)) / 2e-5
    assert score.grad is not None
    torch.testing.assert_close(score.grad, expected, rtol=1e-7, atol=1e-8)
    masked = granularity.expand(blocks, shape)
    assert trained.grad is not None
    torch.testing.assert_close(trained.grad, torch.sin(2 * weight * masked) * masked)


def reference(steps: int, ratio: float, warmup: int, cooldown: int, rate: float) -> list[np.ndarray]:
    """Hard movement of one linear layer under a squared error, step by step: the masks after each."""
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(32, 6)), generator.normal(size=(32, 5))
    weight, score, mask = generator.normal(size=(5, 6)), np.zeros((5, 6)), np.ones((5, 6))
    masks = []
    for step in range(1, steps + 1):
        gradient = 2 * ((x @ (weight * mask).T) - y).T @ x / y.size  # of the masked weight
        score_gradient = gradient * weight
        weight = weight - rate * gradient * mask
        score = score - rate * score_gradient
        share = np.clip((step - warmup) / (steps - warmup - cooldown), 0, 1)
        count = int(30 * ratio * (1 - (1 - share) ** 3) + 1e-9)
        mask = np.ones(30)
        mask[np.argsort(score.ravel(), kind="stable")[:count]] = 0
        mask = mask.reshape(5, 6)
        masks.append(mask)
    return masks


def test_hard_movement_step_by_step() -> None:
    steps, ratio, warmup, cooldown, rate = 30, 0.63, 4, 6, 0.2
    generator = np.random.default_rng(0)
    x, y = (torch.from_numpy(generator.normal(size=(32, width))) for width in (6, 5))
    model = nn.Linear(6, 5, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(generator.normal(size=(5, 6))))
    pruner = MovementPruner(
        model,
        [{"op_types": ["Linear"], "sparse_ratio": ratio}],
        training_steps=steps,
        warmup_steps=warmup,
        cooldown_steps=cooldown,
    )
    expected = reference(steps, ratio, warmup, cooldown, rate)
    with compress(model, [pruner]) as run:
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)  # made inside: the scores are in already
        assert run.add_parameters_to(optimizer) == 0
        for step in range(steps):
            optimizer.zero_grad()
            functional.mse_loss(model(x), y).backward()
            optimizer.step()
            run.step()
            assert np.array_equal(pruner.masks[""]["weight"].numpy(), expected[step]), step
    assert zeros(model, "weight") == int(30 * ratio)
    assert pruner.finished
    assert model.weight.dtype == torch.float64


def test_soft_movement_has_its_penalty_and_its_threshold() -> None:
    model = network()
    pruner = MovementPruner(
        model,
        [{"op_names": ["0", "3"], "sparse_threshold": 0.45}],
        training_steps=20,
        regular_scale=3.0,
        learning_rate=20.0,
    )
    seen = []

    def watch(step: int) -> None:
        share = 1 - (1 - step / 20) ** 3
        scores = [simulator.score.detach().double().numpy() for simulator in pruner.simulators.values()]
        sigmoids = [1 / (1 + np.exp(-score)) for score in scores]
        if step < 20:
            expected = 3.0 * share * np.mean([sigmoid.mean() for sigmoid in sigmoids])
            loss = pruner.loss()
            assert isinstance(loss, Tensor)
            assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
            own = torch.autograd.grad(loss, next(iter(pruner.parameters())))[0]
            slope = 3.0 * share / 2 / scores[0].size * sigmoids[0] * (1 - sigmoids[0])
            np.testing.assert_allclose(own.numpy(), slope, rtol=1e-4, atol=1e-10)
        else:
            assert pruner.loss() == 0.0
        for sigmoid, masks in zip(sigmoids, (pruner.masks["0"], pruner.masks["3"]), strict=True):
            assert np.array_equal(masks["weight"].numpy() == 0, sigmoid < 0.45 * share)
        seen.append(float((pruner.masks["3"]["weight"] == 0).float().mean()))

    train(model, pruner, 20, watch=watch)
    assert 0 < seen[-1] < 1
    assert seen[0] == 0


@pytest.mark.parametrize("granularity", [[4, 4], "2:4", "element"])
def test_blocks_reach_their_ratio_exactly(granularity: object) -> None:
    model = network()
    ratio = 0.5
    config = [{"op_names": ["0", "3"], "sparse_ratio": ratio, "granularity": granularity}]
    pruner = MovementPruner(model, config, training_steps=12, warmup_steps=2, interval_steps=3)
    losses = train(model, pruner, 20)
    assert losses[-1] < losses[0]
    assert zeros(model, "0.weight") == 16 * 8 / 2
    assert zeros(model, "3.weight") == 16 * 16 / 2
    if granularity == [4, 4]:
        blocks = model[3].weight.reshape(4, 4, 4, 4).abs().sum((1, 3))
        assert int((blocks == 0).sum()) == 8


def test_channels_are_realized_with_proof() -> None:
    model = lively(Residual())
    x = torch.randn(8, 3, 6, 6)
    pruner = MovementPruner(
        model,
        [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "granularity": "out_channel"}],
        (x,),
        training_steps=6,
        warmup_steps=1,
    )
    train(model, pruner, 8, batch=(x, torch.arange(8) % 5), rate=0.05)
    assert {row.target: row.achieved for row in pruner.report().rows}["stem.weight"] == 0.5
    result = dw.realize(model, (x,))
    assert result.verification.max_difference < 1e-9
    assert result.model.stem.out_channels == 4
    assert result.model.expand.out_channels == 8


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    def make(model: nn.Module) -> MovementPruner:
        config = [{"op_names": ["0", "3"], "sparse_ratio": 0.5}]
        return MovementPruner(model, config, training_steps=20, warmup_steps=3, learning_rate=0.1)

    check_resume(make, tmp_path / "state")


def test_scores_that_no_optimizer_trains_are_an_error() -> None:
    model = network()
    x, y = classes()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pruner = MovementPruner(model, [{"op_names": ["3"], "sparse_ratio": 0.5}], training_steps=50)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train_weights_only() -> None:
        with compress(model, [pruner]) as run:
            for _ in range(50):
                functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                run.step()

    with pytest.raises(DwindleError, match="add_parameters_to"):
        train_weights_only()
    assert pruner.steps == 10
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_masks_of_before_stay_and_a_failure_puts_them_back() -> None:
    model = network()
    dw.pruning.LevelPruner(model, [{"op_names": ["3"], "sparse_ratio": 0.25}]).compress()
    first = dw.simulate.get_masks(model)
    earlier = next(iter(first.values())).clone()
    pruner = MovementPruner(model, [{"op_names": ["3"], "sparse_ratio": 0.5}], training_steps=5)
    train(model, pruner, 5)
    assert bool((model[3].weight[earlier == 0] == 0).all())
    assert zeros(model, "3.weight") == 128


def test_leaving_early_warns_and_keeps_what_stands() -> None:
    model = network()
    pruner = MovementPruner(model, [{"op_names": ["3"], "sparse_ratio": 0.5}], training_steps=10)
    with pytest.warns(UserWarning, match="5 of 10 steps"):
        train(model, pruner, 5)
    share = 1 - (1 - 0.5) ** 3
    assert zeros(model, "3.weight") == int(256 * 0.5 * share)
    assert type(model[3]) is nn.Linear
    assert not [name for name, _ in model.named_parameters() if "_dwindle" in name]


def test_bad_arguments() -> None:
    model = network()
    config = [{"op_names": ["3"], "sparse_ratio": 0.5}]
    with pytest.raises(ConfigError, match="training_steps"):
        MovementPruner(model, config, training_steps=0)
    with pytest.raises(ConfigError, match="leave none"):
        MovementPruner(model, config, training_steps=10, warmup_steps=4, cooldown_steps=6)
    with pytest.raises(ConfigError, match="sparse_ratio"):
        MovementPruner(model, [{"op_names": ["3"], "sparse_ratio": 1.5}], training_steps=10)
    with pytest.raises(ConfigError, match="learning_rate"):
        MovementPruner(model, config, training_steps=10, learning_rate=0.0)


def test_scores_that_are_not_finite_change_no_mask() -> None:
    model = network()
    pruner = MovementPruner(model, [{"op_names": ["3"], "sparse_ratio": 0.5}], training_steps=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, pruner, 4)
    with compress(model, [pruner]):
        before = pruner.masks["3"]["weight"].clone()
        with torch.no_grad():
            next(iter(pruner.parameters())).fill_(torch.nan)
        with pytest.raises(DwindleError, match="not a number"):
            pruner.step()
        assert torch.equal(pruner.masks["3"]["weight"], before)


def test_whole_heads_by_movement() -> None:
    """Scores of the rows of queries, keys and values add up to one for each head; half of the heads go."""
    torch.manual_seed(4)
    model = lively(Attention())
    x = torch.randn(4, 5, 24)
    names = ["query", "key", "value"]
    config = [{"op_names": names, "sparse_ratio": 0.5, "granularity": "out_channel", "axes": ["heads"]}]
    pruner = MovementPruner(model, config, (x,), training_steps=4, learning_rate=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with compress(model, [pruner]) as run:
        run.add_parameters_to(optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            functional.mse_loss(model(x), x.flip(1)).backward()
            optimizer.step()
            run.step()
        total = sum(score.detach().double() for score in pruner.scores().values())
        assert isinstance(total, Tensor)
        heads = total.reshape(4, 6).sum(1)
        kept = torch.stack([pruner.masks[name]["weight"][:, 0].reshape(4, 6).amax(1) for name in names])
    assert torch.equal(kept.amin(0), kept.amax(0))
    assert torch.equal(kept[0] > 0, heads >= heads.sort().values[2])
    result = dw.realize(model, (x,))
    assert result.verification.max_difference < 1e-9
    assert result.model.query.out_features == 12
    assert result.model.heads == 2
