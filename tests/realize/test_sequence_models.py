"""Operators of language models on small modules: pruned by half, held against a hand-masked copy, and trained."""

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
    """A model from a function and named parts."""

    def __init__(self, function: Callable[..., torch.Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(self, *inputs)


Case = tuple[nn.Module, Callable[[int], tuple[torch.Tensor, ...]], float]


def vectors(width: int = 8) -> Callable[[int], tuple[torch.Tensor, ...]]:
    return lambda batch: (torch.randn(batch, width),)


def sequence(length: int = 6, width: int = 8) -> Callable[[int], tuple[torch.Tensor, ...]]:
    return lambda batch: (torch.randn(batch, length, width),)


def grouped_experts() -> Case:
    """Tokens sorted by expert, one fused product for all: gate and up in one weight, experts as a dimension."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.enter(x)
        chosen = m.router(x).argmax(-1)
        order = chosen.argsort()
        offsets = torch.histc(chosen.float(), bins=4, min=0, max=3).cumsum(0).to(torch.int32)
        both = F.grouped_mm(x[order], m.up.transpose(-2, -1), offs=offsets)
        gate, up = both.chunk(2, -1)
        down = F.grouped_mm(F.silu(gate) * up, m.down.transpose(-2, -1), offs=offsets)
        return m.leave(torch.zeros_like(x).index_put((order,), down))

    parts = {
        "enter": nn.Linear(8, 32),
        "router": nn.Linear(32, 4),
        "up": nn.Parameter(torch.randn(4, 64, 32) * 0.2),
        "down": nn.Parameter(torch.randn(4, 32, 32) * 0.2),
        "leave": nn.Linear(32, 8),
    }
    return Model(forward, **parts), vectors(), 0.5


def looped_experts() -> Case:
    """A loop over the experts that were chosen, with positions found by ``where``."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.enter(x)
        weight, chosen = m.router(x).softmax(-1).topk(2, -1)
        result = torch.zeros_like(x)
        for expert in F.one_hot(chosen, 4).sum((0, 1)).nonzero().flatten().tolist():
            token, place = torch.where(chosen == expert)
            result.index_add_(0, token, m.experts[expert](x[token]) * weight[token, place, None])
        return m.leave(result)

    def expert() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))

    parts = {
        "enter": nn.Linear(8, 16),
        "router": nn.Linear(16, 4),
        "experts": nn.ModuleList(expert() for _ in range(4)),
        "leave": nn.Linear(16, 8),
    }
    return Model(forward, **parts), vectors(), 0.55


