"""Taylor importance against its formulas: gradients by autograd and by finite differences, gates, samples."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dwindle as dw
from dwindle.config import Granularity
from dwindle.config.errors import ConfigError
from dwindle.pruning import TaylorPruner
from dwindle.pruning.taylor import taylor_of_weights
from dwindle.training import compress
from pruning.models import Residual, Simple, lively

CONFIG = [{"op_names": ["0"], "sparse_ratio": 0.5, "granularity": "out_channel"}]
Batch = tuple[Tensor, Tensor]


def batches(shape: tuple[int, ...], classes: int, count: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(shape, generator=generator, dtype=torch.float64),
            torch.randint(0, classes, (shape[0],), generator=generator),
        )
        for _ in range(count)
    ]


def network() -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(54, 4)]
    model = nn.Sequential(*layers).double()
    lively(model)
    return model.eval()


def metric_of(pruner: TaylorPruner, name: str = "0.weight") -> np.ndarray:
    target = next(target for target in pruner.plan.goals if target.path == name)
    weight = dict(pruner.model.named_parameters())[name].detach()
    return pruner.metric(target, weight, pruner.plan.goals[target].granularity).numpy()


def gone(mask: Tensor) -> list[int]:
    return (mask.reshape(mask.shape[0], -1) == 0).all(1).nonzero().flatten().tolist()


def lowest(scores: np.ndarray, count: int) -> list[int]:
    return sorted(np.argsort(scores, kind="stable")[:count].tolist())


@pytest.mark.parametrize("joint", [False, True])
def test_weights(joint: bool) -> None:
    """Mean over batches of sum (g w)^2, or (sum g w)^2, of each filter, with numpy loops."""
    model, data = network(), batches((5, 2, 5, 5), 4)
    expected = np.zeros(6)
    for x, y in data:
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), [model[0].weight])
        for channel in range(6):
            products = [
                float(g * w)
                for g, w in zip(
                    gradient[channel].flatten(), model[0].weight.detach()[channel].flatten(), strict=True
                )
            ]
            expected[channel] += (sum(products) ** 2 if joint else sum(p**2 for p in products)) / len(data)
    pruner = TaylorPruner(model, CONFIG, data=data, joint=joint)
    _, masks = pruner.compress()
    np.testing.assert_allclose(metric_of(pruner), expected, rtol=1e-10)
    assert gone(masks["0"]["weight"]) == lowest(expected, 3)


def test_single_weights_and_blocks_of_the_pure_function() -> None:
    weight, gradient = torch.randn(4, 6), torch.randn(4, 6)
    product = (weight * gradient).double().numpy()
    element = taylor_of_weights(weight, gradient, Granularity("element"))
    np.testing.assert_allclose(element.numpy(), product**2, rtol=1e-5)
    tiles = product.reshape(2, 2, 2, 3).transpose(0, 2, 1, 3).reshape(2, 2, 6)
    blocks = Granularity("blocks", kernel=(2, 3))
    np.testing.assert_allclose(taylor_of_weights(weight, gradient, blocks), (tiles**2).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(
        taylor_of_weights(weight, gradient, blocks, joint=True), tiles.sum(-1) ** 2, rtol=1e-4
    )


def test_gates_by_finite_differences() -> None:
    """The loss's derivative to a factor on what the next layer reads of a channel, squared, a mean over batches."""
    model, data = network(), batches((5, 2, 5, 5), 4)

    def loss(x: Tensor, y: Tensor, channel: int, factor: float) -> float:
        maps = model[:3](x).detach().clone()
        maps[:, channel] *= factor
        return float(nn.functional.cross_entropy(model[3:](maps), y).detach())

    step = 1e-5
    expected = np.array(
        [
            np.mean([((loss(*b, c, 1 + step) - loss(*b, c, 1 - step)) / (2 * step)) ** 2 for b in data])
            for c in range(6)
        ]
    )
    pruner = TaylorPruner(model, CONFIG, (data[0][0],), data=data, on="gates")
    _, masks = pruner.compress()
    np.testing.assert_allclose(metric_of(pruner), expected, rtol=1e-6)
    assert gone(masks["0"]["weight"]) == lowest(expected, 3)


def test_a_gate_on_a_relu_is_the_joint_importance_of_norm_weights() -> None:
    """As the paper says of a gate behind BatchNorm: sum of g w over its scale and shift."""
    model, data = network(), batches((5, 2, 5, 5), 4)
    pruner = TaylorPruner(model, CONFIG, (data[0][0],), data=data, on="gates")
    pruner.prepare()
    expected = torch.zeros(6, dtype=torch.float64)
    for x, y in data:
        parameters = [model[1].weight, model[1].bias]
        gradients = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters)
        expected += sum(g * p for g, p in zip(gradients, parameters, strict=True)).square() / len(data)
    np.testing.assert_allclose(metric_of(pruner), expected.detach().numpy(), rtol=1e-9)


