"""Recurrent layers, cells in loops, scans, embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from support.architectures.cases.composed import Composed, on_sequences, parameter
from support.architectures.example import Builder, Example


def _between(layer: nn.Module, width: int = 16, out: int = 16) -> Example:
    """A linear layer before and after a recurrent one."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.head(m.layer(m.lift(x))[0])

    return on_sequences(forward, 6, 4, lift=nn.Linear(6, width), layer=layer, head=nn.Linear(out, 3))


def lstm_bidirectional_stack() -> Example:
    return _between(nn.LSTM(16, 16, num_layers=2, bidirectional=True, batch_first=True), out=32)


def lstm_with_projection() -> Example:
    return _between(nn.LSTM(16, 16, num_layers=2, proj_size=8, batch_first=True), out=8)


def lstm_with_projection_both_ways() -> Example:
    return _between(nn.LSTM(16, 16, proj_size=8, bidirectional=True, batch_first=True), out=16)


def gru_stack() -> Example:
    return _between(nn.GRU(16, 16, num_layers=2, batch_first=True, dropout=0.1))


def plain_recurrent_time_first() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        output, hidden = m.layer(m.lift(x).transpose(0, 1))
        return m.head(output.transpose(0, 1)) + m.last(hidden[-1]).unsqueeze(1)

    return on_sequences(
        forward,
        6,
        4,
        lift=nn.Linear(6, 16),
        layer=nn.RNN(16, 16, nonlinearity="relu"),
        last=nn.Linear(16, 3),
        head=nn.Linear(16, 3),
    )


def encoder_state_to_decoder() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        _, (hidden, cell) = m.encoder(m.lift(x))
        start = torch.zeros(x.shape[0], 3, m.lift.out_features, dtype=x.dtype)
        return m.head(m.decoder(start, (hidden, cell))[0])

    return on_sequences(
        forward,
        6,
        4,
        lift=nn.Linear(6, 8),
        encoder=nn.LSTM(8, 16, batch_first=True),
        decoder=nn.LSTM(8, 16, batch_first=True),
        head=nn.Linear(16, 3),
    )


