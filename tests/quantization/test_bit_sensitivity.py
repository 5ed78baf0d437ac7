"""Traces of Hessians and rounding errors against float64 references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.quantization import NumberFormat
from dwindle.quantization.mixed_precision.layers import Structure, examine
from dwindle.quantization.mixed_precision.perturbation import activation_errors, rounding_error
from dwindle.quantization.mixed_precision.sensitivity import (
    Estimates,
    Options,
    kept_batches,
    own_distribution,
    own_outputs,
    traces,
)
from dwindle.quantization.observers import MinMaxObserver

UINT8 = NumberFormat.parse("uint8", "affine")


class Curved(nn.Module):
    """Two layers that read one value, one behind them; normalization that is folded away; a smooth bend."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, 2, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.left, self.right = nn.Linear(12, 2), nn.Linear(12, 2)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x))).flatten(1)
        return self.head(torch.tanh(self.left(x)) * torch.tanh(self.right(x)))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    model = Curved().double()
    model.norm.running_mean.uniform_(-0.5, 0.5)
    model.norm.running_var.uniform_(0.5, 1.5)
    return model.eval()


def batches(count: int = 1) -> list[Any]:
    torch.manual_seed(1)
    return [
        ((torch.randn(5, 1, 3, 3, dtype=torch.float64),), {}, torch.randint(0, 3, (5,))) for _ in range(count)
    ]


def structure_of(model: nn.Module, batch: Any) -> Structure:
    return examine(model, (batch[0], batch[1]), None, "layers", UINT8)


def exact_traces(structure: Structure, batch: Any, loss: Any) -> list[float]:
    """The trace of each weight's own Hessian in the folded model."""
    (x,), _, target = batch
    found = []
    for layer in structure.layers:
        weight = structure.model.get_parameter(layer.name).detach()

        def of(value: Tensor, name: str = layer.name) -> Tensor:
            outputs = functional_call(structure.model, {name: value}, (x,))
            return loss(outputs) if target is None else loss(outputs, target)

        hessian = torch.autograd.functional.hessian(of, weight).reshape(weight.numel(), -1)
        found.append(float(hessian.diagonal().sum()))
    return found


def test_one_direction_gives_the_product_with_the_exact_hessian(net: nn.Module) -> None:
    (batch,) = batches()
    structure = structure_of(net, batch)
    names = [layer.name for layer in structure.layers]
    assert names == ["first.weight", "left.weight", "right.weight", "head.weight"]
    weights = [structure.model.get_parameter(name).detach() for name in names]
    sizes = [own.numel() for own in weights]

    def loss(flat: Tensor) -> Tensor:
        pieces = zip(names, flat.split(sizes), weights, strict=True)
        parts = {name: piece.reshape(weight.shape) for name, piece, weight in pieces}
        return nn.functional.cross_entropy(functional_call(structure.model, parts, batch[0]), batch[2])

    hessian = torch.autograd.functional.hessian(loss, torch.cat([own.flatten() for own in weights]))
    generator = torch.Generator().manual_seed(3)
    signs = torch.cat(
        [(torch.randint(0, 2, w.shape, generator=generator) * 2 - 1).flatten() for w in weights]
    )
    products = (signs * (hessian @ signs.double())).split(sizes)
    found = traces(structure, [batch], Options(probes=2, seed=3, tolerance=1e9))
    again = traces(structure, [batch], Options(probes=2, seed=3, tolerance=1e9))
    assert torch.equal(found.layers, again.layers)
    second = torch.cat(
        [(torch.randint(0, 2, w.shape, generator=generator) * 2 - 1).flatten() for w in weights]
    )
    more = (second * (hessian @ second.double())).split(sizes)
    expected = torch.stack([(a.sum() + b.sum()) / 2 for a, b in zip(products, more, strict=True)])
    assert torch.allclose(found.layers, expected, rtol=1e-9, atol=1e-12)
    exact = torch.stack([own.sum() for own in hessian.diagonal().split(sizes)])
    assert exact.tolist() == pytest.approx(exact_traces(structure, batch, nn.functional.cross_entropy))


def test_the_estimate_stops_when_it_has_settled(net: nn.Module) -> None:
    many = batches(3)
    structure = structure_of(net, many[0])
    loose = traces(structure, many, Options(probes=500, tolerance=1.0))
    assert loose.settled
    assert 10 <= loose.probes < 500
    tight = traces(structure, many, Options(probes=12, tolerance=1e-9))
    assert not tight.settled
    assert tight.probes == 12
    again = traces(structure, many, Options(probes=12, tolerance=1e-9))
    assert torch.equal(tight.layers, again.layers)


def test_every_batch_is_seen_even_with_fewer_directions(net: nn.Module) -> None:
    many = batches(7)
    assert traces(structure_of(net, many[0]), many, Options(probes=3, tolerance=1.0)).probes == 7


