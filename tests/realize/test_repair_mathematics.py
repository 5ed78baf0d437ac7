"""The least squares of repair against independent float64 references."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from dwindle.realize.repairing.affine_calls import features_of, outputs_of, read_call, shaped, to_weight
from dwindle.realize.repairing.least_squares import Moments, fit, ridge, squared_error

GROUPS, SAMPLES, FEATURES, OUTPUTS = 3, 40, 5, 4


def problem(seed: int = 0, samples: int = SAMPLES) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(GROUPS, samples, FEATURES, generator=generator, dtype=torch.float64)
    features[..., 1] += 3 * features[..., 0]  # correlated, of different scales
    residual = features @ torch.randn(GROUPS, FEATURES, OUTPUTS, generator=generator, dtype=torch.float64)
    return features, residual + torch.randn(residual.shape, generator=generator, dtype=torch.float64)


def reference(features: torch.Tensor, residual: torch.Tensor, strength: float) -> torch.Tensor:
    """The regularization as further samples, solved by orthogonal factors instead of second moments."""
    power = features.square().sum(0)
    penalty = (strength * (power + 1e-3 * power.mean())).sqrt().diag()
    rows = torch.cat([features, penalty])
    return torch.linalg.lstsq(
        rows, torch.cat([residual, residual.new_zeros(len(power), residual.shape[1])])
    ).solution


@pytest.mark.parametrize("strength", [1e-4, 0.1, 10.0])
def test_ridge_is_least_squares_with_the_penalty_as_samples(strength):
    features, residual = problem()
    found = ridge(Moments.of(features, residual, residual), strength)
    for group in range(GROUPS):
        torch.testing.assert_close(found[group], reference(features[group], residual[group], strength))


def test_batches_add_up():
    features, residual = problem()
    whole = Moments.of(features, residual, residual)
    sums = Moments.of(features[:, :10], residual[:, :10], residual[:, :10])
    sums.add(Moments.of(features[:, 10:], residual[:, 10:], residual[:, 10:]))
    torch.testing.assert_close(ridge(sums, 0.1), ridge(whole, 0.1))
    assert sums.count == SAMPLES


def test_masked_ridge_solves_each_output_on_its_own_entries():
    features, residual = problem()
    support = torch.rand(GROUPS, FEATURES, OUTPUTS, generator=torch.Generator().manual_seed(1)) < 0.5
    support[0, :, 0] = True  # one that may use everything, one that may use nothing
    support[0, :, 1] = False
    found = ridge(Moments.of(features, residual, residual), 0.1, support)
    assert bool((found[~support] == 0).all())
    power = features.square().sum(1)
    penalty = (0.1 * (power + 1e-3 * power.mean(1, keepdim=True))).sqrt()
    for group in range(GROUPS):
        for output in range(OUTPUTS):
            own = support[group, :, output]
            rows = torch.cat([features[group][:, own], penalty[group][own].diag()])
            wanted = torch.cat([residual[group, :, output], torch.zeros(int(own.sum()), dtype=torch.float64)])
            solution = torch.linalg.lstsq(rows, wanted[:, None]).solution[:, 0]
            torch.testing.assert_close(found[group, own, output], solution)


def test_error_from_moments_is_the_mean_of_squares():
    features, residual = problem()
    correction = torch.randn(GROUPS, FEATURES, OUTPUTS, dtype=torch.float64)
    direct = (residual - features @ correction).square().mean(1)
    torch.testing.assert_close(squared_error(Moments.of(features, residual, residual), correction), direct)


def test_fit_takes_the_strength_that_is_best_on_held_out_samples():
    features, residual = problem(0, 400)
    train = Moments.of(features[:, :12], residual[:, :12], residual[:, :12])
    held_out = Moments.of(features[:, 12:], residual[:, 12:], residual[:, 12:])
    strengths = (10.0, 1.0, 0.1, 0.01)
    found = fit(train, held_out, strengths=strengths)
    errors = {
        strength: float(squared_error(held_out, ridge(train, strength)).sum()) for strength in strengths
    }
    assert found.after == pytest.approx(min(errors.values()))
    assert errors[found.strength] == pytest.approx(found.after)
    assert found.after < found.before


def test_fit_leaves_a_layer_whose_held_out_error_would_grow():
    features, residual = problem()
    train = Moments.of(features, residual, residual)
    held_out = Moments.of(features, -residual, -residual)  # everything that was learned is wrong there
    found = fit(train, held_out)
    assert found.correction is None
    assert found.after == found.before == pytest.approx(float(residual.square().mean(1).sum()))


def test_the_strength_of_a_large_masked_layer_is_chosen_on_some_outputs():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 200, 6, generator=generator, dtype=torch.float64)
    residual = features @ torch.randn(1, 6, 80, generator=generator, dtype=torch.float64)
    support = torch.rand(1, 6, 80, generator=generator) < 0.5
    train = Moments.of(features[:, :150], residual[:, :150], residual[:, :150])
    held_out = Moments.of(features[:, 150:], residual[:, 150:], residual[:, 150:])
    found = fit(train, held_out, support)
    torch.testing.assert_close(found.correction, ridge(train, found.strength, support))
    assert found.after == pytest.approx(float(squared_error(held_out, found.correction).sum()))


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=torch.float64))


def double(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


CALLS = {
    "linear": (functional.linear, (double(3, 7, 5), parameter(4, 5), parameter(4)), {}, 1, 2),
    "many tokens": (functional.linear, (double(2, 700, 5), parameter(4, 5), parameter(4)), {}, 1, 2),
    "addmm": (torch.addmm, (parameter(4), double(7, 5), parameter(5, 4)), {}, 2, 0),
    "matmul": (torch.matmul, (double(3, 7, 5), parameter(5, 4)), {}, 1, None),
    "conv1d": (functional.conv1d, (double(2, 4, 9), parameter(6, 2, 3), parameter(6), 2, 1, 2, 2), {}, 1, 2),
    "conv2d": (
        functional.conv2d, (double(2, 3, 9, 8), parameter(4, 3, 3, 2), parameter(4)),
        {"stride": (2, 1), "padding": (1, 0)}, 1, 2,
    ),
    "same": (functional.conv2d, (double(2, 3, 9, 8), parameter(4, 3, 4, 3), parameter(4)), {"padding": "same"}, 1, 2),
    "depthwise": (functional.conv2d, (double(2, 6, 5, 5), parameter(6, 1, 3, 3), parameter(6), 1, 1, 1, 6), {}, 1, 2),
    "many pixels": (functional.conv2d, (double(2, 3, 70, 102), parameter(4, 3, 3, 3), parameter(4), 2, 1), {}, 1, 2),
    "conv3d": (functional.conv3d, (double(2, 2, 4, 5, 3), parameter(4, 2, 2, 3, 1), parameter(4)), {}, 1, 2),
    "batch_norm": (
        functional.batch_norm, (double(3, 4, 30, 30), double(4), double(4).abs(), parameter(4), parameter(4)),
        {}, 3, 4,
    ),
    "layer_norm": (functional.layer_norm, (double(3, 7, 5), (5,), parameter(5), parameter(5)), {}, 2, 3),
    "group_norm": (functional.group_norm, (double(3, 4, 6), 2, parameter(4), parameter(4)), {}, 2, 3),
    "rms_norm": (functional.rms_norm, (double(3, 7, 5), (5,), parameter(5)), {"eps": 1e-5}, 2, None),
    "scale": (torch.mul, (parameter(5), double(3, 7, 5)), {}, 0, None),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_features_times_the_weight_are_the_outputs(name):
    function, args, kwargs, weight_at, bias_at = CALLS[name]
    weight, bias = args[weight_at], None if bias_at is None else args[bias_at]
    operation = function.__name__
    call = read_call(operation, args, kwargs, {id(weight): "weight", id(bias): "bias"})
    assert call is not None
    assert call.weight is weight
    assert call.bias is bias
    features, outputs = features_of(call), outputs_of(call, function(*args, **kwargs))
    matrix = shaped(call.groups, call.is_transposed, weight)
    expected = features @ matrix
    if bias is not None:
        expected = expected + bias.reshape(call.groups, 1, -1)
    torch.testing.assert_close(outputs, expected)
    assert matrix.shape == (call.groups, call.feature_count, call.output_count)
    torch.testing.assert_close(to_weight(matrix, weight.shape, call.is_transposed), weight)
    if name.startswith("many"):
        assert features.shape[1] < 2 * 700


def test_padding_is_left_out():
    weight = parameter(4, 5)
    value, rows = double(2, 3, 5), torch.tensor([[True, True, False], [True, False, False]])
    call = read_call("linear", (value, weight), {}, {id(weight): "weight"})
    torch.testing.assert_close(features_of(call, rows)[0], value[rows])
    torch.testing.assert_close(outputs_of(call, value @ weight.t(), rows)[0], (value @ weight.t())[rows])
    flat = read_call("matmul", (value.flatten(0, 1), other := parameter(5, 4)), {}, {id(other): "weight"})
    torch.testing.assert_close(features_of(flat, rows)[0], value[rows])
    torch.testing.assert_close(outputs_of(flat, value.flatten(0, 1) @ other, rows)[0], (value @ other)[rows])


@pytest.mark.parametrize(
    ("operation", "args"),
    [
        ("linear", (double(3, 5), double(4, 5))),  # no parameter
        ("conv2d", (double(3, 5, 5), parameter(4, 3, 3, 3))),  # no batch
        ("matmul", (double(3, 5), parameter(5))),
        ("mul", (double(3, 1), parameter(3, 1))),
        ("relu", (double(3, 1),)),
    ],
)
def test_what_is_not_affine_in_a_parameter_is_none(operation, args):
    names = {id(item): "weight" for item in args if isinstance(item, nn.Parameter)}
    assert read_call(operation, args, {}, names) is None
