"""Steps for tokens (batch, tokens, width) and vectors (batch, width)."""

from __future__ import annotations

import random

import torch
from torch import nn
from torch.nn import functional as F

from support.random_graphs.step import Shape, Step, choose, divisors, require, step, width


class TokenStep(Step):
    ranks = (3,)


@step("norm")
class Norm(Step):
    ranks = (2, 3)

    def build(self, shape: Shape, pick: random.Random) -> None:
        own = shape[-1]
        kinds = ["layer", "rms", "own rms", "plain"] + (["batch"] if len(shape) == 2 else ["batch tokens"])
        self.kind = pick.choice(kinds)
        if self.kind == "layer":
            self.norm: nn.Module = nn.LayerNorm(own)
        elif self.kind == "rms":
            self.norm = nn.RMSNorm(own)
        elif self.kind.startswith("batch"):
            self.norm = nn.BatchNorm1d(own)
        self.weight = nn.Parameter(torch.randn(own))

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        if self.kind == "own rms":
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        if self.kind == "plain":
            return F.layer_norm(x, x.shape[-1:]) * self.weight
        if self.kind == "batch tokens":
            return self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self.norm(x)


@step("attention")
class Attention(TokenStep):
    """Fused or separate, grouped queries, own or torch's softmax, with or without norms of heads."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        own = shape[-1]
        self.heads, self.head_dim = pick.choice([2, 4]), pick.choice([4, 6])
        self.kv_heads = pick.choice([self.heads, self.heads, 2, 1])
        inside = self.heads * self.head_dim
        self.way = pick.choice(["separate", "fused reshape", "fused chunk", "fused inner"])
        self.inner = pick.choice(["torch", "manual", "einsum"])
        self.repeat = pick.choice(["interleave", "expand", "gqa"])
        self.normed, self.causal = pick.random() < 0.3, pick.random() < 0.3
        if self.way == "separate":
            self.q = nn.Linear(own, inside)
            self.k, self.v = (nn.Linear(own, self.kv_heads * self.head_dim) for _ in range(2))
        else:
            self.kv_heads = self.heads
            self.qkv = nn.Linear(own, 3 * inside, bias=pick.random() < 0.5)
        self.scale = self.head_dim**-0.5
        self.q_norm, self.k_norm = nn.LayerNorm(self.head_dim), nn.RMSNorm(self.head_dim)
        self.out = nn.Linear(inside, own)
        self.residual = pick.random() < 0.5

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        b, t, _ = x.shape
        if self.way == "fused reshape":
            return self.qkv(x).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.way == "fused inner":
            qkv = self.qkv(x).view(b, t, self.heads, 3 * self.head_dim).transpose(1, 2)
            return qkv.chunk(3, -1)
        if self.way == "fused chunk":
            return tuple(part.view(b, t, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        q = self.q(x).view(b, t, -1, self.head_dim).transpose(1, 2)
        return q, *(
            layer(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2) for layer in (self.k, self.v)
        )

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        q, k, v = self.project(x)
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        gqa = self.kv_heads != self.heads
        if gqa and not (self.repeat == "gqa" and self.inner == "torch"):
            times = self.heads // self.kv_heads
            if self.repeat == "interleave":
                k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
            else:
                b, h, t, d = k.shape
                k, v = (y[:, :, None].expand(b, h, times, t, d).reshape(b, h * times, t, d) for y in (k, v))
            gqa = False
        if self.inner == "torch":
            y = F.scaled_dot_product_attention(
                q, k, v, is_causal=self.causal, scale=self.scale if self.normed else None, enable_gqa=gqa
            )
        elif self.inner == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
            y = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)
        else:
            y = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        y = self.out(y.transpose(1, 2).flatten(2))
        return x + y if self.residual else y


@step("module_attention")
class ModuleAttention(TokenStep):
    def build(self, shape: Shape, pick: random.Random) -> None:
        heads = choose([d for d in (2, 4) if shape[-1] % d == 0], pick)
        self.attention = nn.MultiheadAttention(shape[-1], heads, batch_first=True, bias=pick.random() < 0.7)

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


@step("feed_forward")
class FeedForward(TokenStep):
    def build(self, shape: Shape, pick: random.Random) -> None:
        own, inside = shape[-1], pick.choice([8, 12])
        self.way = pick.choice(["plain", "gated", "fused"])
        self.up = nn.Linear(own, inside * (2 if self.way == "fused" else 1))
        self.gate = nn.Linear(own, inside, bias=False)
        self.down, self.norm = nn.Linear(inside, own), nn.LayerNorm(own)

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        y = self.up(self.norm(x))
        if self.way == "fused":
            first, second = y.chunk(2, -1)
            y = F.silu(first) * second
        elif self.way == "gated":
            y = F.silu(self.gate(x)) * y
        else:
            y = F.gelu(y)
        return x + self.down(y)


@step("recurrent")
class Recurrent(TokenStep):
    def build(self, shape: Shape, pick: random.Random) -> None:
        kind = pick.choice([nn.LSTM, nn.GRU, nn.RNN])
        hidden, both = pick.choice([4, 6]), pick.random() < 0.4
        layers = pick.choice([1, 1, 2])
        bias = pick.random() < 0.8
        self.layer = kind(shape[-1], hidden, layers, batch_first=True, bidirectional=both, bias=bias)
        self.last = pick.random() < 0.3

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        y, state = self.layer(x)
        if self.last and not self.layer.bidirectional:
            state = state[0] if isinstance(state, tuple) else state
            return y + state[-1].unsqueeze(1)
        return y


@step("mix_tokens")
class MixTokens(TokenStep):
    """Layers and convolutions along the tokens."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        tokens, own = shape[1:]
        self.way = pick.choice(["linear", "depthwise", "convolution"])
        self.mix = nn.Linear(tokens, tokens)
        self.up, self.down = nn.Linear(tokens, 8), nn.Linear(8, tokens)
        groups = own if self.way == "depthwise" else 1
        self.layer = nn.Conv1d(own, own if groups > 1 else width(pick), 3, padding=1, groups=groups)

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        y = x.transpose(1, 2)
        if self.way == "linear":
            return x + self.down(F.gelu(self.up(self.mix(y)))).transpose(1, 2)
        return self.layer(y).transpose(1, 2)


