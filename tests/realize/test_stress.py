"""Models written to be awkward: each is pruned by half, proven, held against its hand-masked self, and trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dwindle as dw


class Model(nn.Module):
    """A model from a function and named parts, so that each case is a few lines."""

    def __init__(
        self, forward: Callable[..., Any], attributes: dict[str, Any] | None = None, **parts: Any
    ) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        for name, held in (attributes or {}).items():
            setattr(self, name, held)
        self.function = forward

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(self, *args)


Case = tuple[nn.Module, Callable[[int], tuple[torch.Tensor, ...]], float]


def vectors(width: int) -> Callable[[int], tuple[torch.Tensor, ...]]:
    return lambda batch: (torch.randn(batch, width),)


def images(channels: int = 3, size: int = 8) -> Callable[[int], tuple[torch.Tensor, ...]]:
    return lambda batch: (torch.randn(batch, channels, size, size),)


def sequence(length: int, width: int) -> Callable[[int], tuple[torch.Tensor, ...]]:
    return lambda batch: (torch.randn(batch, length, width),)


def channel_shuffle() -> Case:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.first(x)
        batch, channels, height, width = x.shape
        x = (
            x.view(batch, m.groups, channels // m.groups, height, width)
            .transpose(1, 2)
            .reshape(batch, channels, height, width)
        )
        return m.head(m.second(x).relu())

    parts = {
        "first": nn.Conv2d(3, 16, 1),
        "second": nn.Conv2d(16, 16, 3, groups=2),
        "head": nn.Conv2d(16, 4, 1),
    }
    return Model(forward, {"groups": 2}, **parts), images(), 0.75


def native_channel_shuffle() -> Case:
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.ChannelShuffle(2), nn.Conv2d(16, 4, 1)), images(), 0.75


def pixel_shuffle() -> Case:
    return (
        nn.Sequential(
            nn.Conv2d(3, 32, 1),
            nn.PixelShuffle(2),
            nn.Conv2d(8, 12, 3),
            nn.PixelUnshuffle(2),
            nn.Conv2d(48, 4, 1),
        ),
        images(3, 6),
        0.75,
    )


def gated_linear_unit() -> Case:
    return nn.Sequential(nn.Linear(6, 32), nn.GLU(), nn.Linear(16, 3)), vectors(6), 0.6


def swiglu() -> Case:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = m.both(x).chunk(2, dim=-1)
        return m.down(F.silu(gate) * up)

    return Model(forward, both=nn.Linear(6, 32), down=nn.Linear(16, 3)), vectors(6), 0.6


def flipped() -> Case:
    return (
        Model(lambda m, x: m.head(torch.flip(m.first(x), [-1])), first=nn.Linear(6, 8), head=nn.Linear(8, 3)),
        vectors(6),
        1.0,
    )


def permuted_by_a_buffer() -> Case:
    model = Model(
        lambda m, x: m.head(m.mid(m.first(x)[:, m.order]).relu()),
        first=nn.Linear(6, 8),
        mid=nn.Linear(8, 8),
        head=nn.Linear(8, 3),
    )
    model.register_buffer("order", torch.randperm(8))
    return model, vectors(6), 0.95


def rolled() -> Case:
    return (
        Model(
            lambda m, x: m.head(torch.roll(m.first(x), 1, 1)),
            first=nn.Conv2d(3, 8, 1),
            head=nn.Conv2d(8, 4, 1),
        ),
        images(),
        1.0,
    )


def prelu_and_group_norm() -> Case:
    return (
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.PReLU(16), nn.Conv2d(16, 4, 3)),
        images(),
        0.75,
    )


def instance_norm() -> Case:
    return (
        nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.InstanceNorm2d(16, affine=True), nn.ReLU(), nn.Conv2d(16, 4, 3)
        ),
        images(),
        0.75,
    )


def weight_norm() -> Case:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 16)),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )
    return model, vectors(6), 1.0


def low_rank() -> Case:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.head(F.relu(x @ (m.left @ m.right)))

    return (
        Model(
            forward,
            left=nn.Parameter(torch.randn(6, 8)),
            right=nn.Parameter(torch.randn(8, 16)),
            head=nn.Linear(16, 3),
        ),
        vectors(6),
        0.75,
    )


def outer_product() -> Case:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.head((m.left(x)[:, :, None] * m.right(x)[:, None, :]).flatten(1))

    return Model(forward, left=nn.Linear(6, 4), right=nn.Linear(6, 8), head=nn.Linear(32, 3)), vectors(6), 0.8


def symmetric_square() -> Case:
    """x.view(4, 4) plus its transpose: the two factors are one axis, found after the product was made."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        square = m.first(x).view(x.shape[0], m.edge, m.edge)
        return m.head((square + square.transpose(1, 2)).flatten(1).relu())

    return Model(forward, {"edge": 4}, first=nn.Linear(6, 16), head=nn.Linear(16, 3)), vectors(6), 1.0


