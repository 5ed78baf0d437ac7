"""Levels, scales and rounding, against NumPy in float64."""

import numpy as np
import pytest
import torch

from dwindle.config.errors import ConfigError
from dwindle.quantization import NumberFormat, fake_quantize, scale_and_zero_point


def reference(values, scale, zero_point, lowest, highest):
    levels = np.clip(np.round(values.astype(np.float64) / scale) + zero_point, lowest, highest)
    return (levels - zero_point) * scale


@pytest.mark.parametrize(
    ("dtype", "scheme", "expected"),
    [
        ("int8", None, (-127, 127, True)),
        ("int8", "affine", (-128, 127, False)),
        ("uint8", None, (0, 255, False)),
        ("uint8", "symmetric", (0, 255, True)),
        ("int4", "symmetric", (-7, 7, True)),
    ],
)
def test_names(dtype, scheme, expected):
    form = NumberFormat.parse(dtype, scheme)
    assert (form.lowest, form.highest, form.symmetric) == expected


@pytest.mark.parametrize(("dtype", "scheme"), [("int9", None), ("float8", None), ("int8", "lopsided")])
def test_unknown_names_are_refused(dtype, scheme):
    with pytest.raises(ConfigError, match="not known"):
        NumberFormat.parse(dtype, scheme)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint4", "int4"])
@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
def test_fake_quantize_is_the_formula(dtype, scheme):
    form = NumberFormat.parse(dtype, scheme)
    values = torch.randn(3000) * 3 + 1
    scale, zero_point = scale_and_zero_point(values.min(), values.max(), form)
    expected = reference(values.numpy(), float(scale), int(zero_point), form.lowest, form.highest)
    got = fake_quantize(values, scale, zero_point, form).double().numpy()
    # A value on the very border between two levels may fall to either side.
    assert np.mean(np.abs(got - expected) < 1e-5) > 0.999
    assert np.abs(got - expected).max() < float(scale) * 1.001


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint4"])
@pytest.mark.parametrize(("low", "high"), [(-1.3, 2.7), (0.4, 3.0), (-5.0, -0.2), (0.0, 0.0), (-1e-9, 6.0)])
def test_zero_is_exact_and_range_is_covered(dtype, low, high):
    form = NumberFormat.parse(dtype)
    scale, zero_point = scale_and_zero_point(torch.tensor(low), torch.tensor(high), form)
    assert float(fake_quantize(torch.zeros(1), scale, zero_point, form)) == 0.0
    ends = torch.tensor([low, high])
    assert (fake_quantize(ends, scale, zero_point, form) - ends).abs().max() <= float(scale) * 0.51


def test_range_of_a_clip_is_not_exceeded():
    form = NumberFormat.parse("uint8")
    scale, zero_point = scale_and_zero_point(torch.tensor(0.0), torch.tensor(6.0), form)
    assert int(zero_point) == 0
    assert float(scale.double()) * 255 <= 6.0


def test_channels_and_gradient():
    form = NumberFormat.parse("int8")
    weight = torch.randn(4, 5, requires_grad=True)
    scale = weight.detach().abs().amax(1) / 200  # clips the largest
    rounded = fake_quantize(weight, scale, torch.zeros(4, dtype=torch.int32), form, axis=0)
    expected = reference(weight.detach().numpy(), scale.double().numpy()[:, None], 0, -127, 127)
    np.testing.assert_allclose(rounded.detach().numpy(), expected, atol=1e-6)
    rounded.sum().backward()
    inside = (weight.detach() / scale[:, None]).round().abs() <= 127
    assert torch.equal(weight.grad, inside.float())
