"""Convolutional networks: shuffles, groups, gates, pyramids, and norms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from support.architectures.cases.composed import Composed, on_images, parameter
from support.architectures.example import Builder, Example


def _shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    batch, channels, height, width = x.shape
    return (
        x.view(batch, groups, channels // groups, height, width)
        .transpose(1, 2)
        .contiguous()
        .view(batch, channels, height, width)
    )


class _ShuffleUnit(nn.Module):
    """Half of the channels go past, half through a branch; then both are shuffled."""

    def __init__(self, half: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        past, through = x.chunk(2, dim=1)
        return _shuffle(torch.cat((past, self.branch(through)), 1), 2)


def _shuffled(half: int) -> Example:
    stages = [nn.Conv2d(3, 2 * half, 1), *(_ShuffleUnit(half) for _ in range(3)), nn.Conv2d(2 * half, 4, 1)]
    return on_images(nn.Sequential(*stages))


def channel_shuffle_even() -> Example:
    return _shuffled(16)


def channel_shuffle_odd() -> Example:
    """The halves are cut in the middle of a pair that the shuffle made."""
    return _shuffled(29)


def channel_shuffle_of_groups() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.reduce(m.stem(x)).relu()
        return m.head(m.expand(m.depthwise(_shuffle(x, m.groups))))

    return on_images(
        forward,
        groups=3,
        stem=nn.Conv2d(3, 24, 1),
        reduce=nn.Conv2d(24, 12, 1, groups=3),
        depthwise=nn.Conv2d(12, 12, 3, padding=1, groups=12),
        expand=nn.Conv2d(12, 24, 1, groups=3),
        head=nn.Conv2d(24, 4, 1),
    )


def squeeze_excite() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        gate = m.up(F.hardswish(m.down(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        return m.head((x * gate).mean((2, 3)))

    return on_images(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        down=nn.Conv2d(16, 8, 1),
        up=nn.Conv2d(8, 16, 1),
        head=nn.Linear(16, 3),
    )


def split_attention() -> Example:
    """Two groups of channels compete by a softmax over the groups (as ResNeSt does)."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.both(m.stem(x)).relu()
        batch, channels, height, width = x.shape
        x = x.reshape(batch, m.radix, channels // m.radix, height, width)
        gap = x.sum(1).mean((2, 3), keepdim=True)
        gates = m.up(m.down(gap).relu()).view(batch, m.radix, -1).softmax(1).reshape(batch, m.radix, -1, 1, 1)
        return m.head((x * gates).sum(1))

    return on_images(
        forward,
        radix=2,
        stem=nn.Conv2d(3, 16, 1),
        both=nn.Conv2d(16, 32, 3, groups=2),
        down=nn.Conv2d(16, 8, 1),
        up=nn.Conv2d(8, 32, 1),
        head=nn.Conv2d(16, 4, 1),
    )


def selective_kernels() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        branches = torch.stack([path(x) for path in m.paths], dim=1)
        squeezed = m.squeeze(branches.sum(1).mean((-2, -1))).relu()
        gates = torch.stack([gate(squeezed) for gate in m.gates], dim=1).softmax(1)
        return m.head((branches * gates[..., None, None]).sum(1))

    return on_images(
        forward,
        stem=nn.Conv2d(3, 16, 1),
        paths=nn.ModuleList([nn.Conv2d(16, 16, 3, padding=d, dilation=d) for d in (1, 2)]),
        squeeze=nn.Linear(16, 8),
        gates=nn.ModuleList([nn.Linear(8, 16) for _ in range(2)]),
        head=nn.Conv2d(16, 4, 1),
    )


def layer_scale() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        y = m.depthwise(x).permute(0, 2, 3, 1)
        y = m.out(F.gelu(m.inner(m.norm(y)))) * m.gamma
        return m.head(x + y.permute(0, 3, 1, 2))

    return on_images(
        forward,
        stem=nn.Conv2d(3, 16, 1),
        depthwise=nn.Conv2d(16, 16, 3, padding=1, groups=16),
        norm=nn.LayerNorm(16),
        inner=nn.Linear(16, 32),
        out=nn.Linear(32, 16),
        gamma=parameter(16),
        head=nn.Conv2d(16, 4, 1),
    )


def pixel_shuffle_and_back() -> Example:
    return on_images(
        nn.Sequential(
            nn.Conv2d(3, 32, 1),
            nn.PixelShuffle(2),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.PixelUnshuffle(2),
            nn.Conv2d(48, 4, 1),
        )
    )


def space_to_depth_by_hand() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        batch, channels, height, width = x.shape
        x = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 3, 5, 1, 2, 4)
        return m.head(x.reshape(batch, channels * 4, height // 2, width // 2))

    return on_images(forward, stem=nn.Conv2d(3, 16, 1), head=nn.Conv2d(64, 4, 1))


def transposed_convolutions() -> Example:
    return on_images(
        nn.Sequential(
            nn.Conv2d(3, 16, 3),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 16, 3, stride=2, groups=4),
            nn.BatchNorm2d(16),
            nn.ConvTranspose2d(16, 8, 2, stride=2),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 3, 1),
        )
    )