def multi_scale() -> Case:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        low = m.low(x)
        high = F.interpolate(m.high(F.avg_pool2d(low, 2)), size=low.shape[-2:])
        return m.head(torch.cat([low, high, x], 1))

    return (
        Model(forward, low=nn.Conv2d(3, 8, 3, padding=1), high=nn.Conv2d(8, 6, 1), head=nn.Conv2d(17, 4, 1)),
        images(),
        0.75,
    )


def mean_and_variance_by_hand() -> Case:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.first(x)
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt()
        return m.head(x)

    return Model(forward, first=nn.Linear(6, 16), head=nn.Linear(16, 3)), vectors(6), 1.0


def softmax_over_channels() -> Case:
    return nn.Sequential(nn.Linear(6, 16), nn.Softmax(-1), nn.Linear(16, 3)), vectors(6), 1.0


def slice_assignment() -> Case:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.first(x)
        y = torch.zeros_like(x)
        y[:, : x.shape[1] // 2] = x[:, : x.shape[1] // 2]
        return m.head(m.mid(y).relu())

    return Model(forward, first=nn.Linear(6, 16), mid=nn.Linear(16, 8), head=nn.Linear(8, 3)), vectors(6), 1.0


def negative_slices() -> Case:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.first(x)
        return m.head(x[:, m.cut :] + x[:, : -m.cut])

    return Model(forward, {"cut": 8}, first=nn.Linear(6, 16), head=nn.Linear(8, 3)), vectors(6), 1.0


def partial_rotation() -> Case:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        first, second = m.lift(x).split([m.rotated, m.plain], -1)
        one, two = first.chunk(2, -1)
        return m.head(torch.cat([torch.cat([-two, one], -1), second], -1))

    return (
        Model(forward, {"rotated": 8, "plain": 8}, lift=nn.Linear(6, 16), head=nn.Linear(16, 3)),
        vectors(6),
        1.0,
    )


def separate_query_and_key_widths() -> Case:
    model = nn.MultiheadAttention(16, 4, kdim=12, vdim=10, batch_first=True)

    def forward(m: Any, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return m.head(m.attention(m.lift(x), m.keys(k), m.values(v))[0])

    parts = {
        "lift": nn.Linear(6, 16),
        "keys": nn.Linear(5, 12),
        "values": nn.Linear(7, 10),
        "attention": model,
    }
    return (
        Model(forward, head=nn.Linear(16, 3), **parts),
        lambda n: (torch.randn(n, 4, 6), torch.randn(n, 5, 5), torch.randn(n, 5, 7)),
        0.85,
    )


def multihead_attention_inside() -> Case:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.lift(x)
        return m.head(x + m.attention(x, x, x, need_weights=False)[0])

    return (
        Model(
            forward,
            lift=nn.Linear(6, 16),
            attention=nn.MultiheadAttention(16, 4, batch_first=True),
            head=nn.Linear(16, 3),
        ),
        sequence(5, 6),
        0.75,
    )


def bidirectional_stack() -> Case:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.head(m.cell(m.lift(x))[0].mean(1))

    parts = {
        "lift": nn.Linear(6, 16),
        "cell": nn.LSTM(16, 8, num_layers=2, bidirectional=True, batch_first=True),
        "head": nn.Linear(16, 3),
    }
    return Model(forward, **parts), sequence(5, 6), 0.75


def three_dimensional_transposed() -> Case:
    return (
        nn.Sequential(nn.ConvTranspose3d(2, 8, 2), nn.BatchNorm3d(8), nn.ReLU(), nn.ConvTranspose3d(8, 3, 2)),
        lambda n: (torch.randn(n, 2, 3, 3, 3),),
        0.75,
    )


def grouped_transposed() -> Case:
    return (
        nn.Sequential(
            nn.Conv2d(3, 16, 1), nn.ConvTranspose2d(16, 16, 3, groups=4), nn.ReLU(), nn.Conv2d(16, 4, 1)
        ),
        images(),
        0.75,
    )


def depth_multiplier() -> Case:
    return (
        nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=8), nn.ReLU(), nn.Conv2d(16, 4, 1)
        ),
        images(),
        0.75,
    )


