"""Attention in every form people write it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from support.architectures.cases.composed import Composed, on_images, on_sequences, parameter
from support.architectures.example import Builder, Example

WIDTH, HEADS, HEAD = 16, 4, 4


def _grouped(attend: Callable[..., torch.Tensor], groups: int = 2) -> Example:
    """Queries in four heads, keys and values in fewer; ``attend`` gets them as (batch, heads, length, width)."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        x = m.lift(x)
        query = m.query(x).view(batch, length, m.heads, m.width).transpose(1, 2)
        key = m.key(x).view(batch, length, m.groups, m.width).transpose(1, 2)
        value = m.value(x).view(batch, length, m.groups, m.width).transpose(1, 2)
        out = attend(m, query, key, value)
        return m.head(m.out(out.transpose(1, 2).reshape(batch, length, m.heads * m.width)))

    return on_sequences(
        forward,
        6,
        4,
        heads=HEADS,
        groups=groups,
        width=HEAD,
        lift=nn.Linear(6, WIDTH),
        query=nn.Linear(WIDTH, HEADS * HEAD),
        key=nn.Linear(WIDTH, groups * HEAD),
        value=nn.Linear(WIDTH, groups * HEAD),
        out=nn.Linear(HEADS * HEAD, WIDTH),
        head=nn.Linear(WIDTH, 3),
    )


def _scores(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return (query @ key.transpose(-2, -1) / 2.0).softmax(-1) @ value


def grouped_query_by_expand() -> Example:
    def repeated(x: torch.Tensor, times: int) -> torch.Tensor:
        batch, groups, length, width = x.shape
        return (
            x[:, :, None]
            .expand(batch, groups, times, length, width)
            .reshape(batch, groups * times, length, width)
        )

    def attend(m: Any, query: Any, key: Any, value: Any) -> torch.Tensor:
        times = m.heads // m.groups
        return _scores(query, repeated(key, times), repeated(value, times))

    return _grouped(attend)


def grouped_query_by_repeat_interleave() -> Example:
    def attend(m: Any, query: Any, key: Any, value: Any) -> torch.Tensor:
        times = m.heads // m.groups
        return _scores(query, key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1))

    return _grouped(attend)


def grouped_query_by_sdpa() -> Example:
    return _grouped(
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    )


