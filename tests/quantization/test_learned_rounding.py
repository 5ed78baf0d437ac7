"""The shared arithmetic: bits of torch's kernels, gradients of each rule, half precision."""

import numpy as np
import pytest
import torch

from dwindle.quantization import NumberFormat, fake_quantize, scale_and_zero_point
from dwindle.quantization.quantizers import blocks
from dwindle.quantization.quantizers.rounding import Gradient, learned_round, round_to_levels


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "uint2"])
@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
def test_forward_has_the_bits_of_torchs_kernels(dtype, scheme):
    form = NumberFormat.parse(dtype, scheme)
    value = torch.randn(4, 6, 5, 5) * 2 + 0.7
    scale, zero = scale_and_zero_point(value.min() * 0.8, value.max() * 0.8, form)
    assert torch.equal(round_to_levels(value, scale, zero, form), fake_quantize(value, scale, zero, form))
    edges = value.transpose(0, 1).flatten(1)
    scale, zero = scale_and_zero_point(edges.amin(1), edges.amax(1) * 0.7, form)
    assert torch.equal(
        round_to_levels(value, scale, zero, form, 1), fake_quantize(value, scale, zero, form, 1)
    )


def test_values_beyond_all_levels_saturate_and_nan_stays():
    form = NumberFormat.parse("uint8")
    value = torch.tensor([1e30, -1e30, float("inf"), float("nan")])
    rounded = round_to_levels(value, torch.tensor(0.5), torch.tensor(7, dtype=torch.int32), form)
    assert rounded[:3].tolist() == [124.0, -3.5, 124.0]
    assert rounded[3].isnan()


def analytic(value, flow, scale, zero, form, gradient, with_offset):
    """The rule in words of :func:`learned_round`, element by element in float64."""
    place = value / scale + zero
    rounded = np.round(place)
    low, high = form.lowest, form.highest
    inside = {
        "open": (place > low) & (place < high),
        "closed": (place >= low) & (place <= high),
        "upper_open": (place >= low) & (place < high),
        "rounded": (rounded >= low) & (rounded <= high),
    }[gradient.edges]
    beyond = np.clip(rounded, low, high) - (0 if with_offset else zero)
    slope = np.where(inside, (rounded - place) * gradient.rounding, beyond)
    return np.where(inside, flow, 0), flow * slope, np.where(inside, 0, flow)


@pytest.mark.parametrize("edges", ["open", "closed", "upper_open", "rounded"])
@pytest.mark.parametrize("rounding", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("with_offset", [True, False])
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("values", [blocks.VALUES, 17])  # whole, and in pieces
def test_gradients_of_every_rule(edges, rounding, with_offset, axis, values, monkeypatch):
    monkeypatch.setattr(blocks, "VALUES", values)
    form, gradient = NumberFormat.parse("uint4"), Gradient(edges, rounding)
    generator = torch.Generator().manual_seed(3)
    value = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    flow = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    count = 1 if axis is None else value.shape[axis]
    shape = () if axis is None else (count,)
    scale = (torch.rand(count, generator=generator, dtype=torch.float64) * 0.05 + 0.05).reshape(shape)
    scale.requires_grad_()
    zero = torch.randint(2, 13, (count,), generator=generator).reshape(shape)
    offset = torch.zeros(shape, dtype=torch.float64, requires_grad=True) if with_offset else None
    learned_round(value, scale, zero, form, axis, offset=offset, gradient=gradient).backward(flow)
    wide = [1, 1, 1]
    if axis is not None:
        wide[axis] = count
    rest = tuple(index for index in range(3) if axis is None or index != axis % 3)
    of_value, of_scale, of_offset = analytic(
        value.detach().numpy(),
        flow.numpy(),
        scale.detach().numpy().reshape(wide),
        zero.numpy().reshape(wide),
        form,
        gradient,
        with_offset,
    )
    assert 0.05 < np.mean(of_value == 0) < 0.95  # values on both sides of the edges
    np.testing.assert_array_equal(value.grad.numpy(), of_value)
    np.testing.assert_allclose(scale.grad.numpy(), of_scale.sum(rest), rtol=1e-9)
    if offset is not None:
        np.testing.assert_allclose(offset.grad.numpy(), of_offset.sum(rest), rtol=1e-9)


@pytest.mark.parametrize(
    ("edges", "expected"),
    [("open", [0, 0, 1]), ("closed", [1, 1, 1]), ("upper_open", [1, 0, 1]), ("rounded", [1, 1, 1])],
)
def test_what_counts_on_the_very_edge(edges, expected):
    for form in (NumberFormat(0, 255, False), NumberFormat(-128, 127, True), NumberFormat(0, 15, False)):
        value = torch.tensor([form.lowest, form.highest, 1.0]) * 0.5
        value.requires_grad_()
        learned_round(value, torch.tensor(0.5), None, form, gradient=Gradient(edges)).sum().backward()
        assert value.grad.tolist() == expected


def test_rounded_rule_is_that_of_torchs_learnable_kernel():
    form = NumberFormat(-8, 7, True)
    value = torch.randn(2000, requires_grad=True)
    flow = torch.randn(2000)
    scale = torch.tensor([0.11], requires_grad=True)
    learned_round(value, scale.reshape(()), None, form).backward(flow)
    other, step = value.detach().clone().requires_grad_(), scale.detach().clone().requires_grad_()
    torch._fake_quantize_learnable_per_tensor_affine(other, step, torch.zeros(1), -8, 7, 1.0).backward(flow)
    assert torch.equal(value.grad, other.grad)
    torch.testing.assert_close(scale.grad, step.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_in_float32(dtype):
    form = NumberFormat.parse("int8")
    value = torch.randn(64, dtype=dtype, requires_grad=True)
    scale = torch.tensor(0.013, requires_grad=True)
    rounded = learned_round(value, scale, None, form)
    assert rounded.dtype == dtype
    expected = round_to_levels(value.detach().float(), scale.detach(), None, form)
    assert torch.equal(rounded, expected.to(dtype))
    rounded.sum().backward()
    assert value.grad.dtype == dtype
    assert scale.grad.dtype == torch.float32


@pytest.mark.parametrize("values", [blocks.VALUES, 7])
def test_other_layouts_and_expanded_gradients(values, monkeypatch):
    monkeypatch.setattr(blocks, "VALUES", values)
    form = NumberFormat.parse("uint8")
    value = torch.randn(2, 8, 4, 4)
    flow = torch.randn(2, 8, 4, 4)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        held = value.clone(memory_format=layout).requires_grad_()
        scale = torch.tensor(0.01, requires_grad=True)
        rounded = learned_round(held, scale, torch.tensor(90, dtype=torch.int32), form)
        assert rounded.is_contiguous(memory_format=layout)
        rounded.backward(flow)
        results.append((held.grad, scale.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-3)
    scale = torch.tensor(0.01, requires_grad=True)
    learned_round(value, scale, None, form).sum().backward()
    assert scale.grad.isfinite()
