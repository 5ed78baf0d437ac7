"""Rounding with compensated errors against a plain float64 reference, and in whole models."""

import numpy as np
import pytest
import torch
from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.quantization import NumberFormat, quantization_parameters, quantize
from dwindle.quantization.compensation import compensated_levels, nearest_levels

INT4, INT8 = NumberFormat.parse("int4"), NumberFormat.parse("int8")


def reference(weight, scale, products, form, damping=0.01):
    """Optimal Brain Quantization in a fixed order: after each column the rest solves its least squares anew."""
    damped = products + damping * np.diag(products).mean() * np.eye(len(products))
    order = np.argsort(-np.diag(products), kind="stable")
    rest, levels = weight.copy(), np.zeros_like(weight)
    inverse = np.linalg.inv(damped)
    left = list(order)
    for column in order:
        levels[:, column] = np.clip(np.round(rest[:, column] / scale), form.lowest, form.highest)
        error = (rest[:, column] - levels[:, column] * scale) / inverse[column, column]
        rest -= np.outer(error, inverse[column])
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        left.remove(column)
    return levels


@pytest.mark.parametrize("form", [INT4, INT8])
def test_levels_are_those_of_column_by_column_elimination(form):
    torch.manual_seed(0)
    inputs = torch.randn(200, 150, dtype=torch.float64) @ torch.randn(150, 150, dtype=torch.float64)
    weight, products = torch.randn(7, 150, dtype=torch.float64), inputs.t() @ inputs
    scale = weight.abs().amax(1, keepdim=True) / form.highest * (1.0 if form is INT4 else 2.1)
    zero = torch.zeros_like(scale)
    got = compensated_levels(weight, scale, zero, products, form)
    expected = reference(weight.numpy(), scale[:, 0].numpy(), products.numpy(), form)
    if form is INT8:  # half of the levels are free, so the limit on pairs binds nowhere here
        assert np.abs(expected).max() < 64
    np.testing.assert_array_equal(got.numpy(), expected)


def test_the_output_comes_closer():
    torch.manual_seed(0)
    inputs = torch.randn(400, 8, dtype=torch.float64) @ torch.randn(8, 40, dtype=torch.float64)
    inputs += 0.1 * torch.randn(400, 40, dtype=torch.float64)
    weight, products = torch.randn(9, 40, dtype=torch.float64), inputs.t() @ inputs
    scale, zero = weight.abs().amax(1, keepdim=True) / 7, torch.zeros(9, 1, dtype=torch.float64)
    levels = [
        f(weight, scale, zero, *rest)
        for f, rest in ((nearest_levels, (INT4,)), (compensated_levels, (products, INT4)))
    ]
    errors = [float(((own * scale - weight) @ inputs.t()).square().sum()) for own in levels]
    assert errors[1] < errors[0] / 2


def test_pairs_within_sixteen_bits_stay_so_and_zeros_stay_zero():
    torch.manual_seed(0)
    inputs = torch.randn(100, 64, dtype=torch.float64) @ torch.randn(64, 64, dtype=torch.float64)
    weight = torch.randn(50, 64, dtype=torch.float64)
    weight[:, ::5] = 0.0
    pair = torch.stack([torch.topk(s * weight, 2, dim=1).values.sum(1) for s in (1, -1)]).amax(0)
    scale = torch.maximum(weight.abs().amax(1) / 127, pair / 127)[:, None]
    zero = torch.zeros_like(scale)
    got = compensated_levels(weight, scale, zero, inputs.t() @ inputs, INT8)
    assert not torch.equal(got, nearest_levels(weight, scale, zero, INT8))
    for sign in (1, -1):
        assert float(torch.topk(sign * got, 2, dim=1).values.sum(1).max()) <= 128
    assert not got[:, ::5].any()


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2)
        self.depthwise, self.head = nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(torch.relu(self.depthwise(x)).mean((2, 3)))


def test_a_model_gains_and_keeps_its_scales():
    torch.manual_seed(0)
    model = Layers().eval()
    data = [torch.randn(8, 3, 12, 12).cumsum(2).cumsum(3) / 6 for _ in range(4)]
    four = [{"op_types": ["Conv2d", "Linear"], "target_names": ["weight"], "quant_dtype": "int4"}]
    nearest = quantize(model, data, config_list=four, bias_correction=False)
    compensated = quantize(model, data, config_list=four, rounding="gptq", bias_correction=False)
    results = compensated._dwindle_quantization.reconstructed
    assert {result.name for result in results} == {
        f"{name}.weight" for name in ("first", "second", "depthwise", "head")
    }
    assert all(result.compensated <= result.nearest for result in results)
    for first, second in zip(
        quantization_parameters(nearest), quantization_parameters(compensated), strict=True
    ):
        assert torch.equal(first, second)
    x = torch.randn(32, 3, 12, 12).cumsum(2).cumsum(3) / 6
    with torch.no_grad():
        errors = [float((q(x) - model(x)).square().sum()) for q in (nearest, compensated)]
    assert errors[1] < 0.7 * errors[0]


def test_unknown_roundings_are_refused():
    with pytest.raises(ConfigError, match="nearest, gptq"):
        quantize(nn.Linear(2, 2), [torch.randn(4, 2)], rounding="gptqq")
