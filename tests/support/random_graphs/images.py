"""Steps for images (batch, channels, height, width)."""

from __future__ import annotations

import random

import torch
from torch import nn
from torch.nn import functional as F

from support.random_graphs.step import Shape, Step, choose, divisors, require, step, width


class ImageStep(Step):
    ranks = (4,)


@step("convolution")
class Convolution(ImageStep):
    """Plain, grouped, depthwise, strided or dilated."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        own = shape[1]
        kind = pick.choice(["plain", "grouped", "depthwise", "multiplier", "strided"])
        groups, out, stride = 1, width(pick), 1
        if kind == "grouped":
            groups = choose(divisors(own), pick)
            out = groups * pick.choice([2, 3, 4])
        elif kind in ("depthwise", "multiplier"):
            groups, out = own, own * (1 if kind == "depthwise" else 2)
        elif kind == "strided":
            require(shape[2] >= 4)
            stride = 2
        require(out <= 36)
        self.layer = nn.Conv2d(own, out, 3, stride, padding=1, groups=groups, bias=pick.random() < 0.6)

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        return self.layer(x)


@step("transposed")
class Transposed(ImageStep):
    def build(self, shape: Shape, pick: random.Random) -> None:
        require(shape[2] <= 4)
        groups = pick.choice([1, *divisors(shape[1])[:1]])
        out = groups * pick.choice([2, 4])
        self.layer = nn.ConvTranspose2d(shape[1], out, 2, 2, groups=groups)

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        return self.layer(x)


@step("image_norm")
class ImageNorm(ImageStep):
    def build(self, shape: Shape, pick: random.Random) -> None:
        own = shape[1]
        kind = pick.choice(
            ["batch", "batch plain", "group", "instance", "layer", "whole", "response", "tracked"]
        )
        self.kind = kind
        if kind.startswith("batch"):
            self.norm = nn.BatchNorm2d(own, affine=kind == "batch")
        elif kind == "group":
            self.norm = nn.GroupNorm(pick.choice([1, own, *divisors(own)]), own)
        elif kind in ("instance", "tracked"):
            self.norm = nn.InstanceNorm2d(
                own, affine=pick.random() < 0.5, track_running_stats=kind == "tracked"
            )
            require(shape[2] > 1)
        elif kind == "layer":
            self.norm = nn.LayerNorm(own)
        elif kind == "whole":
            self.norm = nn.LayerNorm([*shape[1:]])
        else:
            self.norm = nn.LocalResponseNorm(3)

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        if self.kind == "layer":
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.norm(x)


@step("bottleneck")
class Bottleneck(ImageStep):
    """1x1, grouped 3x3, norm, 1x1, plus the input."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        inside = pick.choice([8, 12])
        self.a, self.n = nn.Conv2d(shape[1], inside, 1), nn.BatchNorm2d(inside)
        self.b = nn.Conv2d(inside, inside, 3, padding=1, groups=pick.choice([1, 2, 4, inside]), bias=False)
        self.c = nn.Conv2d(inside, shape[1], 1)

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        return x + self.c(F.relu(self.n(self.b(F.relu(self.a(x))))))


@step("pixel")
class Pixel(ImageStep):
    """Pixel shuffle or unshuffle, or patch merging by slices."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        self.way = pick.choice(["shuffle", "unshuffle", "merge"])
        if self.way == "shuffle":
            require(shape[1] % 4 == 0 and shape[1] >= 8 and shape[2] <= 4)
        else:
            require(shape[2] % 2 == 0 and shape[1] <= 8)
        self.factor = 2

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        if self.way == "shuffle":
            return F.pixel_shuffle(x, self.factor)
        if self.way == "unshuffle":
            return F.pixel_unshuffle(x, self.factor)
        return torch.cat([x[:, :, i::2, j::2] for j in (0, 1) for i in (0, 1)], 1)


@step("pool")
class Pool(ImageStep):
    def build(self, shape: Shape, pick: random.Random) -> None:
        require(shape[2] >= 4)
        self.way = pick.choice(["max", "average", "adaptive", "stack"])

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        if self.way == "max":
            return F.max_pool2d(x, 2)
        if self.way == "average":
            return F.avg_pool2d(x, 3, 2, 1)
        if self.way == "adaptive":
            return F.adaptive_avg_pool2d(x, 2)
        return F.avg_pool2d(x, 2) + F.max_pool2d(x, 2)


@step("space")
class Space(ImageStep):
    """Roll, pad, resize, flip: only space is touched."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        self.way = pick.choice(["roll", "resize", "pad", "flip", "transpose"])

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        if self.way == "roll":
            return x.roll((1, 1), (2, 3))
        if self.way == "pad":
            return F.pad(x, (1, 0, 1, 0), value=0.5)[:, :, :-1, 1:].contiguous()
        if self.way == "flip":
            return x.flip(3)
        if self.way == "transpose":
            return x.transpose(2, 3) + x if x.shape[2] == x.shape[3] else x
        return F.interpolate(x, scale_factor=1.0, mode="bilinear") + x


@step("selective")
class Selective(ImageStep):
    """Two branches weighted by a softmax between them (selective kernels, split attention)."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        own, inside = shape[1], width(pick)
        self.branches = nn.ModuleList([nn.Conv2d(own, own, 3, padding=1, groups=g) for g in (1, own)])
        self.squeeze, self.excite = nn.Linear(own, inside), nn.Linear(inside, 2 * own)
        self.joined = pick.random() < 0.5

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        feats = torch.stack([branch(x) for branch in self.branches], 1)
        weights = self.excite(F.relu(self.squeeze(feats.sum(1).mean((2, 3)))))
        weights = weights.view(x.shape[0], 2, -1).softmax(1)
        return (feats * weights[:, :, :, None, None]).sum(1)


@step("to_tokens")
class ToTokens(ImageStep):
    def build(self, shape: Shape, pick: random.Random) -> None:
        self.way = pick.choice(["flatten", "reshape", "permute"])

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        if self.way == "flatten":
            return x.flatten(2).transpose(1, 2)
        if self.way == "reshape":
            b, c, h, w = x.shape
            return x.reshape(b, c, h * w).permute(0, 2, 1)
        return x.permute(0, 2, 3, 1).flatten(1, 2)


@step("to_vector")
class ToVector(ImageStep):
    def build(self, shape: Shape, pick: random.Random) -> None:
        self.way = pick.choice(["mean", "pool", "flatten", "max"])
        require(self.way != "flatten" or shape[1] * shape[2] * shape[3] <= 128)

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        if self.way == "flatten":
            return x.flatten(1)
        if self.way == "pool":
            return F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1)
        return x.mean((2, 3)) if self.way == "mean" else x.amax((2, 3))