def bilinear() -> Case:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.head(m.pair(m.left(x), m.right(x)))

    return (
        Model(
            forward,
            left=nn.Linear(6, 8),
            right=nn.Linear(6, 8),
            pair=nn.Bilinear(8, 8, 8),
            head=nn.Linear(8, 3),
        ),
        vectors(6),
        0.6,
    )


def scaled_by_the_width() -> Case:
    """``x / x.shape[-1]``: the width is a number in the formula and must stay."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.first(x)
        return m.head(x / x.shape[-1] ** 0.5)

    return Model(forward, first=nn.Linear(6, 16), head=nn.Linear(16, 3)), vectors(6), 1.0


def in_place_activations() -> Case:
    return (
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.Hardswish(inplace=True), nn.Dropout(0.0, inplace=True), nn.Conv2d(8, 4, 3)
        ),
        images(),
        0.75,
    )


def lists_of_modules() -> Case:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.lift(x)
        for name, layer in m.named.items():
            x = x + layer(x) * m.scales[name]
        return m.head(torch.stack([layer(x) for layer in m.several]).sum(0))

    parts = {
        "lift": nn.Linear(6, 16),
        "named": nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)}),
        "scales": nn.ParameterDict({"a": nn.Parameter(torch.rand(16)), "b": nn.Parameter(torch.rand(1))}),
        "several": nn.ModuleList([nn.Linear(16, 8), nn.Linear(16, 8)]),
        "head": nn.Linear(8, 3),
    }
    return Model(forward, **parts), vectors(6), 0.6


def mixture_by_einsum() -> Case:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        weights = m.gate(x).softmax(-1)
        hidden = torch.einsum("bi,eih->beh", x, m.up).relu()
        return torch.einsum("beh,eho,be->bo", hidden, m.down, weights)

    parts = {
        "gate": nn.Linear(6, 4),
        "up": nn.Parameter(torch.randn(4, 6, 16)),
        "down": nn.Parameter(torch.randn(4, 16, 3)),
    }
    return Model(forward, **parts), vectors(6), 0.75


def unfolded() -> Case:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        patches = F.unfold(m.first(x), 2, stride=2)
        return m.head(patches.transpose(1, 2)).mean(1)

    return Model(forward, first=nn.Conv2d(3, 8, 1), head=nn.Linear(32, 3)), images(), 1.0


def batch_of_windows() -> Case:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.lift(x)
        batch, length, width = x.shape
        windows = x.view(batch, length // 2, 2, width).reshape(-1, 2, width)
        return m.head(m.mix(windows).view(batch, length, width))

    return (
        Model(forward, lift=nn.Linear(6, 16), mix=nn.Linear(16, 16), head=nn.Linear(16, 3)),
        sequence(4, 6),
        0.6,
    )


CASES: dict[str, Callable[[], Case]] = {
    function.__name__: function
    for function in (
        channel_shuffle, native_channel_shuffle, pixel_shuffle, gated_linear_unit, swiglu, flipped,
        permuted_by_a_buffer, rolled, prelu_and_group_norm, instance_norm, weight_norm, low_rank, outer_product,
        symmetric_square, multi_scale,
        mean_and_variance_by_hand, softmax_over_channels, slice_assignment, negative_slices, partial_rotation,
        separate_query_and_key_widths, multihead_attention_inside, bidirectional_stack, three_dimensional_transposed,
        grouped_transposed, depth_multiplier, bilinear, scaled_by_the_width, in_place_activations, lists_of_modules,
        mixture_by_einsum, unfolded, batch_of_windows,
    )
}  # fmt: skip

#: Operators that combine the cut axis themselves (a norm, a softmax): plain masking differs from a smaller model.
#: (A weight norm of a masked row divides zero by zero.)
INEXACT = {"mean_and_variance_by_hand", "softmax_over_channels", "mixture_by_einsum", "weight_norm"}


@pytest.mark.parametrize("name", CASES)
def test_pruned_by_half(name: str) -> None:
    model, inputs, most = CASES[name]()
    model.double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.bias.data.normal_()
    dense = copy.deepcopy(model).eval()
    result = dw.prune(model, tuple(t.double() for t in inputs(2)), ratio=0.5)
    assert result.parameters_after <= most * result.parameters_before, result.summary()
    assert result.verification.max_difference <= 1e-9
    small = copy.deepcopy(model).eval()
    for batch in (1, 3, 5):
        x = tuple(t.double() for t in inputs(batch))
        expected = masked(dense, result.plan.keep)(*x)
        actual = small(*x)
        assert actual.shape == expected.shape
        if name not in INEXACT:
            assert (expected - actual).abs().max() <= 1e-10
    assert bool(result.verification.reference != "the masked model itself") == (
        name in INEXACT and bool(result.plan.keep)
    )
    model.train()
    model(*(t.double() for t in inputs(4))).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def masked(dense: nn.Module, keep: dict[str, dict[int, torch.Tensor]]) -> nn.Module:
    """A copy of the dense model with zeros where the plan cuts."""
    twin = copy.deepcopy(dense)
    for name, parameter in twin.named_parameters():
        for dim, index in keep.get(name, {}).items():
            gone = torch.ones(parameter.shape[dim], dtype=torch.bool)
            gone[index] = False
            parameter.data.movedim(dim, 0)[gone] = 0
    return twin


def random_masks(model: nn.Module, generator: torch.Generator) -> dict[str, dict[str, torch.Tensor]]:
    """Rows of weights, with their bias or without, and sometimes columns: what pruners and users may have masked."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or "parametrizations" in path or torch.rand(1, generator=generator) < 0.25:
                continue
            dim = 0 if torch.rand(1, generator=generator) < 0.7 else 1
            keep = (torch.rand(parameter.shape[dim], generator=generator) < 0.6).double()
            place = [-1 if own == dim else 1 for own in range(parameter.dim())]
            found.setdefault(path, {})[name] = keep.view(place).expand(parameter.shape).clone()
            bias = getattr(module, "bias", None)
            rows = (
                dim == 0 and name == "weight" and isinstance(bias, nn.Parameter) and bias.shape == keep.shape
            )
            if rows and torch.rand(1, generator=generator) < 0.7:
                found[path]["bias"] = keep
    return found


@pytest.mark.parametrize("seed", [0, 1, 11])
@pytest.mark.parametrize("name", CASES)
def test_any_masks_are_realized_exactly(name: str, seed: int) -> None:
    """Whatever is masked, the result equals the masked model; what cannot be cut stays."""
    torch.manual_seed(seed)
    model, inputs, _ = CASES[name]()
    model.double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.bias.data.normal_()
    masks = random_masks(model, torch.Generator().manual_seed(seed))
    reference = copy.deepcopy(model).eval()
    for path, targets in masks.items():
        for parameter, mask in targets.items():
            getattr(reference.get_submodule(path), parameter).data.mul_(mask)
    result = dw.realize(model, tuple(t.double() for t in inputs(2)), masks=masks)
    assert result.parameters_after <= result.parameters_before
    assert result.verification.reference == "the masked model itself"
    small = copy.deepcopy(result.model).eval()
    for batch in (1, 4):
        x = tuple(t.double() for t in inputs(batch))
        expected = reference(*x)
        assert (expected - small(*x)).abs().max() <= 1e-9 * max(1.0, expected.abs().max().item())