def grouped_query_by_einsum() -> Example:
    def attend(m: Any, query: Any, key: Any, value: Any) -> torch.Tensor:
        batch, _, length, width = query.shape
        query = query.reshape(batch, m.groups, m.heads // m.groups, length, width)
        weights = torch.einsum("bghqd,bgkd->bghqk", query, key).softmax(-1)
        return torch.einsum("bghqk,bgkd->bghqd", weights, value).reshape(batch, m.heads, length, width)

    return _grouped(attend)


def multi_query_by_broadcasting() -> Example:
    return _grouped(lambda m, q, k, v: _scores(q, k, v), groups=1)


def _fused(divide: Callable[..., tuple[torch.Tensor, ...]]) -> Example:
    """One projection to queries, keys and values; ``divide`` takes it apart into (batch, heads, length, width)."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        x = m.lift(x)
        query, key, value = divide(m, m.qkv(x), batch, length)
        out = F.scaled_dot_product_attention(query, key, value)
        return m.head(x + m.out(out.transpose(1, 2).reshape(batch, length, -1)))

    return on_sequences(
        forward,
        6,
        4,
        heads=HEADS,
        width=HEAD,
        lift=nn.Linear(6, WIDTH),
        qkv=nn.Linear(WIDTH, 3 * HEADS * HEAD),
        out=nn.Linear(HEADS * HEAD, WIDTH),
        head=nn.Linear(WIDTH, 3),
    )


def fused_three_heads_width() -> Example:
    return _fused(lambda m, x, b, n: x.reshape(b, n, 3, m.heads, m.width).permute(2, 0, 3, 1, 4).unbind(0))


def fused_heads_three_width() -> Example:
    return _fused(lambda m, x, b, n: x.view(b, n, m.heads, 3, m.width).permute(3, 0, 2, 1, 4).unbind(0))


def fused_interleaved() -> Example:
    return _fused(lambda m, x, b, n: x.view(b, n, m.heads, m.width, 3).permute(4, 0, 2, 1, 3).unbind(0))


def fused_heads_of_chunks() -> Example:
    return _fused(lambda m, x, b, n: x.view(b, n, m.heads, 3 * m.width).transpose(1, 2).chunk(3, dim=-1))


def multihead_batch_first() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.lift(x)
        return m.head(x + m.attention(x, x, x, need_weights=False)[0])

    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    return on_sequences(
        forward, 6, 4, lift=nn.Linear(6, WIDTH), attention=attention, head=nn.Linear(WIDTH, 3)
    )


def multihead_sequence_first_with_weights() -> Example:
    def forward(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = m.lift(x).transpose(0, 1)
        out, weights = m.attention(x, x, x, need_weights=True)
        return m.head(x + out).transpose(0, 1), weights

    return on_sequences(
        forward,
        6,
        4,
        lift=nn.Linear(6, WIDTH),
        attention=nn.MultiheadAttention(WIDTH, HEADS),
        head=nn.Linear(WIDTH, 3),
    )


def multihead_own_widths() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        query, key, value = m.lift(x), m.keys(x), m.values(x)
        return m.head(m.attention(query, key, value)[0])

    attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=12, vdim=8, batch_first=True)
    return on_sequences(
        forward,
        6,
        4,
        lift=nn.Linear(6, WIDTH),
        keys=nn.Linear(6, 12),
        values=nn.Linear(6, 8),
        attention=attention,
        head=nn.Linear(WIDTH, 3),
    )


def multihead_extra_tokens_and_masks() -> Example:
    def forward(m: Any, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        x = m.lift(x)
        causal = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), 1)
        out, _ = m.attention(x, x, x, key_padding_mask=padding, attn_mask=causal, average_attn_weights=False)
        return m.head(out)

    attention = nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True, add_zero_attn=True, batch_first=True)
    model = Composed(forward, lift=nn.Linear(6, WIDTH), attention=attention, head=nn.Linear(WIDTH, 3))
    return Example(model, (torch.randn(2, 4, 6), torch.tensor([[False, False, False, True], [False] * 4])))


def encoder_layer_alone() -> Example:
    """The input is the output's width: only the inner widths can go."""
    return on_sequences(
        nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True, norm_first=True), WIDTH
    )


def encoder_stack() -> Example:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True, activation="gelu")

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return m.head(m.encoder(m.lift(x), mask=mask, is_causal=True))

    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
    return on_sequences(forward, 6, 4, lift=nn.Linear(6, WIDTH), encoder=encoder, head=nn.Linear(WIDTH, 3))


def decoder_stack() -> Example:
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 32, batch_first=True)

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        queries = m.queries.expand(x.shape[0], -1, -1)
        return m.head(m.decoder(queries, m.lift(x)))

    return on_sequences(
        forward,
        6,
        4,
        queries=parameter(1, 3, WIDTH),
        lift=nn.Linear(6, WIDTH),
        decoder=nn.TransformerDecoder(layer, 2),
        head=nn.Linear(WIDTH, 3),
    )


