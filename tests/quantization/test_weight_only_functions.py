"""The mathematics of weight-only quantization against independent float64 references of the papers' formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dwindle.config.errors import ConfigError
from dwindle.quantization.weight_only.awq import awq_scale, channel_scale, output_error
from dwindle.quantization.weight_only.gptq import gptq
from dwindle.quantization.weight_only.groups import (
    GroupFormat,
    fitted_parameters,
    from_levels,
    group_parameters,
    merge,
    split,
    to_levels,
)
from dwindle.quantization.weight_only.hqq import hqq, scale_step, shrinkage, zero_step
from dwindle.quantization.weight_only.packing import pack, packed_bytes, unpack
from dwindle.quantization.weight_only.statistics import LARGEST_NORM, without_giants


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(samples: int, columns: int, seed: int = 1) -> Tensor:
    """Correlated inputs whose channels differ in size."""
    values = matrix(samples, columns, seed) @ (torch.eye(columns) + 0.3 * matrix(columns, columns, seed + 1))
    return values * torch.logspace(-1, 1, columns, dtype=torch.float64)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 10_000))
def test_packing_is_a_stream_of_bits(bits: int, count: int, seed: int) -> None:
    levels = np.random.default_rng(seed).integers(0, 2**bits, (3, count)).astype(np.uint8)
    packed = pack(torch.from_numpy(levels), bits)
    assert packed.shape == (3, packed_bytes(count, bits))
    stream = np.unpackbits(levels[..., None], axis=-1, bitorder="little")[..., :bits].reshape(3, -1)
    expected = np.packbits(stream, axis=-1, bitorder="little")
    assert np.array_equal(packed.numpy()[:, : expected.shape[1]], expected)
    assert not packed.numpy()[:, expected.shape[1] :].any()
    assert np.array_equal(unpack(packed, bits, count).numpy(), levels)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_to_nearest_against_numpy(bits: int, symmetric: bool) -> None:
    form = GroupFormat(bits, 8, symmetric)
    weight = matrix(5, 20)  # the last group is shorter
    groups = split(weight, form)
    assert groups.shape == (5, 3, 8)
    assert torch.equal(merge(groups, 20), weight)
    scale, zero = group_parameters(groups, form)
    levels = to_levels(groups, scale, zero, form)
    values = groups.numpy()
    for row in range(5):
        for group in range(3):
            own = values[row, group]
            low, high = min(own.min(), 0.0), max(own.max(), 0.0)
            if symmetric:
                extreme = low if -low >= high else high
                step, middle = np.float64(np.float32(-extreme / 2 ** (bits - 1))), 2 ** (bits - 1)
            else:
                step = np.float64(np.float32((high - low) / (2**bits - 1)))
                middle = np.clip(np.round(-low / step), 0, 2**bits - 1)
            expected = np.clip(np.round(own / step) + middle, 0, 2**bits - 1)
            assert float(scale[row, group]) == step
            assert float(zero[row, group]) == middle
            assert np.array_equal(levels[row, group].numpy(), expected)
    error = (from_levels(levels, scale, zero) - groups).abs()
    # Ends may be off by more than half a level: zero is put on one, and symmetric levels end early on one side.
    assert bool((error <= scale.abs().unsqueeze(-1) * 1.001).all())


def test_zero_is_exact_and_groups_of_zeros_stay_zero() -> None:
    for symmetric in (False, True):
        form = GroupFormat(4, 4, symmetric)
        groups = torch.tensor([[[0.0, 0, 0, 0], [0.3, 0.0, 5.0, 1.0], [-0.3, 0.0, -5.0, -1.0]]])
        for find in (group_parameters, fitted_parameters, hqq):
            scale, zero = find(groups, form)
            values = from_levels(to_levels(groups, scale, zero, form), scale, zero)
            assert bool((values[groups == 0] == 0).all())
            assert bool(values.isfinite().all())


@pytest.mark.parametrize("arguments", [{"bits": 1}, {"bits": 9}, {"group_size": 0}, {"group_size": True}])
def test_formats_that_cannot_be(arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"bits|group_size"):
        GroupFormat(**arguments)


def test_fitted_ranges_are_the_best_of_those_tried() -> None:
    form = GroupFormat(2, 16, False)
    groups, importance = split(matrix(6, 64), form), matrix(4, 16, 3).square()
    scale, zero = fitted_parameters(groups, form, importance)

    def lost(own: tuple[Tensor, Tensor]) -> Tensor:
        rounded = from_levels(to_levels(groups, *own, form), *own)
        return ((rounded - groups).square() * importance).sum(-1)

    tried = torch.stack([lost(group_parameters(groups, form, 1 - 0.5 * step / 19)) for step in range(20)])
    assert torch.allclose(lost((scale, zero)), tried.amin(0))
    assert float(lost((scale, zero)).sum()) < 0.9 * float(tried[0].sum())


def optimal_brain_quantization(
    weight: np.ndarray,
    hessian: np.ndarray,
    form: GroupFormat,
    damping: float,
    act_order: bool,
    zeros: np.ndarray | None = None,
) -> np.ndarray:
    """Quantize column by column with the inverse itself, shrunk after each column (equations 1 to 3 of the paper)."""
    zeros = np.zeros(weight.shape, bool) if zeros is None else zeros
    rest, columns = weight.copy(), weight.shape[1]
    damped = hessian + damping * np.mean(np.diag(hessian)) * np.eye(columns)
    width = form.width(columns)
    order = list(np.argsort(-np.diag(hessian), kind="stable")) if act_order else list(range(columns))
    left, scales = list(order), {}
    result = np.zeros_like(rest)
    for column in order:
        group = column // width
        if group not in scales:
            source = np.where(zeros, 0.0, weight if act_order else rest)
            part = torch.from_numpy(source[:, group * width : (group + 1) * width].copy())
            scales[group] = [own.numpy() for own in group_parameters(part, form)]
        scale, zero = scales[group]
        level = np.clip(np.round(rest[:, column] / scale) + zero, 0, form.highest)
        result[:, column] = np.where(zeros[:, column], 0.0, (level - zero) * scale)
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        place = left.index(column)
        error = (rest[:, column] - result[:, column]) / inverse[place, place]
        rest[:, left] -= np.outer(error, inverse[place])
        left.remove(column)
    return result


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("group_size", "stripe"), [(4, 128), (4, 8), (None, 5), (8, 3), (5, 128)])
def test_gptq_against_the_inverse_itself(group_size: int | None, stripe: int, act_order: bool) -> None:
    weight, x = matrix(7, 16), inputs(60, 16)
    form = GroupFormat(3, group_size, False)
    hessian = x.t() @ x / len(x)
    levels, scale, zero = gptq(weight, hessian, form, damping=0.01, act_order=act_order, stripe=stripe)
    found = merge(from_levels(split(levels, form), scale, zero), 16)
    expected = optimal_brain_quantization(weight.numpy(), hessian.numpy(), form, 0.01, act_order)
    assert np.allclose(found.numpy(), expected, atol=1e-9)
    assert float(levels.min()) >= 0
    assert float(levels.max()) <= 7


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("group_size", "stripe"), [(4, 8), (None, 5)])
def test_gptq_keeps_zeros_and_others_make_up_for_them(
    group_size: int | None, stripe: int, act_order: bool
) -> None:
    weight, x = matrix(7, 16), inputs(60, 16)
    zeros = torch.rand(7, 16, generator=torch.Generator().manual_seed(5)) < 0.5
    weight[zeros] = 0.0
    form, hessian = GroupFormat(3, group_size, False), x.t() @ x / len(x)
    levels, scale, zero = gptq(weight, hessian, form, act_order=act_order, zeros=zeros, stripe=stripe)
    found = merge(from_levels(split(levels, form), scale, zero), 16)
    expected = optimal_brain_quantization(
        weight.numpy(), hessian.numpy(), form, 0.01, act_order, zeros.numpy()
    )
    assert np.allclose(found.numpy(), expected, atol=1e-9)
    assert bool((found[zeros] == 0).all())


def test_gptq_loses_less_than_rounding() -> None:
    weight, x = matrix(24, 64), matrix(300, 16, 1) @ matrix(16, 64, 2) + 0.3 * matrix(300, 64, 3)
    hessian, form = x.t() @ x / len(x), GroupFormat(3, 16, False)
    levels, scale, zero = gptq(weight, hessian, form)
    found = merge(from_levels(split(levels, form), scale, zero), 64)
    groups = split(weight, form)
    own = group_parameters(groups, form)
    plain = merge(from_levels(to_levels(groups, *own, form), *own), 64)
    lost = float(((weight - found) @ x.t()).square().sum())
    assert lost < 0.5 * float(((weight - plain) @ x.t()).square().sum())
    assert lost == pytest.approx(len(x) * float(output_error(weight, found, hessian)), rel=1e-9)


def test_awq_is_the_best_power_of_the_grid() -> None:
    weights, x = [matrix(9, 32), matrix(5, 32, 4)], matrix(200, 32, 1)
    x[:, [3, 17]] *= 20  # two channels that matter more than others
    forms = [GroupFormat(3, 8, False), GroupFormat(4, 8, False)]
    hessian, magnitude = x.t() @ x / len(x), x.abs().mean(0)
    scale, power = awq_scale(weights, hessian, magnitude, forms)
    losses = []
    for step in range(20):
        own = magnitude.numpy() ** (step / 20)
        own = own / np.sqrt(own.max() * own.min())
        total = 0.0
        for weight, form in zip(weights, forms, strict=True):
            groups = split(weight * torch.from_numpy(own), form)
            parameters = group_parameters(groups, form)
            rounded = merge(from_levels(to_levels(groups, *parameters, form), *parameters), 32)
            total += float(((weight - rounded / torch.from_numpy(own)) @ x.t()).square().sum())
        losses.append(total)
    assert power == np.argmin(losses) / 20
    assert 0 < power < 1
    assert torch.allclose(scale, channel_scale(magnitude, power))
    assert min(losses) < 0.8 * losses[0]


def test_awq_scales_of_channels_without_input() -> None:
    assert torch.equal(channel_scale(torch.zeros(3), 0.5), torch.ones(3))
    assert torch.allclose(channel_scale(torch.tensor([0.0, 4.0, 1.0]), 0.5), torch.tensor([1, 2, 1]) / 2**0.5)


def test_hqq_steps_against_their_definitions() -> None:
    """The shrinkage solves ``min |e|^p + beta/2 ...`` as published; the means are minima of the quadratic part."""
    error = matrix(4, 50).flatten()
    expected = np.sign(error.numpy()) * np.maximum(
        np.abs(error.numpy()) - np.abs(error.numpy()) ** (0.7 - 1) / 10, 0
    )
    assert np.allclose(shrinkage(error, 10.0, 0.7).numpy(), expected)
    groups, outliers = matrix(3, 8), 0.1 * matrix(3, 8, 5)
    levels = torch.randint(0, 16, (3, 8), generator=torch.Generator().manual_seed(0)).double()
    scale = torch.full((3,), 0.2, dtype=torch.float64)
    zero = zero_step(groups, outliers, levels, scale).requires_grad_()
    quadratic = (scale[:, None] * (levels - zero[:, None]) - (groups - outliers)).square().sum()
    (gradient,) = torch.autograd.grad(quadratic, zero)
    assert float(gradient.abs().max()) < 1e-12
    found = scale_step(groups, outliers, levels, zero.detach(), scale).requires_grad_()
    quadratic = (found[:, None] * (levels - zero.detach()[:, None]) - (groups - outliers)).square().sum()
    (gradient,) = torch.autograd.grad(quadratic, found)
    assert float(gradient.abs().max()) < 1e-5  # scales are numbers of float32


@pytest.mark.parametrize("symmetric", [False, True])
def test_hqq_is_better_than_rounding_in_its_own_measure(symmetric: bool) -> None:
    form = GroupFormat(3, 32, symmetric)
    heavy = matrix(20, 256) ** 3  # outliers
    groups = split(heavy, form)

    def lost(own: tuple[Tensor, Tensor]) -> Tensor:
        return (from_levels(to_levels(groups, *own, form), *own) - groups).abs().pow(0.7).sum(-1)

    plain, better = lost(group_parameters(groups, form)), lost(hqq(groups, form))
    assert bool((better <= plain).all())
    assert float(better.sum()) < 0.99 * float(plain.sum())
    _, zero = hqq(groups, form)
    assert torch.equal(zero, zero.round())
    assert float(zero.min()) >= 0
    assert float(zero.max()) <= 7


def test_giant_inputs_count_as_a_few_ordinary_ones():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(101, 16, generator=generator)
    assert without_giants(rows) is rows  # nothing to do
    giant = rows.clone()
    giant[7] *= 1000
    capped = without_giants(giant)
    others = [index for index in range(101) if index != 7]
    torch.testing.assert_close(capped[others], rows[others])
    assert float(capped[7].norm()) == pytest.approx(LARGEST_NORM * float(giant.norm(dim=1).median()))
    torch.testing.assert_close(capped[7] / capped[7].norm(), rows[7] / rows[7].norm())
    assert torch.equal(without_giants(torch.zeros(3, 2)), torch.zeros(3, 2))


def test_rounding_for_ordinary_inputs_is_not_spoilt_by_a_giant():
    """As in the down projections of language models: one token a window is hundreds of times as large."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(64, 64, generator=generator) / 8
    rows = torch.randn(2048, 64, generator=generator) @ mixing
    weight = torch.randn(32, 64, generator=generator)
    seen = rows[:1024].clone()
    seen[::256] *= 300 * torch.rand(64, generator=generator)
    form = GroupFormat(4, 64)
    losses = []
    for data in (seen, without_giants(seen)):
        levels, scale, zero = gptq(weight, data.t() @ data, form, damping=0.1)
        rounded = (levels - zero.repeat_interleave(64, 1)) * scale.repeat_interleave(64, 1)
        losses.append(float(((rows[1024:] @ (rounded - weight).t()) ** 2).mean()))
    assert losses[1] < 0.7 * losses[0]
