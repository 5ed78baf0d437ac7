"""Importances over everything that shares an axis, against float64 references of their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dwindle as dw
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.graph import analyse
from dwindle.pruning.activation_energy import Activation, read_energy
from dwindle.pruning.axis_importance import AxisImportance, GroupNorm, WeightImportance
from dwindle.pruning.importance import l1
from dwindle.pruning.measured import Fisher, Hessian, Outputs, Taylor
from dwindle.pruning.named_importances import AXIS_IMPORTANCES, importance_of
from dwindle.pruning.shared_axes import SharedAxis, shared_axes

MEASURED = ("taylor", "fisher", "hessian", "outputs", "activation")


class Network(nn.Module):
    """A stage of six channels: stem, norm and branch write it; the branch, a depthwise layer and the head share it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.branch = nn.Conv2d(6, 6, 3, padding=1)
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.inner = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.deep(x + self.branch(x)))
        return self.head(torch.relu(self.inner(x.mean((2, 3)))))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test begins with the same numbers."""
    torch.manual_seed(0)


def network() -> Network:
    model = Network().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.norm.running_var.uniform_(0.5, 2.0)
    return model


def labelled(count: int = 6, size: int = 3) -> list[tuple[Tensor, Tensor]]:
    images, labels = torch.randn(count, 2, 4, 4, dtype=torch.float64), torch.arange(count) % 3
    return [(images[at : at + size], labels[at : at + size]) for at in range(0, count, size)]


def axes_of(model: nn.Module) -> tuple[SharedAxis, SharedAxis]:
    """The stage's axis (read by branch and inner) and the inner axis (read by the head)."""
    analysis = analyse(model, (labelled()[0][0],))
    axes = shared_axes(model, analysis, analysis.selected())
    stage = next(axis for axis in axes if axis.size == 6)
    return stage, next(axis for axis in axes if axis.size == 8)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: own.detach() for name, own in model.named_parameters()}


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def gated_loss(model: Network, batch: tuple[Tensor, Tensor], stage: Tensor, inner: Tensor) -> Tensor:
    """The same network with a gate on what each reader of the two axes gets."""
    x = torch.relu(model.norm(model.stem(batch[0])))
    x = torch.relu(model.deep(x + model.branch(x * stage[:, None, None])))
    y = torch.relu(model.inner(x.mean((2, 3)) * stage))
    return nn.functional.cross_entropy(model.head(y * inner), batch[1])


