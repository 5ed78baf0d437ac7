"""Steps that users write and that are easy to get wrong: literals, buffers, written memory, products of activations."""

from __future__ import annotations

import random

import torch
from torch import nn
from torch.nn import functional as F

from support.random_graphs.step import (
    Shape,
    Step,
    channel_dim,
    channels,
    choose,
    dense,
    divisors,
    require,
    step,
    width,
)


@step("literal")
class Literal(Step):
    """Sizes that stand as plain numbers in the code (a closure holds them here)."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        own, dim = channels(shape), channel_dim(shape)
        require(own >= 4)
        number = pick.randint(2, own - 1)
        group = choose(divisors(own), pick)
        self.function = pick.choice(
            [
                lambda x: x.narrow(dim, 0, number),
                lambda x: torch.cat([x.narrow(dim, 0, number) * 2, x.narrow(dim, number, own - number)], dim),
                lambda x: x.unflatten(dim, (group, own // group)).sum(dim),
                lambda x: x.unflatten(dim, (-1, group)).flatten(dim, dim + 1).relu(),
                lambda x: (
                    x.movedim(dim, -1)
                    .reshape(-1, own)
                    .relu()
                    .reshape(x.movedim(dim, -1).shape)
                    .movedim(-1, dim)
                ),
                lambda x: torch.cat(x.split(group, dim)[::-1], dim),
            ]
        )

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        return self.function(x)


@step("buffer")
class Buffer(Step):
    """Buffers along the channels, as factors, shifts, or numbers that say which channels to take."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        own, dim = channels(shape), channel_dim(shape)
        place = [1] * len(shape)
        place[dim] = own
        self.dim = dim
        self.register_buffer("factor", torch.randn(place))
        self.register_buffer("order", torch.randperm(own))
        self.plain = torch.randn(place)
        self.way = pick.choice(["factor", "shift", "order", "plain", "constant", "select"])
        self.count = own

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        if self.way == "factor":
            return x * self.factor
        if self.way == "shift":
            return x + self.factor
        if self.way == "plain":
            return x * self.plain
        if self.way == "order":
            return x.movedim(self.dim, -1)[..., self.order].movedim(-1, self.dim)
        if self.way == "select":
            return x.index_select(self.dim, self.order[: self.order.shape[0] // 2])
        return x + torch.linspace(0, 1, self.count, dtype=x.dtype).view(self.factor.shape)


@step("mask")
class Masked(Step):
    """Multiplied with something that depends on other channels or on positions."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        self.dim = channel_dim(shape)
        self.way = pick.choice(["first", "top", "one", "compare", "mean of both"])

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        if self.way == "first":
            return x * torch.sigmoid(x.select(self.dim, 0).unsqueeze(self.dim))
        if self.way == "top":
            return x.topk(2, self.dim).values
        if self.way == "one":
            return (
                x.movedim(self.dim, -1)[..., :1].expand_as(x.movedim(self.dim, -1)).movedim(-1, self.dim) + x
            )
        if self.way == "compare":
            return x * (x >= x.mean(self.dim, keepdim=True)).to(x.dtype)
        return x - x.mean()


@step("products")
class Products(Step):
    """Products of activations over channels or positions."""

    ranks = (3, 4)

    def build(self, shape: Shape, pick: random.Random) -> None:
        self.way = pick.choice(["channels", "positions", "cosine", "einsum", "addbmm"])
        self.one, self.two = dense(shape, width(pick), pick), dense(shape, channels(shape), pick)
        self.image = len(shape) == 4

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        a, b = self.one(x), self.two(x)
        if self.image:
            a, b = a.flatten(2).transpose(1, 2), b.flatten(2).transpose(1, 2)
        if self.way == "channels":
            weights = (a.transpose(1, 2) @ b).softmax(-1)  # one width x the other
            y = a @ weights
        elif self.way == "positions":
            y = (b @ b.transpose(1, 2)) @ b / b.shape[1]
        elif self.way == "cosine":
            c = F.normalize(a, dim=-1)
            y = (c @ c.transpose(1, 2)).softmax(-1) @ b
        elif self.way == "einsum":
            y = torch.einsum("bte,btf,bsf->bse", a, b, b)
            y = y[..., :1] * b
        else:
            y = torch.baddbmm(b, a @ a.transpose(1, 2), b, alpha=0.1)
        return y.transpose(1, 2).reshape(x.shape[0], -1, x.shape[2], x.shape[3]) if self.image else y


@step("normalised_weight")
class NormalisedWeight(Step):
    """Weight norm and spectral scale by a parametrization."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        layer = dense(shape, width(pick), pick)
        self.layer = torch.nn.utils.parametrizations.weight_norm(layer, dim=pick.choice([0, 0, 1]))

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        return self.layer(x)


@step("cross")
class Cross(Step):
    """Attention to an earlier tensor of tokens."""

    ranks = (3,)

    def build(self, shape: Shape, pick: random.Random) -> None:
        self.place: int | None = None
        self.heads, self.width = 2, pick.choice([4, 6])
        self.q = nn.Linear(shape[-1], self.heads * self.width)
        self.kv = nn.LazyLinear(2 * self.heads * self.width)
        self.out = nn.Linear(self.heads * self.width, shape[-1])

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        if self.place is None:
            self.place = next(n for n, other in enumerate(saved) if other.dim() == 3)
        other = saved[self.place]
        q = self.q(x).unflatten(-1, (self.heads, self.width)).transpose(1, 2)
        kv = self.kv(other).reshape(*other.shape[:2], self.heads, 2, self.width).permute(3, 0, 2, 1, 4)
        y = F.scaled_dot_product_attention(q, kv[0], kv[1], scale=0.5)
        return x + self.out(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


@step("windows_of_space")
class WindowsOfSpace(Step):
    """im2col and back, dilated or deep convolutions, positions made by a grid."""

    ranks = (4,)

    def build(self, shape: Shape, pick: random.Random) -> None:
        self.way = pick.choice(["unfold", "fold", "involution", "three d", "sample"])
        self.layer = nn.Conv3d(1, 4, (1, 3, 3), padding=(0, 1, 1))
        self.make = nn.Conv2d(shape[1], 9, 1)
        require(shape[1] <= 12)

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        b, c, h, w = x.shape
        if self.way == "unfold":
            return F.unfold(x, 3, padding=1).view(b, -1, h, w)
        columns = F.unfold(x, 3, padding=1)
        if self.way == "fold":
            return F.fold(columns * 0.5, (h, w), 3, padding=1)
        if self.way == "involution":
            weights = self.make(x).view(b, 1, 9, h * w)
            return (columns.view(b, c, 9, h * w) * weights).sum(2).view(b, c, h, w)
        if self.way == "three d":
            return self.layer(x.unsqueeze(1)).sum(1)
        grid = torch.tanh(x.mean(1)[..., None].expand(b, h, w, 2))
        return F.grid_sample(x, grid, align_corners=False)


@step("several")
class Several(Step):
    """A stack of layers' results, summed with weights of another layer (experts, all of them used)."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        own = channels(shape)
        self.experts = nn.ModuleList([dense(shape, own, pick) for _ in range(3)])
        self.router = dense(shape, 3, pick)
        self.dim = channel_dim(shape)
        self.way = pick.choice(["stack", "unbind", "sum"])

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        results = [F.gelu(expert(x)) for expert in self.experts]
        if self.way == "sum":
            return sum(results[1:], results[0])
        weights = self.router(x).softmax(self.dim)
        if self.way == "unbind":
            parts = weights.unbind(self.dim)
            return sum(r * p.unsqueeze(self.dim) for r, p in zip(results, parts, strict=True))
        return (torch.stack(results, 0) * weights.movedim(self.dim, 0).unsqueeze(self.dim + 1)).sum(0)