def whole_transformer() -> Example:
    def forward(m: Any, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return m.head(m.body(m.source(source), m.target(target)))

    body = nn.Transformer(WIDTH, HEADS, 1, 1, 32, batch_first=True)
    model = Composed(
        forward,
        source=nn.Embedding(20, WIDTH),
        target=nn.Embedding(20, WIDTH),
        body=body,
        head=nn.Linear(WIDTH, 20),
    )
    return Example(model, (torch.randint(20, (2, 5)), torch.randint(20, (2, 3))))


class _Windows(nn.Module):
    """Attention inside (shifted) windows with a table of relative positions."""

    def __init__(self, shift: int, window: int = 2, size: int = 4) -> None:
        super().__init__()
        self.window, self.shift, self.heads = window, shift, HEADS
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = parameter((2 * window - 1) ** 2, HEADS)
        grid = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(
            1
        )
        relative = (grid[:, :, None] - grid[:, None, :]).permute(1, 2, 0) + window - 1
        self.register_buffer("index", relative[..., 0] * (2 * window - 1) + relative[..., 1])
        if shift:
            region = torch.zeros(1, size, size, 1)
            region[:, -window:] += 1
            region[:, :, -window:] += 2
            cells = self.windows(region).squeeze(-1)
            gap = cells[:, None, :] - cells[:, :, None]
            self.register_buffer("mask", torch.zeros_like(gap).masked_fill(gap != 0, -100.0))

    def windows(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, channels = x.shape
        own = self.window
        x = x.view(batch, height // own, own, width // own, own, channels)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, own * own, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, channels = x.shape
        own = self.window
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), dims=(1, 2))
        parts = self.windows(x)
        count, length, _ = parts.shape
        qkv = self.qkv(parts).reshape(count, length, 3, self.heads, channels // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-2, -1) * 0.5
        bias = self.table[self.index.view(-1)].view(length, length, -1).permute(2, 0, 1)
        scores = scores + bias
        if self.shift:
            scores = scores.view(batch, -1, self.heads, length, length) + self.mask[None, :, None]
            scores = scores.view(-1, self.heads, length, length)
        parts = self.out((scores.softmax(-1) @ value).transpose(1, 2).reshape(count, length, channels))
        x = parts.view(batch, height // own, width // own, own, own, channels)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)
        return torch.roll(x, (self.shift, self.shift), dims=(1, 2)) if self.shift else x


def shifted_windows() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x).permute(0, 2, 3, 1)
        x = x + m.plain(m.norm(x))
        x = x + m.shifted(m.norm(x))
        even = x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]
        x = m.reduce(m.merged(torch.cat(even, -1)))
        return m.head(x.mean((1, 2)))

    return on_images(
        forward,
        3,
        4,
        stem=nn.Conv2d(3, WIDTH, 1),
        norm=nn.LayerNorm(WIDTH),
        plain=_Windows(0),
        shifted=_Windows(1),
        merged=nn.LayerNorm(4 * WIDTH),
        reduce=nn.Linear(4 * WIDTH, 2 * WIDTH, bias=False),
        head=nn.Linear(2 * WIDTH, 3),
    )


def _rotary(rotate: Callable[..., torch.Tensor]) -> Example:
    def attend(m: Any, query: Any, key: Any, value: Any) -> torch.Tensor:
        return _scores(rotate(m, query), rotate(m, key), value)

    example = _grouped(attend, groups=HEADS)
    steps = 1.0 / 100 ** (torch.arange(0, HEAD, 2) / HEAD)
    example.model.register_buffer("steps", steps)
    return example


def rotary_by_halves() -> Example:
    def rotate(m: Any, x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * m.steps
        angles = torch.cat([angles, angles], -1)
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    return _rotary(rotate)


def rotary_by_complex_numbers() -> Example:
    def rotate(m: Any, x: torch.Tensor) -> torch.Tensor:
        angles = torch.outer(torch.arange(x.shape[-2], dtype=x.dtype), m.steps)
        turns = torch.polar(torch.ones_like(angles), angles)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2)

    return _rotary(rotate)


def rotary_by_a_complex_buffer() -> Example:
    """The turns are worked out once, for the longest sequence, as many language models do."""

    def rotate(m: Any, x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        turned = pairs * m.turns[: x.shape[-2]].to(pairs.dtype)
        return torch.view_as_real(turned).flatten(-2)

    example = _rotary(rotate)
    angles = torch.outer(torch.arange(8.0), example.model.steps)
    example.model.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))
    return example


