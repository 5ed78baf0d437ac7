"""Steps for any layout: layers, activations, sums, concatenations, cuts, gates."""

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
    with_channels,
)

ACTIVATIONS = (
    F.relu, F.gelu, F.silu, torch.tanh, torch.sigmoid, F.softplus, F.hardswish, F.elu, F.mish, torch.cos, torch.abs,
    lambda x: x * x, lambda x: F.leaky_relu(x, 0.1), lambda x: x.clamp(-1, 2), lambda x: F.elu(x) + 1, F.relu6,
    lambda x: torch.exp(-x * x), lambda x: x.masked_fill(x < 0, 0.5), lambda x: torch.where(x > 0, x, 0.1 * x),
)  # fmt: skip


@step("dense")
class Dense(Step):
    def build(self, shape: Shape, pick: random.Random) -> None:
        self.layer = dense(shape, width(pick), pick)

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        return self.layer(x)


@step("activation")
class Activation(Step):
    def build(self, shape: Shape, pick: random.Random) -> None:
        self.function = pick.choice(ACTIVATIONS)

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        return self.function(x)


@step("block")
class Block(Step):
    """A residual block; its width inside is its own."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        inside = width(pick)
        self.up, self.down = (
            dense(shape, inside, pick),
            dense(
                (*shape[:1], inside, *shape[2:]) if len(shape) == 4 else (*shape[:-1], inside),
                channels(shape),
                pick,
            ),
        )
        self.function = pick.choice(ACTIVATIONS)

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        return x + self.down(self.function(self.up(x)))


@step("shared")
class Shared(Step):
    """One layer that is used twice."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        self.layer = dense(shape, channels(shape), pick)

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        return self.layer(F.relu(self.layer(x)))


@step("add_saved")
class AddSaved(Step):
    """A skip from an earlier tensor of the same shape."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        self.times = pick.random() < 0.4
        self.place: int | None = None

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        if self.place is None:  # chosen when the model is built: shapes may agree by chance later
            self.place = next(n for n, other in enumerate(saved) if other.shape == x.shape)
        other = saved[self.place]
        return x * other if self.times else x + other


@step("concatenate")
class Concatenate(Step):
    """With an earlier tensor, or with layers on itself."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        self.other = dense(shape, width(pick), pick)
        self.order = pick.random() < 0.5
        self.reuse = pick.random() < 0.4
        self.dim = channel_dim(shape)
        require(channels(shape) <= 24)

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        parts = [x, self.other(x)]
        if self.reuse:
            parts.append(parts[self.order] * 0.5)
        return torch.cat(parts if self.order else parts[::-1], self.dim)


@step("split")
class Split(Step):
    """Cut in two parts of any size; each gets a layer of its own, or they change places."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        own = channels(shape)
        self.first = pick.randint(1, own - 1)
        self.second, self.dim = own - self.first, channel_dim(shape)
        self.way = pick.choice(["swap", "layers", "slice", "narrow"])
        halves = (with_channels(shape, number) for number in (self.first, self.second))
        self.layers = nn.ModuleList([dense(half, 6, pick) for half in halves])

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        if self.way == "slice":
            a = x.movedim(self.dim, -1)[..., : self.first].movedim(-1, self.dim)
            b = x.movedim(self.dim, -1)[..., self.first :].movedim(-1, self.dim)
        elif self.way == "narrow":
            a, b = x.narrow(self.dim, 0, self.first), x.narrow(self.dim, self.first, self.second)
        else:
            a, b = torch.split(x, [self.first, self.second], self.dim)
        if self.way == "swap":
            return torch.cat([b, a], self.dim)
        return self.layers[0](a) + F.relu(self.layers[1](b))


@step("chunk")
class Chunk(Step):
    """Two or three equal parts: a gate, a sum, a shuffle, or a weighted mean of the stacked parts."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        self.parts = choose([n for n in (2, 3, 4) if channels(shape) % n == 0 and channels(shape) > n], pick)
        self.dim = channel_dim(shape)
        self.way = pick.choice(["gate", "sum", "reverse", "stack", "unflatten", "glu", "own"])
        self.weight = nn.Parameter(torch.randn(self.parts))
        require(self.way != "glu" or self.parts == 2)

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        if self.way == "glu":
            return F.glu(x, self.dim)
        if self.way == "unflatten":
            cut = x.unflatten(self.dim, (self.parts, -1)).movedim(self.dim, -1)
            return (cut * self.weight.softmax(0)).sum(-1)
        parts = x.chunk(self.parts, self.dim)
        if self.way == "gate":
            return torch.sigmoid(parts[0]) * parts[1]
        if self.way == "sum":
            return sum(parts[1:], parts[0])
        if self.way == "own":
            return torch.cat([F.relu(parts[0]), *parts[1:]], self.dim)
        if self.way == "reverse":
            return torch.cat(parts[::-1], self.dim)
        first, *others = torch.stack(parts, 0).unbind(0)
        return first - others[-1]


@step("shuffle")
class Shuffle(Step):
    """groups x channels becomes channels x groups."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        self.groups = choose(divisors(channels(shape)), pick)
        self.dim = channel_dim(shape)

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        cut = x.unflatten(self.dim, (self.groups, x.shape[self.dim] // self.groups))
        return cut.transpose(self.dim, self.dim + 1).flatten(self.dim, self.dim + 1)


@step("scale")
class Scale(Step):
    """A factor and a shift a channel, or one for all."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        size = pick.choice([channels(shape), channels(shape), 1])
        place = [1] * len(shape)
        place[channel_dim(shape)] = size
        self.gamma, self.beta = nn.Parameter(torch.randn(place)), nn.Parameter(torch.randn(place))
        self.prelu = nn.PReLU(channels(shape) if len(shape) in (2, 4) else 1)

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        return self.prelu(x * self.gamma + self.beta)