def gate_gradients(model: Network, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    gates = [torch.ones(size, dtype=torch.float64, requires_grad=True) for size in (6, 8)]
    return list(torch.autograd.grad(gated_loss(model, batch, *gates), gates))


def measured(importance: AxisImportance, model: nn.Module, data: Any) -> list[Tensor]:
    axes = axes_of(model)
    importance.measure(model, axes, data, nn.functional.cross_entropy)
    return [importance.of_axis(axis, values(model)) for axis in axes]


def test_who_reads_and_who_is_only_added() -> None:
    stage, inner = axes_of(network())
    assert {(place.name, place.dim) for place in stage.gated} == {("branch.weight", 1), ("inner.weight", 1)}
    shifts = {place.name for place in stage.places if place.shifts}
    assert shifts == {"norm.bias", "branch.bias", "deep.bias"}
    assert {place.name for place in inner.places} == {"inner.weight", "inner.bias", "head.weight"}
    assert not any("running" in place.name for place in stage.places)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_group_norm_sums_everything_that_goes(power: float) -> None:
    model = network()
    stage = axes_of(model)[0]
    weights = [model.stem.weight, model.norm.weight, model.branch.weight, model.deep.weight]
    reading = [model.branch.weight.movedim(1, 0), model.inner.weight.movedim(1, 0)]
    expected = torch.stack([own.abs().pow(power).reshape(6, -1).sum(1) for own in (*weights, *reading)]).sum(
        0
    )
    torch.testing.assert_close(
        GroupNorm(power=power, normalize="none").of_axis(stage, values(model)), expected
    )
    relative = GroupNorm(power=power).of_axis(stage, values(model))
    torch.testing.assert_close(relative, expected / expected.mean())


def test_reduce_and_normalize_say_what_is_added_and_divided() -> None:
    model = network()
    inner = axes_of(model)[1]
    first, second = (l1(own, dim) for own, dim in ((model.inner.weight, 0), (model.head.weight, 1)))
    tensors = values(model)
    for reduce, expected in (
        ("sum", first + second),
        ("mean", (first + second) / 2),
        ("max", torch.maximum(first, second)),
    ):
        own = WeightImportance(l1, reduce=reduce, normalize="none").of_axis(inner, tensors)
        torch.testing.assert_close(own, expected)
    default = WeightImportance(l1).of_axis(inner, tensors)
    torch.testing.assert_close(default, (first / first.mean() + second / second.mean()) / 2)
    with pytest.raises(ConfigError, match="normalize: 'axes' is not one of weight, axis, none"):
        WeightImportance(l1, normalize="axes")  # type: ignore[arg-type]


def test_taylor_is_the_squared_derivative_at_a_gate_of_each_batch() -> None:
    model, data = network(), labelled()
    found = measured(Taylor(normalize="none"), model, data)
    expected = [
        torch.stack(own).square().mean(0)
        for own in zip(*(gate_gradients(model, b) for b in data), strict=True)
    ]
    for own, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(own, wanted)


def test_a_gate_on_the_readers_agrees_with_finite_differences() -> None:
    model, data = network(), labelled(3)
    found = measured(Taylor(normalize="none"), model, data)[1]
    step = 1e-6
    for index in range(8):
        gate = torch.ones(8, dtype=torch.float64)
        gate[index] += step
        high = gated_loss(model, data[0], torch.ones(6, dtype=torch.float64), gate)
        gate[index] -= 2 * step
        low = gated_loss(model, data[0], torch.ones(6, dtype=torch.float64), gate)
        derivative = float((high - low).detach()) / (2 * step)
        assert float(found[index]) == pytest.approx(derivative**2, rel=1e-4, abs=1e-12)


def test_fisher_takes_each_sample_alone() -> None:
    model, data = network(), labelled()
    singles = [(x[None], y[None]) for batch in data for x, y in zip(*batch, strict=True)]
    found = measured(Fisher(normalize="none"), model, data)
    expected = [
        torch.stack(own).square().mean(0)
        for own in zip(*(gate_gradients(model, b) for b in singles), strict=True)
    ]
    for own, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(own, wanted)


def test_hessian_sums_half_h_w_squared_over_all_parameters() -> None:
    model, data = network(), labelled()
    inner = axes_of(model)[1]
    found = measured(Hessian(normalize="none"), model, data)[1]
    wanted = [model.inner.weight, model.inner.bias, model.head.weight]
    squares = [torch.zeros_like(own) for own in wanted]
    for batch in data:
        for x, y in zip(*batch, strict=True):
            for total, own in zip(
                squares, torch.autograd.grad(loss_of(model, (x[None], y[None])), wanted), strict=True
            ):
                total += own.square() / 6
    parts = [(h * w.detach().square() / 2) for h, w in zip(squares, wanted, strict=True)]
    torch.testing.assert_close(found, parts[0].sum(1) + parts[1] + parts[2].sum(0))
    assert len(inner.places) == 3


def test_outputs_estimate_the_squared_change_of_the_logits() -> None:
    model, data = network(), labelled(2, 2)
    inputs = [batch[0] for batch in data] * 400
    found = measured(Outputs(normalize="none"), model, inputs)[1]
    expected = torch.zeros(8, dtype=torch.float64)
    for sample in data[0][0]:
        jacobian = torch.autograd.functional.jacobian(
            lambda gate, x=sample: model.head(
                torch.relu(model.inner(torch.relu(model.deep(_before_deep(model, x[None]))).mean((2, 3))))
                * gate
            )[0],
            torch.ones(8, dtype=torch.float64),
        )
        centred = jacobian - jacobian.mean(0)
        expected += centred.square().sum(0) / 2
    torch.testing.assert_close(found, expected, rtol=0.15, atol=1e-12)


def _before_deep(model: Network, x: Tensor) -> Tensor:
    x = torch.relu(model.norm(model.stem(x)))
    return x + model.branch(x)


def test_activation_energy_is_the_error_of_leaving_an_input_out() -> None:
    model, data = network(), labelled()
    inputs = [batch[0] for batch in data]
    found = measured(Activation(normalize="none"), model, inputs)
    hidden = torch.cat(
        [torch.relu(model.inner(torch.relu(model.deep(_before_deep(model, x))).mean((2, 3)))) for x in inputs]
    )
    whole = hidden @ model.head.weight.T
    for index in range(8):
        without = hidden.clone()
        without[:, index] = 0
        error = (whole - without @ model.head.weight.T).square().sum(1).mean()
        torch.testing.assert_close(found[1][index], error.detach())
    centred = measured(Activation(centered=True, normalize="none"), model, inputs)[1]
    variance = hidden.var(0, unbiased=False) * model.head.weight.square().sum(0)
    torch.testing.assert_close(centred, variance.detach())


def test_read_energy_of_a_grouped_convolution() -> None:
    weight, moments = torch.randn(4, 3, 2, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    expected = torch.zeros(3, dtype=torch.float64)
    for group in range(2):
        for inner in range(3):
            own = weight[2 * group : 2 * group + 2, inner].square().sum()
            expected[inner] += own * moments[3 * group + inner]
    torch.testing.assert_close(read_energy(moments, weight, 1), expected)


@pytest.mark.parametrize("name", sorted(AXIS_IMPORTANCES))
@pytest.mark.parametrize("scope", ["local", "global"])
def test_every_importance_prunes_with_proof(name: str, scope: str) -> None:
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    data = labelled() if name in MEASURED else None
    result = dw.prune(model, labelled()[0][0], ratio=0.5, importance=name, data=data, scope=scope)
    assert result.verification is not None
    assert result.verification.max_difference < 1e-9
    assert model.inner.out_features + model.stem.out_channels < 14
    if scope == "local":
        assert (model.stem.out_channels, model.inner.out_features) == (3, 4)
    kept = [
        int(row)
        for row in range(8)
        if any(torch.equal(before["inner.bias"][row], own) for own in model.inner.bias)
    ]
    assert len(kept) == model.inner.out_features
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("importance", MEASURED)
def test_whole_blocks_are_scored_too(importance: str) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.outer(torch.relu(self.inner(x)))

    model = nn.Sequential(nn.Linear(5, 4), *(Residual() for _ in range(4)), nn.Linear(4, 3)).double()
    with torch.no_grad():
        model[2].outer.weight.mul_(1e-6)  # hardly does anything
        model[2].inner.weight.mul_(1e-6)
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 3
    weak = model[2]
    dw.prune(model, x[:2], ratio=0.25, axes=["block"], importance=importance, data=[(x, y)])
    assert all(module is not weak for module in model)
    assert sum(isinstance(module, Residual) for module in model) == 3


def test_frozen_models_gradients_and_modes_are_left_alone() -> None:
    model = network().train()
    model.stem.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    running = model.norm.running_mean.clone()
    axes = axes_of(model)
    Fisher().measure(model, axes, labelled(), nn.functional.cross_entropy)
    assert model.training
    assert model.norm.training
    assert not model.stem.weight.requires_grad
    assert model.inner.weight.requires_grad
    assert model.inner.weight.grad is None
    assert bool((model.head.weight.grad == 1).all())
    assert torch.equal(model.norm.running_mean, running)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"importance": "taylor"}, ConfigError, "give data="),
        ({"importance": "l1", "data": labelled()}, ConfigError, "leave data= out"),
        ({"importance": "tailor"}, ConfigError, "taylor"),
        ({"importance": 3}, ConfigError, "is no name"),
        ({"importance": Taylor(batches=5), "data": labelled()}, ConfigError, "data ended after 2 of 5 batches"),
        ({"importance": "fisher", "data": []}, ConfigError, "data ended after 0"),
        ({"importance": "taylor", "data": [labelled()[0][0]]}, ConfigError, "a batch must be"),
        ({"importance": "taylor", "data": [(torch.full((2, 2, 4, 4), torch.nan).double(), torch.zeros(2).long())]},
         DwindleError, "loss of batch 1 is nan"),
        ({"importance": "outputs", "data": torch.full((2, 2, 4, 4), torch.nan).double()}, DwindleError, "finite"),
        ({"importance": "activation", "data": torch.full((2, 2, 4, 4), torch.nan).double()}, DwindleError, "finite"),
    ],
)  # fmt: skip
def test_errors_come_before_any_change(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        dw.prune(model, labelled()[0][0], ratio=0.5, **arguments)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_values_cannot_be_measured() -> None:
    with torch.device("meta"):
        model = Network()
    inputs = torch.zeros(2, 2, 4, 4, device="meta")
    with pytest.raises(ConfigError, match="meta device"):
        dw.prune(model, inputs, ratio=0.5, importance="taylor", data=labelled())


def test_names_and_functions_and_importances() -> None:
    assert isinstance(importance_of("group_norm"), GroupNorm)
    own = Taylor(batches=3)
    assert importance_of(own) is own
    assert isinstance(importance_of(l1), WeightImportance)
