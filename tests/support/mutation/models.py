"""Small models, one for each relation that a rule states. Sizes agree where a wrong relation would still fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Tensor = torch.Tensor


class Net(nn.Module):
    """Layers and numbers by name, and a function of the module and its input."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **held: Any) -> None:
        super().__init__()
        self.function = function
        for name, item in held.items():
            setattr(self, name, item)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _attend(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(batch, heads, tokens, width) each; joined and projected."""
    y = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
    return m.out(y.transpose(1, 2).flatten(2))


def _heads(x: Tensor, heads: int, width: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], heads, width).transpose(1, 2)


def _fused(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    qkv = m.qkv(x).reshape(x.shape[0], x.shape[1], 3, m.heads, m.width).permute(2, 0, 3, 1, 4)
    return m.head(x + _attend(m, *qkv.unbind(0)))


def _chunked(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.head(x + _attend(m, *(_heads(part, m.heads, m.width) for part in m.qkv(x).chunk(3, -1))))


def _grouped(m: Any, x: Tensor, how: str) -> Tensor:
    q = _heads(m.q(x), m.heads, m.width)
    k, v = _heads(m.k(x), m.groups, m.width), _heads(m.v(x), m.groups, m.width)
    times = m.heads // m.groups
    if how == "gqa":
        y = F.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True)
        return m.out(y.transpose(1, 2).flatten(2))
    if how == "interleave":
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    else:
        b, h, t, d = k.shape
        k, v = (y[:, :, None].expand(b, h, times, t, d).reshape(b, h * times, t, d) for y in (k, v))
    return _attend(m, q, k, v)


def _grouped_layers() -> dict[str, Any]:
    return {
        "q": nn.Linear(6, 16), "k": nn.Linear(6, 8), "v": nn.Linear(6, 8), "out": nn.Linear(16, 5), "heads": 4,
        "groups": 2, "width": 4,
    }  # fmt: skip


def _attention_layers() -> dict[str, Any]:
    return {
        "stem": nn.Linear(5, 12), "qkv": nn.Linear(12, 48), "out": nn.Linear(16, 12), "head": nn.Linear(12, 5),
        "heads": 4, "width": 4,
    }  # fmt: skip


def _shuffle(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    b, c, h, w = x.shape
    x = x.view(b, m.groups, c // m.groups, h, w).transpose(1, 2).reshape(b, c, h, w)
    return m.b(F.relu(x)).mean((2, 3))


def _selective(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    both = torch.stack([m.one(x), m.two(x)], 1)
    weights = m.up(F.relu(m.down(both.sum(1).mean((2, 3))))).view(x.shape[0], 2, -1).softmax(1)
    return m.head((both * weights[:, :, :, None, None]).sum(1).mean((2, 3)))


def _train_only(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.stem(x))
    y = m.head(F.relu(m.middle(x)))
    if m.training:
        y = y + m.extra(F.relu(torch.cat([m.one(x), m.two(x)], -1)))
    return y


def _involution(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    b, c, h, w = x.shape
    columns = F.unfold(x, 3, padding=1).view(b, c, 9, h * w)
    return m.head((columns * m.weights(x).view(b, 1, 9, h * w)).sum(2).mean(-1))


def _gated(gate: Tensor, x: Tensor) -> Tensor:
    return torch.sigmoid(gate) * x


def _apart(m: Any, first: Tensor, second: Tensor) -> Tensor:
    """Each part has a reader of its own."""
    return m.b(first) + m.c(torch.tanh(second))


def _square(m: Any, x: Tensor) -> Tensor:
    return m.a(x).unflatten(1, (m.n, m.n))


def _two(a: nn.Module, b: nn.Module, function: Callable[[Any, Tensor], Tensor], **more: Any) -> Net:
    return Net(function, a=a, b=b, **more)


def _images(size: int = 4) -> Tensor:
    return torch.randn(2, 3, size, size)


def _tokens() -> Tensor:
    return torch.randn(2, 5, 6)


#: Name -> a function that returns the model and its input.
MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 5)),
        torch.randn(4, 6),
    ),
    "residual": lambda: (
        Net(
            lambda m, x: m.head(m.stem(x) + m.down(F.relu(m.up(m.stem(x))))),
            stem=nn.Linear(6, 8), up=nn.Linear(8, 12), down=nn.Linear(12, 8), head=nn.Linear(8, 5),
        ),
        torch.randn(4, 6),
    ),
    "gates": lambda: (
        Net(
            lambda m, x: m.head(F.silu(m.a(x)) * m.b(x) - m.c(x)),
            a=nn.Linear(6, 8), b=nn.Linear(6, 8), c=nn.Linear(6, 8), head=nn.Linear(8, 5),
        ),
        torch.randn(4, 6),
    ),
    "concatenation": lambda: (
        Net(
            lambda m, x: m.head(F.relu(torch.cat([m.a(x), m.b(x)], -1))),
            a=nn.Linear(6, 8), b=nn.Linear(6, 8), head=nn.Linear(16, 5),
        ),
        torch.randn(4, 6),
    ),
    "concatenated images": lambda: (
        Net(
            lambda m, x: m.head(F.relu(m.norm(torch.cat([m.a(x), m.b(x), m.a(x)], 1)))).mean((2, 3)),
            a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 3, padding=1), norm=nn.BatchNorm2d(12), head=nn.Conv2d(12, 5, 1),
        ),
        _images(),
    ),
    "chunks": lambda: (
        _two(nn.Linear(6, 16), nn.Linear(8, 5), lambda m, x: m.b(_gated(*m.a(x).chunk(2, -1)))),
        torch.randn(4, 6),
    ),
    "separate chunks": lambda: (
        Net(
            lambda m, x: m.b(m.a(x).chunk(2, -1)[0]) + m.c(F.relu(m.a(x).chunk(2, -1)[1])),
            a=nn.Linear(6, 16), b=nn.Linear(8, 5), c=nn.Linear(8, 5),
        ),
        torch.randn(4, 6),
    ),
    "sizes of parts": lambda: (
        Net(
            lambda m, x: _apart(m, *torch.split(m.a(x), [m.n, m.n], -1)),
            a=nn.Linear(6, 16), b=nn.Linear(8, 5), c=nn.Linear(8, 5), n=8,
        ),
        torch.randn(4, 6),
    ),
    "slices": lambda: (
        Net(
            lambda m, x: m.b(m.a(x)[..., : m.n]) + m.c(torch.tanh(m.a(x)[..., m.n :])),
            a=nn.Linear(6, 16), b=nn.Linear(8, 5), c=nn.Linear(8, 5), n=8,
        ),
        torch.randn(4, 6),
    ),
    "glu": lambda: (_two(nn.Linear(6, 16), nn.Linear(8, 5), lambda m, x: m.b(F.glu(m.a(x)))), torch.randn(4, 6)),
    "convolutions": lambda: (
        Net(
            lambda m, x: m.head(F.relu(m.norm(m.b(F.relu(m.a(x))))).mean((2, 3))),
            a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 8, 2), norm=nn.BatchNorm2d(8), head=nn.Linear(8, 5),
        ),
        _images(),
    ),
    "residual images": lambda: (
        Net(
            lambda m, x: m.head((m.a(x) + m.c(F.relu(m.norm(m.b(m.a(x)))))).amax((2, 3))),
            a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 12, 3, padding=1, bias=False), norm=nn.BatchNorm2d(12),
            c=nn.Conv2d(12, 8, 1), head=nn.Linear(8, 5),
        ),
        _images(),
    ),
    "grouped convolution": lambda: (
        Net(
            lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))).mean((2, 3)),
            a=nn.Conv2d(3, 16, 1), b=nn.Conv2d(16, 16, 3, padding=1, groups=4), c=nn.Conv2d(16, 5, 1),
        ),
        _images(),
    ),
    "depthwise convolution": lambda: (
        Net(
            lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))).mean((2, 3)),
            a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 8, 3, padding=1, groups=8), c=nn.Conv2d(8, 5, 1),
        ),
        _images(),
    ),
    "transposed convolution": lambda: (
        Net(
            lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))).mean((2, 3)),
            a=nn.Conv2d(3, 16, 1), b=nn.ConvTranspose2d(16, 16, 2, 2, groups=4), c=nn.Conv2d(16, 5, 1),
        ),
        _images(2),
    ),
    "group norm": lambda: (
        Net(
            lambda m, x: m.c(F.relu(m.norm(m.a(x)))).mean((2, 3)),
            a=nn.Conv2d(3, 16, 1), norm=nn.GroupNorm(4, 16), c=nn.Conv2d(16, 5, 1),
        ),
        _images(),
    ),
    "layer norm": lambda: (
        Net(
            lambda m, x: m.head(m.norm(m.stem(x) + m.down(F.gelu(m.up(m.norm(m.stem(x))))))),
            stem=nn.Linear(6, 8), norm=nn.LayerNorm(8), up=nn.Linear(8, 12), down=nn.Linear(12, 8),
            head=nn.Linear(8, 5),
        ),
        _tokens(),
    ),
    "softmax": lambda: (
        Net(
            lambda m, x: m.head(m.b(x) * m.a(x).softmax(-1)),
            a=nn.Linear(6, 8), b=nn.Linear(6, 8), head=nn.Linear(8, 5),
        ),
        torch.randn(4, 6),
    ),
    "means": lambda: (
        Net(
            lambda m, x: m.head(m.a(x) * m.a(x).mean(-1, keepdim=True) + m.a(x).square().mean(-1, keepdim=True)),
            a=nn.Linear(6, 8), head=nn.Linear(8, 5),
        ),
        torch.randn(4, 6),
    ),
    "extremes": lambda: (
        Net(
            lambda m, x: m.head(F.silu(m.a(x))) * (-m.a(x).abs()).amax(-1, keepdim=True),
            a=nn.Linear(6, 8), head=nn.Linear(8, 5),
        ),
        torch.randn(4, 6),
    ),
    "exponentials": lambda: (
        Net(lambda m, x: m.head(m.a(x) - m.a(x).logsumexp(-1, keepdim=True)), a=nn.Linear(6, 8), head=nn.Linear(8, 5)),
        torch.randn(4, 6),
    ),
    "quotients": lambda: (
        Net(
            lambda m, x: m.head(m.a(x) / (1 + m.b(x).exp())),
            a=nn.Linear(6, 8), b=nn.Linear(6, 8), head=nn.Linear(8, 5),
        ),
        torch.randn(4, 6),
    ),
    "norm of three groups": lambda: (
        Net(
            lambda m, x: m.c(F.relu(F.group_norm(m.a(x), 3, m.weight, m.bias))).mean((2, 3)),
            a=nn.Conv2d(3, 12, 1), weight=nn.Parameter(torch.randn(12)), bias=nn.Parameter(torch.randn(12)),
            c=nn.Conv2d(12, 5, 1),
        ),
        _images(),
    ),
    "deviation": lambda: (
        Net(
            lambda m, x: m.head(m.a(x) / (m.a(x).std(-1, keepdim=True) + 0.1)),
            a=nn.Linear(6, 8), head=nn.Linear(8, 5),
        ),
        torch.randn(4, 6),
    ),
    "squeeze": lambda: (
        Net(
            lambda m, x: m.c(_gated(m.up(F.relu(m.down(m.a(x).mean((2, 3), keepdim=True)))), m.a(x))).mean((2, 3)),
            a=nn.Conv2d(3, 8, 1), down=nn.Conv2d(8, 8, 1), up=nn.Conv2d(8, 8, 1), c=nn.Conv2d(8, 5, 1),
        ),
        _images(),
    ),
    "fused attention": lambda: (Net(_fused, **_attention_layers()), torch.randn(2, 4, 5)),
    "chunked attention": lambda: (Net(_chunked, **_attention_layers()), torch.randn(2, 4, 5)),
    "grouped queries": lambda: (Net(lambda m, x: _grouped(m, x, "gqa"), **_grouped_layers()), _tokens()),
    "interleaved queries": lambda: (Net(lambda m, x: _grouped(m, x, "interleave"), **_grouped_layers()), _tokens()),
    "expanded queries": lambda: (Net(lambda m, x: _grouped(m, x, "expand"), **_grouped_layers()), _tokens()),
    "default scale": lambda: (
        Net(
            lambda m, x: m.out(
                F.scaled_dot_product_attention(
                    *(_heads(part, m.heads, m.width) for part in (m.q(x), m.k(x), m.v(x)))
                ).transpose(1, 2).flatten(2)
            ),
            q=nn.Linear(6, 16), k=nn.Linear(6, 16), v=nn.Linear(6, 16), out=nn.Linear(16, 5), heads=2, width=8,
        ),
        _tokens(),
    ),
    "own scale": lambda: (
        Net(
            lambda m, x: m.out(((m.q(x) @ m.k(x).transpose(1, 2)) * m.k(x).shape[-1] ** -0.5).softmax(-1) @ m.v(x)),
            q=nn.Linear(6, 8), k=nn.Linear(6, 8), v=nn.Linear(6, 8), out=nn.Linear(8, 5),
        ),
        _tokens(),
    ),
    "module attention": lambda: (
        Net(
            lambda m, x: m.head(m.norm(m.stem(x) + m.attention(*[m.stem(x)] * 3, need_weights=False)[0])),
            stem=nn.Linear(6, 16), attention=nn.MultiheadAttention(16, 4, batch_first=True), norm=nn.LayerNorm(16),
            head=nn.Linear(16, 5),
        ),
        _tokens(),
    ),
    "channel attention": lambda: (
        Net(
            lambda m, x: m.out(m.v(x) @ (m.q(x).transpose(1, 2) @ m.k(x)).tanh()),
            q=nn.Linear(6, 8), k=nn.Linear(6, 8), v=nn.Linear(6, 8), out=nn.Linear(8, 5),
        ),
        _tokens(),
    ),
    "shifted attention": lambda: (
        Net(
            lambda m, x: m.out((F.elu(m.q(x)) + 1) @ ((F.elu(m.k(x)) + 1).transpose(1, 2) @ m.v(x))),
            q=nn.Linear(6, 8), k=nn.Linear(6, 8), v=nn.Linear(6, 8), out=nn.Linear(8, 5),
        ),
        _tokens(),
    ),
    "scaled table": lambda: (
        Net(
            lambda m, x: m.head(F.embedding(x, m.table * m.rows)),
            table=nn.Parameter(torch.randn(9, 8)), rows=nn.Parameter(torch.randn(9, 1)), head=nn.Linear(8, 5),
        ),
        torch.randint(9, (2, 5)),
    ),
    "square": lambda: (
        Net(
            lambda m, x: m.head((_square(m, x) + _square(m, x).transpose(1, 2)).flatten(1)),
            a=nn.Linear(6, 16), head=nn.Linear(16, 5), n=4,
        ),
        torch.randn(4, 6),
    ),
    "outer product": lambda: (
        Net(
            lambda m, x: m.head(torch.tanh(m.a(x).unsqueeze(2) * m.b(x).unsqueeze(1)).flatten(1)),
            a=nn.Linear(6, 4), b=nn.Linear(6, 4), head=nn.Linear(16, 5),
        ),
        torch.randn(4, 6),
    ),
    "turned outer product": lambda: (
        Net(
            lambda m, x: m.head((m.a(x).unsqueeze(2) * m.b(x).unsqueeze(1)).transpose(1, 2).reshape(x.shape[0], -1)),
            a=nn.Linear(6, 4), b=nn.Linear(6, 4), head=nn.Linear(16, 5),
        ),
        torch.randn(4, 6),
    ),
    "einsum": lambda: (
        Net(
            lambda m, x: m.head(torch.einsum("bi,bj,ijo->bo", m.a(x), m.b(x), m.w)),
            a=nn.Linear(6, 4), b=nn.Linear(6, 4), w=nn.Parameter(torch.randn(4, 4, 8)), head=nn.Linear(8, 5),
        ),
        torch.randn(4, 6),
    ),
    "bilinear": lambda: (
        Net(
            lambda m, x: m.head(m.two(m.a(x), m.b(x))),
            a=nn.Linear(6, 4), b=nn.Linear(6, 4), two=nn.Bilinear(4, 4, 8), head=nn.Linear(8, 5),
        ),
        torch.randn(4, 6),
    ),
    "pixel shuffle": lambda: (
        Net(
            lambda m, x: m.b(F.relu(F.pixel_shuffle(m.a(x), 2))).mean((2, 3)),
            a=nn.Conv2d(3, 16, 1), b=nn.Conv2d(4, 5, 3),
        ),
        _images(),
    ),
    "pixel unshuffle": lambda: (
        Net(
            lambda m, x: m.b(F.relu(F.pixel_unshuffle(m.a(x), 2))).mean((2, 3)),
            a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(16, 5, 1),
        ),
        _images(),
    ),
    "channel shuffle": lambda: (
        Net(_shuffle, a=nn.Conv2d(3, 16, 1), b=nn.Conv2d(16, 5, 1), groups=4),
        _images(),
    ),
    "shuffle operator": lambda: (
        Net(
            lambda m, x: m.b(F.relu(F.channel_shuffle(m.a(x), 4))).mean((2, 3)),
            a=nn.Conv2d(3, 16, 1), b=nn.Conv2d(16, 5, 1),
        ),
        _images(),
    ),
    "involution": lambda: (
        Net(_involution, stem=nn.Conv2d(3, 8, 1), weights=nn.Conv2d(8, 9, 1), head=nn.Linear(8, 5)),
        _images(),
    ),
    "unfold": lambda: (
        Net(
            lambda m, x: m.head(F.unfold(m.stem(x), 2).amax(-1)),
            stem=nn.Conv2d(3, 4, 1), head=nn.Linear(16, 5),
        ),
        _images(),
    ),
    "selective": lambda: (
        Net(
            _selective, stem=nn.Conv2d(3, 8, 1), one=nn.Conv2d(8, 8, 3, padding=1), two=nn.Conv2d(8, 8, 1),
            down=nn.Linear(8, 8), up=nn.Linear(8, 16), head=nn.Linear(8, 5),
        ),
        _images(),
    ),
    "lstm": lambda: (
        Net(
            lambda m, x: m.head(m.cell(m.stem(x))[0]),
            stem=nn.Linear(6, 8), cell=nn.LSTM(8, 4, 2, batch_first=True), head=nn.Linear(4, 5),
        ),
        _tokens(),
    ),
    "both directions": lambda: (
        Net(
            lambda m, x: m.head(m.cell(m.stem(x))[0]),
            stem=nn.Linear(6, 8), cell=nn.GRU(8, 4, 2, batch_first=True, bidirectional=True), head=nn.Linear(8, 5),
        ),
        _tokens(),
    ),
    "rnn": lambda: (
        Net(
            lambda m, x: m.head(m.cell(x)[0].relu()), cell=nn.RNN(6, 8, batch_first=True), head=nn.Linear(8, 5),
        ),
        _tokens(),
    ),
    "embedding": lambda: (
        Net(
            lambda m, x: m.head(F.gelu(m.up(m.words(x) + m.places.weight))),
            words=nn.Embedding(9, 8), places=nn.Embedding(5, 8), up=nn.Linear(8, 8), head=nn.Linear(8, 5),
        ),
        torch.randint(9, (2, 5)),
    ),
    "tied": lambda: (
        Net(
            lambda m, x: F.linear(torch.tanh(m.up(m.words(x))), m.words.weight),
            words=nn.Embedding(9, 8), up=nn.Linear(8, 8),
        ),
        torch.randint(9, (2, 5)),
    ),
    "repeated": lambda: (
        Net(
            lambda m, x: m.head(torch.tanh(m.a(x).repeat(1, m.n) * m.scale)),
            a=nn.Linear(6, 4), scale=nn.Parameter(torch.randn(16)), head=nn.Linear(16, 5), n=4,
        ),
        torch.randn(4, 6),
    ),
    "interleaved": lambda: (
        Net(
            lambda m, x: m.head(torch.tanh(m.a(x).repeat_interleave(m.n, 1) * m.scale)),
            a=nn.Linear(6, 4), scale=nn.Parameter(torch.randn(16)), head=nn.Linear(16, 5), n=4,
        ),
        torch.randn(4, 6),
    ),
    "merged and cut": lambda: (
        Net(
            lambda m, x: m.b(F.relu(m.a(x).unflatten(1, (m.n, m.k)).transpose(1, 2).flatten(1))),
            a=nn.Linear(6, 16), b=nn.Linear(16, 5), n=4, k=4,
        ),
        torch.randn(4, 6),
    ),
    "by number": lambda: (
        Net(
            lambda m, x: m.head(m.a(x)[:, m.order]), a=nn.Linear(6, 8), head=nn.Linear(8, 5), order=torch.randperm(8),
        ),
        torch.randn(4, 6),
    ),
    "rolled": lambda: (
        Net(lambda m, x: m.head(m.a(x).roll(1, -1) * m.a(x)), a=nn.Linear(6, 8), head=nn.Linear(8, 5)),
        torch.randn(4, 6),
    ),
    "first channel": lambda: (
        Net(
            lambda m, x: m.head(_gated(m.a(x).select(-1, 1)[:, None], m.a(x))), a=nn.Linear(6, 8), head=nn.Linear(8, 5),
        ),
        torch.randn(4, 6),
    ),
    "summed up": lambda: (
        Net(lambda m, x: m.head(m.a(x).cumsum(-1)), a=nn.Linear(6, 8), head=nn.Linear(8, 5)),
        torch.randn(4, 6),
    ),
    "sorted": lambda: (
        Net(lambda m, x: m.head(m.a(x).sort(-1).values), a=nn.Linear(6, 8), head=nn.Linear(8, 5)),
        torch.randn(4, 6),
    ),
    "flipped": lambda: (
        Net(lambda m, x: m.head(m.a(x).flip(-1) + m.a(x)), a=nn.Linear(6, 8), head=nn.Linear(8, 5)),
        torch.randn(4, 6),
    ),
    "prelu": lambda: (
        Net(lambda m, x: m.c(m.act(m.a(x))).mean((2, 3)), a=nn.Conv2d(3, 8, 1), act=nn.PReLU(8), c=nn.Conv2d(8, 5, 1)),
        _images(),
    ),
    "weight norm": lambda: (
        Net(
            lambda m, x: m.b(F.relu(m.a(x))),
            a=torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)),
            b=torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 5)),
        ),
        torch.randn(4, 6),
    ),
    "literal": lambda: (
        Net(
            lambda m, x: m.b(F.normalize(m.a(x).view(-1, 4, 4), dim=-1).view(-1, 16)),
            a=nn.Linear(6, 16), b=nn.Linear(16, 5),
        ),
        torch.randn(4, 6),
    ),
    "buffers": lambda: (
        Net(
            lambda m, x: m.c(F.relu(m.norm(m.a(x)))).mean((2, 3)),
            a=nn.Conv2d(3, 8, 1), norm=nn.BatchNorm2d(8, affine=False), c=nn.Conv2d(8, 5, 1),
        ),
        _images(),
    ),
    "train only": lambda: (
        Net(
            _train_only, stem=nn.Linear(6, 8), middle=nn.Linear(8, 8), head=nn.Linear(8, 5), one=nn.Linear(8, 4),
            two=nn.Linear(8, 4), extra=nn.Linear(8, 5),
        ),
        torch.randn(4, 6),
    ),
}  # fmt: skip