def one_dimensional() -> Example:
    model = nn.Sequential(
        nn.Conv1d(4, 16, 3, padding="same"),
        nn.BatchNorm1d(16),
        nn.PReLU(16),
        nn.MaxPool1d(2),
        nn.Conv1d(16, 16, 3, groups=4, padding_mode="circular", padding=1),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    return Example(model, (torch.randn(2, 4, 12),))


def three_dimensional() -> Example:
    model = nn.Sequential(
        nn.Conv3d(2, 16, 3, padding=1),
        nn.BatchNorm3d(16),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.ConvTranspose3d(16, 8, 2),
        nn.AdaptiveMaxPool3d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    return Example(model, (torch.randn(2, 2, 4, 4, 4),))


def norms_of_every_kind() -> Example:
    return on_images(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.Conv2d(16, 16, 1),
            nn.InstanceNorm2d(16, affine=True, track_running_stats=True),
            nn.SiLU(),
            nn.Conv2d(16, 16, 1),
            nn.InstanceNorm2d(16),
            nn.Conv2d(16, 16, 1),
            nn.GroupNorm(16, 16, affine=False),
            nn.Conv2d(16, 4, 1),
        )
    )


def local_response_norm() -> Example:
    return on_images(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.LocalResponseNorm(3), nn.Conv2d(16, 4, 1)
        )
    )


def root_mean_square_norm_by_hand() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x).flatten(2).transpose(1, 2)
        kind = x.dtype
        wide = x.float()
        x = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(kind) * m.weight
        return m.head(F.rms_norm(x, (x.shape[-1],), m.second))

    return on_images(
        forward,
        stem=nn.Conv2d(3, 16, 2, 2),
        weight=parameter(16),
        second=parameter(16),
        head=nn.Linear(16, 3),
    )


def weight_standardization() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        weight = m.conv.weight
        mean = weight.mean((1, 2, 3), keepdim=True)
        weight = (weight - mean) / (weight.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        return m.head(F.conv2d(m.stem(x), weight, m.conv.bias, padding=1).relu())

    return on_images(forward, stem=nn.Conv2d(3, 8, 1), conv=nn.Conv2d(8, 16, 3), head=nn.Conv2d(16, 4, 1))


def u_net() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        first = m.one(x).relu()
        second = m.two(F.max_pool2d(first, 2)).relu()
        middle = m.middle(F.max_pool2d(second, 2)).relu()
        up = m.up_two(torch.cat([F.interpolate(middle, scale_factor=2.0), second], 1)).relu()
        up = F.interpolate(up, size=first.shape[2:], mode="bilinear", align_corners=False)
        return m.head(m.up_one(torch.cat([up, first], 1)))

    return on_images(
        forward,
        one=nn.Conv2d(3, 8, 3, padding=1),
        two=nn.Conv2d(8, 16, 3, padding=1),
        middle=nn.Conv2d(16, 16, 3, padding=1),
        up_two=nn.Conv2d(32, 8, 3, padding=1),
        up_one=nn.Conv2d(16, 8, 3, padding=1),
        head=nn.Conv2d(8, 2, 1),
    )


def dense_block() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        features = [m.stem(x)]
        for norm, conv in zip(m.norms, m.convs, strict=True):
            features.append(conv(norm(torch.cat(features, 1)).relu()))
        return m.head(torch.cat(features, 1).mean((-1, -2)))

    widths = [16, 24, 32]
    return on_images(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        norms=nn.ModuleList([nn.BatchNorm2d(width) for width in widths]),
        convs=nn.ModuleList([nn.Conv2d(width, 8, 3, padding=1) for width in widths]),
        head=nn.Linear(40, 3),
    )


def unpooling() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.one(x).relu()
        pooled, places = F.max_pool2d(x, 2, return_indices=True)
        return m.head(F.max_unpool2d(m.two(pooled), places, 2))

    return on_images(
        forward, one=nn.Conv2d(3, 8, 3, padding=1), two=nn.Conv2d(8, 8, 1), head=nn.Conv2d(8, 4, 1)
    )


def channels_last() -> Example:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Hardswish(), nn.AvgPool2d(2), nn.Conv2d(16, 4, 1)
    ).to(memory_format=torch.channels_last)
    return Example(model, (torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last),))


def activations_that_join_channels() -> Example:
    """Gated linear unit, maxout, and a concatenated ReLU."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = F.glu(m.gated(x), dim=1)
        batch, _, height, width = x.shape
        x = m.pieces(x).view(batch, 8, 2, height, width).amax(2)
        x = m.one(x)
        return m.head(torch.cat([x.relu(), (-x).relu()], 1))

    return on_images(
        forward,
        gated=nn.Conv2d(3, 32, 1),
        pieces=nn.Conv2d(16, 16, 1),
        one=nn.Conv2d(8, 12, 1),
        head=nn.Conv2d(24, 4, 1),
    )


def sampled_by_offsets() -> Example:
    """The model computes where to look."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        offsets = m.offsets(x).tanh().permute(0, 2, 3, 1)
        return m.head(F.grid_sample(m.value(x), offsets, align_corners=False))

    return on_images(
        forward,
        stem=nn.Conv2d(3, 16, 1),
        offsets=nn.Conv2d(16, 2, 3, padding=1),
        value=nn.Conv2d(16, 8, 1),
        head=nn.Conv2d(8, 4, 1),
    )