@step("gate")
class Gate(Step):
    """Squeeze and excite, or a gate from a layer."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        own = channels(shape)
        self.squeeze = pick.random() < 0.6
        inside = width(pick)
        self.down, self.up = dense(shape, inside, pick), dense(with_channels(shape, inside), own, pick)
        self.dims = {2: (), 3: (1,), 4: (2, 3)}[len(shape)]
        self.function = pick.choice([torch.sigmoid, F.hardsigmoid, torch.tanh, lambda x: x.softmax(-1)])

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        held = x.mean(self.dims, keepdim=True) if self.squeeze and self.dims else x
        return x * self.function(self.up(F.relu(self.down(held))))


@step("over_channels")
class OverChannels(Step):
    """Something that combines the channels."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        self.dim = channel_dim(shape)
        self.way = pick.choice(
            [
                "softmax",
                "mean",
                "norm",
                "max",
                "sum",
                "centre",
                "std",
                "cumsum",
                "roll",
                "flip",
                "logsumexp",
                "sort",
            ]
        )

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        d = self.dim
        if self.way == "softmax":
            return x * x.softmax(d)
        if self.way == "mean":
            return x * torch.sigmoid(x.mean(d, keepdim=True))
        if self.way == "norm":
            return F.normalize(x, dim=d)
        if self.way == "max":
            return x - x.amax(d, keepdim=True)
        if self.way == "sum":
            return x * torch.tanh(x.sum(d, keepdim=True))
        if self.way == "centre":
            return x - x.mean(d, keepdim=True)
        if self.way == "std":
            return x / (x.var(d, keepdim=True, unbiased=False) + 1e-3).sqrt()
        if self.way == "logsumexp":
            return x - torch.logsumexp(x, d, keepdim=True)
        if self.way == "cumsum":
            return x.cumsum(d)
        if self.way == "sort":
            return x.sort(d).values
        return x.roll(1, d) if self.way == "roll" else x.flip(d)


@step("weight_made")
class WeightMade(Step):
    """A layer whose weight is computed: low rank, standardised, or a sum of two."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        own, out, rank = channels(shape), width(pick), pick.choice([4, 5])
        self.left, self.right = (
            nn.Parameter(torch.randn(out, rank) / 2),
            nn.Parameter(torch.randn(rank, own) / 2),
        )
        self.base = nn.Parameter(torch.randn(out, own) / 2)
        self.way = pick.choice(["low rank", "standardised", "sum", "scaled"])
        self.dim = channel_dim(shape)

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        weight = self.base
        if self.way == "low rank":
            weight = self.left @ self.right
        elif self.way == "sum":
            weight = weight + self.left @ self.right
        elif self.way == "standardised":
            weight = (weight - weight.mean(1, keepdim=True)) / (weight.std(1, keepdim=True) + 0.1)
        else:
            weight = weight * self.left[:, :1]
        return F.linear(x.movedim(self.dim, -1), weight).movedim(-1, self.dim)


@step("einsum")
class Einsum(Step):
    """A contraction with a weight, or per group, in einsum notation."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        own = channels(shape)
        self.dim = channel_dim(shape)
        self.grouped = pick.random() < 0.4
        if self.grouped:
            self.groups = choose(divisors(own), pick)
            self.weight = nn.Parameter(torch.randn(self.groups, own // self.groups, pick.choice([3, 4])))
        else:
            self.weight = nn.Parameter(torch.randn(own, width(pick)) / 2)

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        x = x.movedim(self.dim, -1)
        if self.grouped:
            x = x.unflatten(-1, (self.groups, -1))
            return torch.einsum("...gi,gio->...go", x, self.weight).flatten(-2).movedim(-1, self.dim)
        return torch.einsum("...i,io->...o", x, self.weight).movedim(-1, self.dim)


@step("repeat")
class Repeat(Step):
    """Channels repeated as a whole, one by one, or expanded."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        self.times, self.dim = pick.choice([2, 3]), channel_dim(shape)
        self.way = pick.choice(["repeat", "interleave", "expand_inner", "expand_outer"])
        self.rank = len(shape)
        require(channels(shape) * self.times <= 36)

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        if self.way == "repeat":
            times = [1] * self.rank
            times[self.dim] = self.times
            return x.repeat(times)
        if self.way == "interleave":
            return x.repeat_interleave(self.times, self.dim)
        place = self.dim + (self.way == "expand_inner")
        x = x.unsqueeze(place)
        sizes = [-1] * (self.rank + 1)
        sizes[place] = self.times
        return x.expand(sizes).flatten(self.dim, self.dim + 1)


@step("write")
class Write(Step):
    """An in-place write into part of a fresh tensor or of a copy."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        self.part, self.dim = pick.randint(1, channels(shape) - 1), channel_dim(shape)
        self.way = pick.choice(["relu_", "slice", "add_"])

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        y = x.clone()
        if self.way == "relu_":
            return F.relu(y, inplace=True)
        if self.way == "add_":
            return y.add_(x, alpha=0.5).mul_(2)
        part = y.movedim(self.dim, -1)[..., : self.part]
        part.mul_(0.5)
        return y
