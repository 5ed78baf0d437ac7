"""Sums of whole numbers against float64 arithmetic on the levels themselves."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dwindle.quantization.integer_sums import summed_in_integers

GENERATOR = torch.Generator().manual_seed(0)


def levels(*shape, low=-127, high=127):
    return torch.randint(low, high + 1, shape, generator=GENERATOR).double()


CALLS = {
    "conv2d": (F.conv2d, (2, 6, 9, 9), (8, 3, 3, 3), {"groups": 2, "padding": 1}, 0, 8, (-1, 1, 1)),
    "conv1d": (F.conv1d, (2, 6, 9), (8, 6, 3), {"stride": 2}, 0, 8, (-1, 1)),
    "conv_transpose2d": (
        F.conv_transpose2d,
        (2, 6, 5, 5),
        (6, 4, 2, 2),
        {"groups": 3, "stride": 2},
        1,
        12,
        (-1, 1, 1),
    ),
    "linear": (F.linear, (2, 7, 16), (5, 16), {}, 0, 5, (-1,)),
}


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("one_scale", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_equals_float64_sums_of_levels_times_scales(name, one_scale, with_bias):
    call, data_shape, weight_shape, options, axis, channels, shape = CALLS[name]
    data, weight, bias = (
        levels(*data_shape, low=-30, high=225),
        levels(*weight_shape),
        levels(channels, low=-9999, high=9999),
    )
    input_scale = torch.tensor(0.0173)
    count = 1 if one_scale else weight_shape[axis]
    scale = torch.rand(count, generator=GENERATOR) * 0.01 + 1e-3
    per_weight = (
        scale.reshape([-1 if dim == axis else 1 for dim in range(weight.dim())]) if count > 1 else scale
    )
    product = scale * input_scale
    repeated = product if count == 1 else product.repeat(channels // count)
    args = ((data * input_scale).float(), (weight * per_weight).float())
    args += ((bias * repeated).float(),) if with_bias else (None,)
    got = summed_in_integers(
        call, name, args, options, (input_scale, scale), axis, ((1,), (2,) if with_bias else None)
    )
    exact = call(data, weight, bias if with_bias else None, **options)
    expected = exact.float() * repeated.reshape(shape)
    assert torch.equal(got, expected)  # the same bits: no sum of floats in between


def test_addmm_and_keywords():
    data, weight, bias = levels(4, 6), levels(6, 3), levels(3)
    scales = torch.tensor(0.01), torch.tensor([0.02, 0.03, 0.005])
    product = scales[0] * scales[1]
    args = ((bias * product).float(), (data * scales[0]).float(), (weight * scales[1]).float())
    got = summed_in_integers(torch.addmm, "addmm", args, {}, scales, 1, ((2,), (0,)))
    expected = (bias + data @ weight).float() * product
    assert torch.equal(got, expected)
    named = {"input": args[1], "weight": args[2].t(), "bias": args[0]}
    got = summed_in_integers(F.linear, "linear", (), named, scales, 0, (("weight",), ("bias",)))
    assert torch.equal(got, expected)


def test_gradients_are_those_of_the_call_itself():
    data, weight = (levels(4, 6) * 0.01).float(), (levels(5, 6) * 0.02).float()
    found = []
    for run in (
        F.linear,
        partial(
            lambda x, w, **given: summed_in_integers(F.linear, "linear", (x, w), {}, **given),
            scales=(torch.tensor(0.01), torch.tensor([0.02])),
            axis=None,
            positions=((1,), None),
        ),
    ):
        x, w = data.clone().requires_grad_(), weight.clone().requires_grad_()
        run(x, w).square().sum().backward()
        found.append((x.grad, w.grad))
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_half_precision_runs_as_it_is():
    data, weight = torch.randn(2, 4).bfloat16(), torch.randn(3, 4).bfloat16()
    scales = torch.tensor(0.01), torch.tensor([0.02])
    got = summed_in_integers(F.linear, "linear", (data, weight), {}, scales, None, ((1,), None))
    assert torch.equal(got, F.linear(data, weight))