@step("positions")
class PositionTable(TokenStep):
    """Learned positions, a class token in front, or rolled tokens."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        self.way = pick.choice(["table", "class", "roll", "embedding", "drop"])
        self.table = nn.Parameter(torch.randn(1, shape[1], shape[2]))
        self.token = nn.Parameter(torch.randn(1, 1, shape[2]))
        self.embedding = nn.Embedding(shape[1], shape[2])
        self.register_buffer("numbers", torch.arange(shape[1]))
        require(shape[1] > 2)

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        if self.way == "table":
            return x + self.table
        if self.way == "embedding":
            return x + self.embedding(self.numbers)
        if self.way == "class":
            return torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return x.roll(1, 1) if self.way == "roll" else x[:, 1:]


@step("windows")
class Windows(TokenStep):
    """Windows move into the batch, a layer runs, and back."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        self.size = choose(divisors(shape[1]), pick)
        self.layer = nn.Linear(shape[2], shape[2])

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        b, t, d = x.shape
        y = x.view(b, t // self.size, self.size, d).reshape(-1, self.size, d)
        y = self.layer(y) + y.mean(1, keepdim=True)
        return y.view(b, t // self.size, self.size, -1).reshape(b, t, -1)


@step("linear_attention")
class LinearAttention(TokenStep):
    """Products of activations with no softmax, over all tokens."""

    def build(self, shape: Shape, pick: random.Random) -> None:
        inside = pick.choice([6, 8])
        self.q, self.k, self.v = (nn.Linear(shape[-1], inside) for _ in range(3))
        self.function = pick.choice([F.relu, lambda x: F.elu(x) + 1, torch.tanh, lambda x: x.softmax(-1)])

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        q, k, v = self.function(self.q(x)), self.function(self.k(x)), self.v(x)
        return torch.bmm(q, torch.bmm(k.transpose(1, 2), v)) / x.shape[1]


@step("tokens_to_vector")
class TokensToVector(TokenStep):
    def build(self, shape: Shape, pick: random.Random) -> None:
        self.way = pick.choice(["mean", "first", "last", "max", "attend", "flatten"])
        self.score = nn.Linear(shape[-1], 1)
        require(self.way != "flatten" or shape[1] * shape[2] <= 128)

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        if self.way == "attend":
            return (x * self.score(x).softmax(1)).sum(1)
        if self.way == "flatten":
            return x.flatten(1)
        if self.way in ("first", "last"):
            return x[:, 0 if self.way == "first" else -1]
        return x.mean(1) if self.way == "mean" else x.amax(1)


@step("vector_to_tokens")
class VectorToTokens(Step):
    ranks = (2,)

    def build(self, shape: Shape, pick: random.Random) -> None:
        self.tokens = choose([d for d in divisors(shape[-1]) if shape[-1] // d >= 2], pick)
        self.way = pick.choice(["unflatten", "view", "outer"])

    def forward(self, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        if self.way == "outer":
            return x.unsqueeze(1) * x.unsqueeze(2)
        if self.way == "view":
            return x.view(x.shape[0], self.tokens, -1)
        return x.unflatten(1, (self.tokens, x.shape[1] // self.tokens))