def rotary_interleaved() -> Example:
    def rotate(m: Any, x: torch.Tensor) -> torch.Tensor:
        angles = (torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * m.steps).repeat_interleave(2, dim=-1)
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * angles.cos() + turned * angles.sin()

    return _rotary(rotate)


def causal_mask_buffer() -> Example:
    def attend(m: Any, query: Any, key: Any, value: Any) -> torch.Tensor:
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        length = query.shape[-2]
        scores = scores.masked_fill(m.causal[:, :, :length, :length] == 0, float("-inf"))
        return F.softmax(scores, dim=-1) @ value

    example = _grouped(attend, groups=HEADS)
    example.model.register_buffer("causal", torch.tril(torch.ones(8, 8)).view(1, 1, 8, 8))
    return example


def linear_attention() -> Example:
    def attend(m: Any, query: Any, key: Any, value: Any) -> torch.Tensor:
        query, key = F.elu(query) + 1, F.elu(key) + 1
        state = torch.einsum("bhld,bhle->bhlde", key, value).cumsum(2)
        total = torch.einsum("bhld,bhld->bhl", query, key.cumsum(2)) + 1e-6
        return torch.einsum("bhld,bhlde->bhle", query, state) / total.unsqueeze(-1)

    return _grouped(attend, groups=HEADS)


def cosine_attention() -> Example:
    def attend(m: Any, query: Any, key: Any, value: Any) -> torch.Tensor:
        scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
        return (scores * m.temperature.clamp(max=3.0).exp()).softmax(-1) @ value

    example = _grouped(attend, groups=HEADS)
    example.model.temperature = parameter(HEADS, 1, 1)
    return example


def talking_heads() -> Example:
    def attend(m: Any, query: Any, key: Any, value: Any) -> torch.Tensor:
        scores = (query @ key.transpose(-2, -1)).permute(0, 2, 3, 1)
        weights = m.after(m.before(scores).softmax(-2)).permute(0, 3, 1, 2)
        return weights @ value

    example = _grouped(attend, groups=HEADS)
    example.model.before, example.model.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)
    return example


def pooling_by_a_learned_query() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.lift(x)
        weights = (m.key(x) @ m.query / math.sqrt(m.query.shape[0])).softmax(1)
        return m.head((weights.unsqueeze(-1) * m.value(x)).sum(1))

    return on_sequences(
        forward,
        6,
        4,
        query=parameter(WIDTH),
        lift=nn.Linear(6, WIDTH),
        key=nn.Linear(WIDTH, WIDTH),
        value=nn.Linear(WIDTH, WIDTH),
        head=nn.Linear(WIDTH, 3),
    )


def class_token_and_positions() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], dim=1) + m.positions
        x = x + m.scale * m.mlp(m.norm(x))
        return m.head(x[:, 0])

    return on_images(
        forward,
        3,
        8,
        patches=nn.Conv2d(3, WIDTH, 4, 4),
        token=parameter(1, 1, WIDTH),
        positions=parameter(1, 5, WIDTH),
        norm=nn.LayerNorm(WIDTH),
        scale=parameter(WIDTH),
        mlp=nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, WIDTH)),
        head=nn.Linear(WIDTH, 3),
    )


MODELS: dict[str, Builder] = {
    case.__name__: case
    for case in (
        grouped_query_by_expand, grouped_query_by_repeat_interleave, grouped_query_by_sdpa,
        grouped_query_by_einsum, multi_query_by_broadcasting, fused_three_heads_width, fused_heads_three_width,
        fused_interleaved, fused_heads_of_chunks, multihead_batch_first, multihead_sequence_first_with_weights,
        multihead_own_widths, multihead_extra_tokens_and_masks, encoder_layer_alone, encoder_stack, decoder_stack,
        whole_transformer, shifted_windows, rotary_by_halves, rotary_by_complex_numbers,
        rotary_by_a_complex_buffer, rotary_interleaved,
        causal_mask_buffer, linear_attention, cosine_attention, talking_heads, pooling_by_a_learned_query,
        class_token_and_positions,
    )
}  # fmt: skip