def convolution_by_unfold_and_fold() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        columns = F.unfold(x, 3, padding=1)
        y = (m.weight.flatten(1) @ columns).view(x.shape[0], -1, *x.shape[2:])
        patches = F.unfold(y.relu(), 2, stride=2)
        return m.head(F.fold(m.mix(patches.transpose(1, 2)).transpose(1, 2), x.shape[-2:], 2, stride=2))

    return on_images(
        forward,
        stem=nn.Conv2d(3, 8, 1),
        weight=parameter(16, 8, 3, 3),
        mix=nn.Linear(64, 32),
        head=nn.Conv2d(8, 4, 1),
    )


def weights_chosen_by_the_input() -> Example:
    """Each image mixes its own kernels (dynamic convolution): batch and channels are folded together."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        batch, channels, height, width = x.shape
        mix = m.route(x.mean((2, 3))).softmax(-1)
        weight = torch.einsum("bk,koihw->boihw", mix, m.kernels)
        x = F.conv2d(
            x.reshape(1, batch * channels, height, width), weight.flatten(0, 1), padding=1, groups=batch
        )
        return m.head(x.view(batch, -1, height, width))

    return on_images(
        forward,
        stem=nn.Conv2d(3, 8, 1),
        route=nn.Linear(8, 3),
        kernels=parameter(3, 16, 8, 3, 3),
        head=nn.Conv2d(16, 4, 1),
    )


def stepwise_splits() -> Example:
    """Each part of a split is added to the next (as Res2Net does); a cross-stage part goes past."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        parts = torch.split(x, m.width, 1)
        done = [parts[0]]
        for part, conv in zip(parts[1:], m.convs, strict=True):
            done.append(conv(part + done[-1]).relu())
        x = m.mix(torch.cat(done, 1)) + x
        past, through = x.chunk(2, 1)
        return m.head(torch.cat([past, m.inner(through)], 1))

    return on_images(
        forward,
        width=8,
        stem=nn.Conv2d(3, 32, 1),
        convs=nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)]),
        mix=nn.Conv2d(32, 32, 1),
        inner=nn.Conv2d(16, 16, 1),
        head=nn.Conv2d(32, 4, 1),
    )


def pyramid_with_shared_head() -> Example:
    """Several levels, one head used on all of them; the outputs are a list."""

    def forward(m: Any, x: torch.Tensor) -> list[torch.Tensor]:
        low = m.low(x).relu()
        high = m.high(F.avg_pool2d(low, 2)).relu()
        top = m.lateral_high(high)
        bottom = m.lateral_low(low) + F.interpolate(top, size=low.shape[-2:], mode="nearest")
        return [m.head(m.tower(level).relu()) for level in (bottom, top)]

    return on_images(
        forward,
        low=nn.Conv2d(3, 8, 3, padding=1),
        high=nn.Conv2d(8, 16, 3, padding=1),
        lateral_low=nn.Conv2d(8, 12, 1),
        lateral_high=nn.Conv2d(16, 12, 1),
        tower=nn.Conv2d(12, 12, 3, padding=1),
        head=nn.Conv2d(12, 5, 1),
    )


def inverted_residual() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        return m.head((x + m.block(x)).mean((2, 3)))

    block = nn.Sequential(
        nn.Conv2d(16, 32, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU6(inplace=True),
        nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU6(inplace=True),
        nn.Conv2d(32, 16, 1, bias=False),
        nn.BatchNorm2d(16),
    )
    return on_images(forward, stem=nn.Conv2d(3, 16, 3), block=block, head=nn.Linear(16, 3))


def siamese() -> Example:
    def forward(m: Any, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        one, two = m.tower(first).flatten(1), m.tower(second).flatten(1)
        return F.cosine_similarity(m.project(one), m.project(two))

    tower = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
    model = Composed(forward, tower=tower, project=nn.Linear(64, 16))
    return Example(model, (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)))


MODELS: dict[str, Builder] = {
    case.__name__: case
    for case in (
        channel_shuffle_even, channel_shuffle_odd, channel_shuffle_of_groups, squeeze_excite, split_attention,
        selective_kernels, layer_scale, pixel_shuffle_and_back, space_to_depth_by_hand, transposed_convolutions,
        one_dimensional, three_dimensional, norms_of_every_kind, local_response_norm, root_mean_square_norm_by_hand,
        weight_standardization, u_net, dense_block, unpooling, channels_last, activations_that_join_channels,
        sampled_by_offsets, convolution_by_unfold_and_fold, weights_chosen_by_the_input, stepwise_splits,
        pyramid_with_shared_head, inverted_residual, siamese,
    )
}  # fmt: skip