def selective_scan() -> Case:
    """A state for each channel and state index, stepped through time; a depthwise convolution before it."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x, gate = m.enter(x).chunk(2, -1)
        x = F.silu(m.mix(x.transpose(1, 2))[..., : x.shape[1]])
        step, read, write = m.select(x.transpose(1, 2)).split([2, 4, 4], -1)
        step = F.softplus(m.steps(step)).transpose(1, 2)
        decay = torch.exp(-m.decay.exp()[None, :, None, :] * step[..., None])
        given = step[..., None] * write[:, None] * x[..., None]
        state = torch.zeros_like(given[:, :, 0])
        seen = []
        for time in range(x.shape[-1]):
            state = decay[:, :, time] * state + given[:, :, time]
            seen.append((state @ read[:, time, :, None])[..., 0])
        y = (torch.stack(seen, -1) + x * m.skip[:, None]).transpose(1, 2)
        return m.leave(y * F.silu(gate))

    parts = {
        "enter": nn.Linear(8, 32),
        "mix": nn.Conv1d(16, 16, 3, padding=2, groups=16),
        "select": nn.Linear(16, 10),
        "steps": nn.Linear(2, 16),
        "decay": nn.Parameter(torch.randn(16, 4)),
        "skip": nn.Parameter(torch.randn(16)),
        "leave": nn.Linear(16, 8),
    }
    return Model(forward, **parts), sequence(), 0.6


def interleaved_rotary() -> Case:
    """Pairs of neighbouring numbers are turned; the position is the same for all heads."""

    def turn(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        pairs = (even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin())
        return torch.stack(pairs, -1).flatten(-2)

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            part(x).unflatten(-1, (-1, 8)).transpose(1, 2) for part in (m.query, m.key, m.value)
        )
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * m.frequencies
        scores = turn(query, angle) @ turn(key, angle).transpose(-2, -1) * 8**-0.5
        return m.leave((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))

    parts: dict[str, nn.Module] = {name: nn.Linear(8, 32) for name in ("query", "key", "value")}
    model = Model(forward, leave=nn.Linear(32, 8), **parts)
    model.register_buffer("frequencies", torch.tensor([1.0, 0.5, 0.25, 0.125]))
    return model, sequence(), 0.55


def merged_by_mask() -> Case:
    """Features of another sense take the places of marked tokens."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        mask = (torch.arange(x.shape[1]) < 2)[None].expand(x.shape[0], -1)
        features = m.other(x[:, :2]).flatten(0, 1)
        words = m.words(x)
        return m.leave(words.masked_scatter(mask.unsqueeze(-1).expand_as(words), features))

    return (
        Model(forward, words=nn.Linear(8, 16), other=nn.Linear(8, 16), leave=nn.Linear(16, 8)),
        sequence(),
        0.55,
    )


def read_and_put_by_mask() -> Case:
    """Some rows are chosen by a mask, changed, and put back."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.enter(x)
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        mask[:, ::2] = True
        x = x.clone()
        x[mask] = m.change(x[mask]).relu()
        return m.leave(x)

    return (
        Model(forward, enter=nn.Linear(8, 16), change=nn.Linear(16, 16), leave=nn.Linear(16, 8)),
        sequence(),
        0.6,
    )


def pooled_tokens() -> Case:
    """A two-dimensional pool over (tokens, width) whose window is one number wide, and only the type of a tensor."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.enter(x)
        return m.leave(F.max_pool2d(x[:, None], (2, 1))[:, 0] * m.gate(x[:, ::2]).sigmoid()).type_as(x)

    return (
        Model(forward, enter=nn.Linear(8, 16), gate=nn.Linear(16, 16), leave=nn.Linear(16, 8)),
        sequence(),
        0.6,
    )


def windows_of_memory() -> Case:
    """Overlapping chunks of tokens by ``as_strided``."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.enter(x).contiguous()
        batch, length, width = x.shape
        first, second, third = x.stride()
        chunks = x.as_strided((batch, length // 2 - 1, 4, width), (first, second * 2, second, third))
        return m.leave(chunks.amax(2))

    return Model(forward, enter=nn.Linear(8, 16), leave=nn.Linear(16, 8)), sequence(), 0.55


def nobody_reads() -> Case:
    """A pooler whose result is thrown away still has to run on the narrower states."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.enter(x)
        m.pool(x[:, 0]).tanh()
        length = x[:, :, -1].shape[1]
        return m.leave(x + m.places.weight[:length])

    parts = {"enter": nn.Linear(8, 16), "pool": nn.Linear(16, 16), "places": nn.Embedding(9, 16)}
    return Model(forward, leave=nn.Linear(16, 8), **parts), sequence(), 0.8


def chosen_by_comparison() -> Case:
    """A projection where two widths differ: they must not become equal."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.narrow(x)
        if m.width != m.wider.out_features:
            x = m.wider(x)
        return m.leave(x.relu())

    return (
        Model(forward, narrow=nn.Linear(8, 8), wider=nn.Linear(8, 16), leave=nn.Linear(16, 8), width=8),
        vectors(),
        0.9,
    )


def kept_biases() -> Case:
    """Biases that are computed from a parameter once and kept in a dictionary."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.enter(x)
        if m.training:
            return m.leave(x + m.table[:, m.places].sum(-1))
        if x.device not in m.kept:
            m.kept[x.device] = m.table[:, m.places].sum(-1)
        return m.leave(x + m.kept[x.device])

    model = Model(forward, enter=nn.Linear(8, 16), leave=nn.Linear(16, 8), kept={})
    model.register_parameter("table", nn.Parameter(torch.randn(16, 5)))
    model.register_buffer("places", torch.tensor([0, 3]))
    return model, vectors(), 0.6


