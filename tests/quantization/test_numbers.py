"""Levels, scales and rounding, against NumPy in float64."""

import numpy as np
import pytest
import torch

from dwindle.config.errors import ConfigError
from dwindle.quantization import NumberFormat, fake_quantize, scale_and_zero_point
from dwindle.quantization.weights import weight_levels


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
        ("int2", "affine", (-2, 1, False)),
        ("int16", None, (-32767, 32767, True)),
        ("uint16", None, (0, 65535, False)),
    ],
)
def test_names(dtype, scheme, expected):
    form = NumberFormat.parse(dtype, scheme)
    assert (form.lowest, form.highest, form.symmetric) == expected


@pytest.mark.parametrize(
    ("dtype", "scheme", "narrow", "expected"),
    [
        ("int8", "symmetric", False, (-128, 127)),
        ("int8", "affine", True, (-127, 127)),
        ("uint4", "affine", True, (1, 15)),
        ("int16", "symmetric", False, (-32768, 32767)),
    ],
)
def test_narrow_range_leaves_out_the_lowest_level(dtype, scheme, narrow, expected):
    form = NumberFormat.parse(dtype, scheme, narrow)
    assert (form.lowest, form.highest) == expected
    assert form.fills_storage == (expected in ((-128, 127), (-32768, 32767)))


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("kind", ["int", "uint"])
def test_bits_and_storage(kind, bits):
    form = NumberFormat.parse(f"{kind}{bits}")
    assert form.bits == bits
    assert form.stored == f"{kind}{8 if bits <= 8 else 16}"


@pytest.mark.parametrize(
    ("dtype", "scheme"), [("int17", None), ("int1", None), ("float8", None), ("int8", "lopsided")]
)
def test_unknown_names_are_refused(dtype, scheme):
    with pytest.raises(ConfigError, match="not known"):
        NumberFormat.parse(dtype, scheme)


@pytest.mark.parametrize("dtype", ["uint2", "uint8", "int8", "uint4", "int4", "int12", "uint16"])
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


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int5"])
def test_bits_are_those_of_torch(axis, dtype):
    """torch's own kernels are the second reference."""
    form = NumberFormat.parse(dtype, "affine")
    value = torch.randn(6, 7) * 2
    rows = value.reshape(1, -1) if axis is None else value.movedim(axis, 0)
    scale, zero_point = scale_and_zero_point(rows.amin(1) * 0.7, rows.amax(1) * 0.7, form)
    got = fake_quantize(value, scale, zero_point, form, axis)
    if axis is None:
        expected = torch.fake_quantize_per_tensor_affine(
            value, scale[0], zero_point[0], form.lowest, form.highest
        )
    else:
        expected = torch.fake_quantize_per_channel_affine(
            value, scale, zero_point, axis, form.lowest, form.highest
        )
    assert torch.equal(got, expected)


def test_what_is_not_finite_does_not_become_a_number():
    form = NumberFormat.parse("uint8")
    value = torch.tensor([float("nan"), float("inf"), -float("inf")])
    got = fake_quantize(value, torch.tensor(0.5), torch.tensor(100), form)
    assert torch.isnan(got[0])
    assert got[1:].tolist() == [77.5, -50.0]  # the ends of the range; torch's kernels give -50 for all three


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_groups_have_scales_of_their_own(axis, scheme):
    form = NumberFormat.parse("int4", scheme)
    weight = torch.randn(6, 8) if axis == 0 else torch.randn(8, 6)
    weight[:, 0] *= 10
    scale, zero_point = weight_levels(weight, axis, form, block=4)
    assert scale.shape == (12,)
    rows = (weight if axis == 0 else weight.t()).double().numpy()
    expected = np.zeros_like(rows)
    for channel in range(6):
        for group in range(2):
            part = rows[channel, group * 4 : group * 4 + 4]
            low, high = min(part.min(), 0.0), max(part.max(), 0.0)
            if scheme == "symmetric":
                step, zero = max(-low, high) / 7, 0
            else:
                step = (high - low) / 15
                zero = np.round(-8 - low / step)
            expected[channel, group * 4 : group * 4 + 4] = reference(
                part, step, zero, form.lowest, form.highest
            )
    got = fake_quantize(weight, scale, zero_point, form, axis, block=4)
    got = (got if axis == 0 else got.t()).double().numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_groups_must_fit():
    with pytest.raises(ConfigError, match="its 10 inputs are not a multiple of the group size 4"):
        weight_levels(torch.randn(3, 10), 0, NumberFormat.parse("int4"), block=4)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_affine_weights_do_not_saturate(dtype):
    """Two levels of a processor's pair, seen as int8, add up to at most 128."""
    form = NumberFormat.parse(dtype, "affine")
    weight = torch.randn(16, 40) + 0.5
    scale, zero_point = weight_levels(weight, 0, form, avoid_saturation=True)
    levels = (weight / scale[:, None]).round() + zero_point[:, None] - (0 if dtype == "int8" else 128)
    assert levels.amax() <= 64
    assert levels.amin() >= -64
    assert (fake_quantize(weight, scale, zero_point, form, 0) - weight).abs().amax() <= scale.amax() * 0.501


def test_clipped_affine_weights_lose_less():
    form = NumberFormat.parse("uint3")
    weight = torch.randn(4, 200)

    def error(clip):
        scale, zero_point = weight_levels(weight, 0, form, clip=clip)
        return (fake_quantize(weight, scale, zero_point, form, 0) - weight).square().sum(1)

    assert (error(True) <= error(False)).all()
    assert error(True).sum() < 0.8 * error(False).sum()