@pytest.mark.parametrize("loss", [own_distribution, own_outputs])
def test_losses_without_labels_are_flat_where_the_model_is_and_never_bend_down(
    net: nn.Module, loss: Any
) -> None:
    (batch,) = batches()
    structure = structure_of(net, batch)
    outputs = structure.model(*batch[0]).requires_grad_()
    (slope,) = torch.autograd.grad(loss(outputs), outputs)
    assert float(slope.detach().abs().max()) < 1e-15
    exact = exact_traces(structure, (batch[0], {}, None), loss)
    assert min(exact) >= 0
    found = traces(structure, [(batch[0], {}, None)], Options(loss.__name__, probes=80, tolerance=0.03))
    wanted = torch.tensor(exact, dtype=torch.float64)
    assert bool(((found.layers - wanted).abs() <= 5 * found.layer_errors + 1e-12).all())


def test_the_curvature_of_the_own_distribution_is_gauss_newton(net: nn.Module) -> None:
    (batch,) = batches()
    structure = structure_of(net, batch)
    x, weight = batch[0][0], structure.model.get_parameter("head.weight").detach()
    jacobian = torch.autograd.functional.jacobian(
        lambda own: functional_call(structure.model, {"head.weight": own}, (x,)), weight
    ).reshape(len(x), 3, -1)
    chances = structure.model(x).softmax(-1).detach()
    inner = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None, :]
    expected = torch.einsum("bip,bij,bjp->", jacobian, inner, jacobian) / len(x)
    assert exact_traces(structure, (batch[0], {}, None), own_distribution)[-1] == pytest.approx(
        float(expected)
    )


def test_traces_of_what_layers_read(net: nn.Module) -> None:
    (batch,) = batches()
    structure = structure_of(net, batch)
    assert len(structure.activations) == 3  # the picture, what left and right read, what the head reads
    found = traces(structure, [batch], Options(probes=100, tolerance=0.02), activations=True)
    model, (x,), target = structure.model, batch[0], batch[2]
    middle = torch.tanh(model.norm(model.first(x))).flatten(1).detach()

    def behind(value: Tensor) -> Tensor:
        both = torch.tanh(model.left(value)) * torch.tanh(model.right(value))
        return nn.functional.cross_entropy(model.head(both), target)

    size = middle.numel()
    exact = torch.autograd.functional.hessian(behind, middle).reshape(size, size).diagonal().sum()
    assert abs(found.activations[1] - float(exact)) <= 5 * found.activation_errors[1]


def test_estimates_are_means_with_standard_errors() -> None:
    values = torch.randn(50, 3, dtype=torch.float64)
    found = Estimates(3)
    for row in values:
        found.add(row)
    assert torch.allclose(found.mean, values.mean(0))
    assert torch.allclose(found.standard_error, values.std(0) / 50**0.5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, None])
def test_rounding_errors_against_the_formula(bits: int, axis: int | None) -> None:
    weight = torch.randn(5, 7)
    top = 2 ** (bits - 1) - 1
    rows = weight.double() if axis == 0 else weight.double().reshape(1, -1)
    total = 0.0
    for row in rows:
        scale = float((row.abs().max() / top).float())
        total += sum((scale * min(max(round(float(x) / scale), -top), top) - float(x)) ** 2 for x in row)
    found = rounding_error(weight, axis, NumberFormat.parse(f"int{bits}", "symmetric"))
    assert found == pytest.approx(total / weight.numel(), rel=1e-4)


def test_errors_of_what_layers_read_against_the_formula(net: nn.Module) -> None:
    many = batches(2)
    structure = structure_of(net, many[0])
    found = activation_errors(structure, many, [3], MinMaxObserver)[0][3]
    x = torch.cat([own[0][0] for own in many]).double()
    scale = float((x.max() - x.min()).float() / 7)
    zero = round(-float(x.min()) / scale)
    rounded = ((x / scale).round() + zero).clamp(0, 7).sub(zero) * scale
    assert found == pytest.approx(float((rounded - x).square().mean()), rel=1e-4)


def test_bad_data_is_refused(net: nn.Module) -> None:
    x, y = torch.randn(2, 1, 3, 3, dtype=torch.float64), torch.tensor([0, 1])
    with pytest.raises(ConfigError, match="not finite"):
        kept_batches(net, [(x * float("nan"), y)], Options(), None, None)
    with pytest.raises(ConfigError, match="ended after 1 of 2"):
        kept_batches(net, [(x, y)], Options(), 2, None)
    with pytest.raises(ConfigError, match="target"):
        kept_batches(net, [x], Options(), None, None)
    assert len(kept_batches(net, [x], Options("own_outputs"), None, None)) == 1
    with pytest.raises(ConfigError, match="did you mean 'own_outputs'"):
        Options("own_output")
    with pytest.raises(DwindleError, match="loss is nan"):
        traces(
            structure_of(net, ((x,), {}, y)), [((x,), {}, y)], Options(lambda a, b: a.sum() * float("nan"))
        )