CASES: dict[str, Callable[[], Case]] = {
    make.__name__: make
    for make in (
        grouped_experts,
        looped_experts,
        selective_scan,
        interleaved_rotary,
        merged_by_mask,
        read_and_put_by_mask,
        pooled_tokens,
        windows_of_memory,
        nobody_reads,
        chosen_by_comparison,
        kept_biases,
    )
}


def hand_masked(dense: nn.Module, keep: dict[str, dict[int, torch.Tensor]]) -> nn.Module:
    """Zeros wherever something was cut, by indexing alone."""
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for dim, index in keep.get(name, {}).items():
                gone = [i for i in range(parameter.shape[dim]) if i not in set(index.tolist())]
                parameter.index_fill_(dim, torch.tensor(gone), 0.0)
    return model


@pytest.mark.parametrize("name", CASES)
def test_half_of_every_axis(name: str) -> None:
    torch.manual_seed(0)
    model, draw, most = CASES[name]()
    # the fused product of experts exists in single precision only
    dtype, tolerance = (torch.float32, 1e-5) if name == "grouped_experts" else (torch.float64, 1e-10)
    model.to(dtype)

    def inputs(batch: int) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.to(dtype) for tensor in draw(batch))

    dense = copy.deepcopy(model)
    before = sum(parameter.numel() for parameter in model.parameters())
    result = dw.prune(model, inputs(16), ratio=0.5)
    assert result.model is model
    assert result.verification is not None
    assert result.verification.proven
    assert not result.analysis.scope.unknown
    after = sum(parameter.numel() for parameter in model.parameters())
    assert after <= most * before
    # norms and softmax over heads or experts that stay see the same numbers: plain zeros are an exact reference here
    reference = hand_masked(dense, result.plan.keep)
    for batch in (16, 5):
        given = inputs(batch)
        expected, actual = reference.eval()(*given), model.eval()(*given)
        assert (expected - actual).abs().max() < tolerance * max(1.0, float(expected.detach().abs().max()))
    for training in (True, False):
        model.train(training)
        loss = (model(*inputs(16)) - 1).square().mean()
        loss.backward()
        assert sum(parameter.grad is not None for parameter in model.parameters()) >= 2


def test_cached_biases_follow_the_cut() -> None:
    """What the user's model kept in a dictionary before the cut is computed again."""
    torch.manual_seed(0)
    model, inputs, _ = kept_biases()
    model.eval()(*inputs(2))
    dw.prune(model, inputs(2), ratio=0.5)
    assert model.eval()(*inputs(3)).shape == (3, 8)
    assert next(iter(model.kept.values())).shape == (8,)


def test_unequal_widths_stay_unequal() -> None:
    torch.manual_seed(0)
    model, inputs, _ = chosen_by_comparison()
    dw.prune(model, inputs(2), ratio=0.5)
    assert model.wider.out_features != model.width


def test_an_input_that_the_model_changes_is_left_alone() -> None:
    class Memory:
        def __init__(self) -> None:
            self.seen = [torch.zeros(1)]

    def forward(m: Any, x: torch.Tensor, memory: Memory) -> torch.Tensor:
        memory.seen.append(x)
        return m.leave(m.enter(x).relu())

    model = Model(forward, enter=nn.Linear(8, 16), leave=nn.Linear(16, 8))
    memory = Memory()
    dw.prune(model, (torch.randn(2, 8), memory), ratio=0.5)
    assert len(memory.seen) == 1
    assert model.enter.out_features == 8