def packed_sequences() -> Example:
    def forward(m: Any, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(m.lift(x), lengths, batch_first=True, enforce_sorted=False)
        output, _ = pad_packed_sequence(m.layer(packed)[0], batch_first=True)
        return m.head(output).sum(1)

    layer = nn.LSTM(16, 16, num_layers=2, bidirectional=True, batch_first=True)
    model = Composed(forward, lift=nn.Linear(6, 16), layer=layer, head=nn.Linear(32, 3))
    return Example(model, (torch.randn(2, 4, 6), torch.tensor([3, 4])))


def cells_in_a_loop() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.lift(x)
        hidden = cell = gated = x.new_zeros(x.shape[0], m.hidden)
        for step in x.unbind(1):
            hidden, cell = m.long(step, (hidden, cell))
            gated = m.gated(hidden, gated)
        return m.head(gated)

    return on_sequences(
        forward,
        6,
        4,
        hidden=16,
        lift=nn.Linear(6, 16),
        long=nn.LSTMCell(16, 16),
        gated=nn.GRUCell(16, 16),
        head=nn.Linear(16, 3),
    )


def recurrence_by_hand() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.zeros(x.shape[0], m.width, dtype=x.dtype)
        outputs = []
        for time in range(x.size(1)):
            hidden = torch.tanh(m.enter(x[:, time]) + m.again(hidden))
            outputs.append(hidden)
        return m.head(torch.stack(outputs, dim=1))

    return on_sequences(
        forward, 6, 4, width=16, enter=nn.Linear(6, 16), again=nn.Linear(16, 16), head=nn.Linear(16, 3)
    )


def _selective(scan: Any) -> Example:
    """A state-space block: widths d, states n; ``scan`` gets (decay, update) as (batch, length, d, n)."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.lift(x)
        inner, gate = m.enter(x).chunk(2, dim=-1)
        inner = F.silu(m.conv(inner.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        step, before, after = m.select(inner).split([m.rank, m.states, m.states], dim=-1)
        step = F.softplus(m.step(step))
        decay = torch.exp(step.unsqueeze(-1) * -m.decay_log.exp())
        update = (step * inner).unsqueeze(-1) * before.unsqueeze(2)
        state = scan(decay, update)
        y = torch.einsum("bldn,bln->bld", state, after) + inner * m.skip
        return m.head(x + m.out(y * F.silu(gate)))

    return on_sequences(
        forward,
        6,
        4,
        rank=4,
        states=4,
        lift=nn.Linear(6, 16),
        enter=nn.Linear(16, 64, bias=False),
        conv=nn.Conv1d(32, 32, 3, padding=2, groups=32),
        select=nn.Linear(32, 12, bias=False),
        step=nn.Linear(4, 32),
        decay_log=parameter(32, 4),
        skip=parameter(32),
        out=nn.Linear(32, 16, bias=False),
        head=nn.Linear(16, 3),
    )


def state_space_by_loop() -> Example:
    def scan(decay: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        state = torch.zeros_like(update[:, 0])
        states = []
        for time in range(update.shape[1]):
            state = decay[:, time] * state + update[:, time]
            states.append(state)
        return torch.stack(states, 1)

    return _selective(scan)


def state_space_by_cumulative_sum() -> Example:
    def scan(decay: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        total = decay.clamp(min=1e-3).log().cumsum(1).exp()
        return (update / total).cumsum(1) * total

    return _selective(scan)


def embedding_bag_and_numbers() -> Example:
    def forward(m: Any, words: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        return m.head(torch.cat([m.bag(words), m.numbers(numbers).relu()], dim=1))

    model = Composed(
        forward,
        bag=nn.EmbeddingBag(30, 16, mode="mean"),
        numbers=nn.Linear(5, 16),
        head=nn.Linear(32, 3),
    )
    return Example(model, (torch.randint(30, (2, 7)), torch.randn(2, 5)))


def tied_embedding() -> Example:
    def forward(m: Any, words: torch.Tensor) -> torch.Tensor:
        x = m.words(words) + m.places(torch.arange(words.shape[1]))
        x = x + m.mlp(m.norm(x))
        return F.linear(x, m.words.weight)

    model = Composed(
        forward,
        words=nn.Embedding(30, 16, padding_idx=0),
        places=nn.Embedding(8, 16),
        norm=nn.LayerNorm(16),
        mlp=nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)),
    )
    return Example(model, (torch.randint(30, (2, 5)),))


def padding_masks() -> Example:
    """Padded words are left out of the mean."""

    def forward(m: Any, words: torch.Tensor) -> torch.Tensor:
        mask = (words != 0).unsqueeze(-1)
        x = m.layer(m.words(words))[0].masked_fill(~mask, 0.0)
        mean = x.sum(1) / mask.sum(1).clamp(min=1)
        highest = x.masked_fill(~mask, -1e4).max(1).values
        return m.head(torch.cat([mean, highest], -1))

    model = Composed(
        forward,
        words=nn.Embedding(30, 16, padding_idx=0),
        layer=nn.GRU(16, 16, batch_first=True),
        head=nn.Linear(32, 3),
    )
    return Example(model, (torch.tensor([[3, 4, 0, 0], [5, 6, 7, 0]]),))


def causal_convolutions() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.lift(x).transpose(1, 2)
        for dilation, conv in zip((1, 2), m.convs, strict=True):
            signal, gate = conv(F.pad(x, (dilation, 0))).chunk(2, 1)
            x = x + signal.tanh() * gate.sigmoid()
        return m.head(x[..., -1])

    convs = nn.ModuleList(
        [nn.utils.parametrizations.weight_norm(nn.Conv1d(16, 32, 2, dilation=d)) for d in (1, 2)]
    )
    return on_sequences(forward, 6, 4, lift=nn.Linear(6, 16), convs=convs, head=nn.Linear(16, 3))


def convolutional_recurrence() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        batch, _, _, height, width = x.shape
        hidden = cell = torch.zeros(batch, m.hidden, height, width, dtype=x.dtype)
        for time in range(x.shape[1]):
            gates = m.gates(torch.cat([x[:, time], hidden], dim=1))
            enter, forget, leave, new = torch.split(gates, m.hidden, dim=1)
            cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
            hidden = leave.sigmoid() * cell.tanh()
        return m.head(hidden)

    model = Composed(forward, hidden=8, gates=nn.Conv2d(11, 32, 3, padding=1), head=nn.Conv2d(8, 4, 1))
    return Example(model, (torch.randn(2, 3, 3, 4, 4),))


MODELS: dict[str, Builder] = {
    case.__name__: case
    for case in (
        lstm_bidirectional_stack, lstm_with_projection, lstm_with_projection_both_ways, gru_stack,
        plain_recurrent_time_first, encoder_state_to_decoder, packed_sequences, cells_in_a_loop, recurrence_by_hand,
        state_space_by_loop, state_space_by_cumulative_sum, embedding_bag_and_numbers, tied_embedding, padding_masks,
        causal_convolutions, convolutional_recurrence,
    )
}  # fmt: skip