@pytest.mark.parametrize("own", [False, True], ids=["as read", "own output"])
def test_outputs_sample_by_sample(own: bool) -> None:
    """Mean over samples of |mean over places of g a| (2016, equation 8), one sample after the other."""
    model, data = network(), batches((5, 2, 5, 5), 4)
    expected, samples = np.zeros(6), 0
    for x, y in data:
        for one, label in zip(x.split(1), y.split(1), strict=True):
            maps = model[:1](one) if own else model[:3](one)
            maps = maps.detach().requires_grad_(True)
            rest = model[1:] if own else model[3:]
            loss = nn.functional.cross_entropy(rest(maps.clone()), label)
            (gradient,) = torch.autograd.grad(loss, [maps])
            expected += (gradient * maps).mean((0, 2, 3)).abs().detach().numpy()
            samples += 1
    inputs = None if own else (data[0][0],)
    pruner = TaylorPruner(model, CONFIG, inputs, data=data, on="outputs")
    pruner.prepare()
    np.testing.assert_allclose(metric_of(pruner), expected / samples, rtol=1e-9)


def test_gates_change_nothing_and_leave_nothing() -> None:
    model, data = network(), batches((5, 2, 5, 5), 4)
    outputs = model(data[0][0]).detach().clone()
    pruner = TaylorPruner(model, CONFIG, (data[0][0],), training_steps=2, on="gates")
    with compress(model, [pruner]):
        assert torch.equal(model(data[0][0]), outputs)
    assert torch.equal(model(data[0][0]), outputs)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_gates_of_accumulated_batches_are_one_gate() -> None:
    means = []
    whole = batches((4, 2, 5, 5), 4, 2)
    parts = [(x[half], y[half]) for x, y in whole for half in (slice(0, 2), slice(2, 4))]
    for data, accumulate in ((whole, 1), (parts, 2)):
        model = network()
        model.train()
        model[1].eval()
        pruner = TaylorPruner(model, CONFIG, (data[0][0],), training_steps=9, on="gates")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with compress(model, [pruner]) as run:
            for number, (x, y) in enumerate(data, 1):
                (nn.functional.cross_entropy(model(x), y) / accumulate).backward()
                if number % accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                    run.step()
            means.append(metric_of(pruner))
    np.testing.assert_allclose(means[1], means[0], rtol=1e-9)


def test_scaled_losses_that_overflow_are_left_out_while_training() -> None:
    """A gradient scaler skips such a step; its gates must not spoil what follows."""
    model, data = network(), batches((4, 2, 5, 5), 4, 3)
    model.train()
    pruner = TaylorPruner(model, CONFIG, (data[0][0],), training_steps=2, on="gates")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with compress(model, [pruner]) as run:
        for number, (x, y) in enumerate(data):
            loss = nn.functional.cross_entropy(model(x), y)
            (loss * float("inf") if number == 1 else loss).backward()
            if number != 1:
                optimizer.step()
                run.step()
            optimizer.zero_grad()
    assert int((model[0].weight == 0).flatten(1).all(1).sum()) == 3


@pytest.mark.parametrize("on", ["weights", "gates", "outputs"])
@pytest.mark.parametrize("build", [Simple, Residual])
def test_coupled_channels_go_together_and_are_cut(on: Any, build: type[nn.Module]) -> None:
    torch.manual_seed(3)
    images = 1 if build is Simple else 3
    last = "fc2" if build is Simple else "head"
    model = lively(build()).eval()
    data = [(x.float(), y) for x, y in batches((4, images, 8, 8), 5)]
    config = [{"op_types": ["Conv2d", "Linear"], "exclude_op_names": [last], "sparse_ratio": 0.5}]
    pruner = TaylorPruner(model, config, (data[0][0],), data=data, on=on)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, masks = pruner.compress()
    pairs = (("conv2", "conv3"),) if build is Simple else (("stem", "project"), ("expand", "depthwise"))
    for first, second in pairs:
        assert gone(masks[first]["weight"]) == gone(masks[second]["weight"])
        assert (masks[first]["weight"] == 0).double().mean() == 0.5
    masked = model(data[0][0])
    result = dw.realize(model, example_inputs=(data[0][0],))
    assert result.verification is not None
    assert result.verification.proven
    torch.testing.assert_close(result.model(data[0][0]), masked, rtol=1e-4, atol=1e-5)


def test_single_weights_to_one_element_and_a_global_ranking() -> None:
    model, data = network(), batches((5, 2, 5, 5), 4)
    _, masks = TaylorPruner(
        copy.deepcopy(model),
        [{"op_names": ["0"], "sparse_ratio": 0.37, "granularity": "element"}],
        data=data,
    ).compress()
    assert int((masks["0"]["weight"] == 0).sum()) == int(0.37 * 108)
    config = [{"op_names": ["0", "4"], "sparse_ratio": 0.5, "granularity": "element", "global_group_id": 1}]
    _, masks = TaylorPruner(model, config, data=data).compress()
    assert sum(int((own["weight"] == 0).sum()) for own in masks.values()) == (108 + 216) // 2


def test_normalized_by_layer() -> None:
    model, data = network(), batches((5, 2, 5, 5), 4)
    plain, normal = (TaylorPruner(model, CONFIG, data=data, normalize=n) for n in (False, True))
    plain.prepare()
    normal.prepare()
    expected = metric_of(plain) / np.sqrt((metric_of(plain) ** 2).sum())
    np.testing.assert_allclose(metric_of(normal), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "entry", "words"),
    [
        ({"on": "weight"}, {}, "did you mean 'weights'"),
        ({"on": "gates", "joint": True}, {}, "joint"),
        ({"on": "gates"}, {"granularity": "element"}, "belong to channels"),
    ],
)
def test_mistakes(options: dict[str, Any], entry: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TaylorPruner(network(), [{**CONFIG[0], **entry}], data=[], **options)
