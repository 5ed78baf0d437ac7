"""Operators by which tensors are taken apart, moved, and put together."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from support.architectures.cases.composed import Composed, on_images, on_sequences, on_vectors, parameter
from support.architectures.example import Builder, Example


def einsum_with_weights() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = torch.einsum("...i,oi->...o", x, m.first)
        x = torch.einsum("bld, d -> bld", x.relu(), m.gain)
        x = torch.einsum("bld,hdk->blhk", x, m.heads)
        x = torch.einsum("b l h k, h k o -> b l o", x.tanh(), m.joined)
        return torch.einsum("blo,oc", x, m.last)

    return on_sequences(
        forward,
        6,
        4,
        first=parameter(16, 6),
        gain=parameter(16),
        heads=parameter(4, 16, 8),
        joined=parameter(4, 8, 16),
        last=parameter(16, 3),
    )


def einsum_diagonal() -> Example:
    """The trace of a product: rows and columns are one axis."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        square = m.write(m.first(x).relu()).view(-1, 8, 8)
        return m.head(torch.einsum("bii->bi", square)) + torch.einsum("bii->b", square)[:, None]

    return on_vectors(forward, 6, first=nn.Linear(6, 16), write=nn.Linear(16, 64), head=nn.Linear(8, 3))


def tensordot() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = torch.tensordot(x, m.first, dims=1)
        return torch.tensordot(x.relu(), m.second, dims=([1, 2], [1, 0]))

    return on_vectors(forward, 6, first=parameter(6, 8, 16), second=parameter(16, 8, 3))


def fourier_mixing() -> Example:
    """Tokens and width are mixed by a Fourier transform; around it is a plain network."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.lift(x)
        x = x + torch.fft.fft(x, dim=1).real
        spectrum = torch.fft.rfft(x, dim=1, norm="ortho")
        x = torch.fft.irfft(spectrum * torch.view_as_complex(m.filter), n=x.shape[1], dim=1, norm="ortho")
        return m.head(m.mlp(x))

    return on_sequences(
        forward,
        6,
        4,
        lift=nn.Linear(6, 16),
        filter=parameter(3, 16, 2),
        mlp=nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)),
        head=nn.Linear(16, 3),
    )


def spectrogram() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(x, 16, 8, window=m.window, return_complex=True).abs()
        return m.head(m.second(m.first(spectrum).relu()).mean(-1))

    model = Composed(
        forward,
        window=torch.hann_window(16),
        first=nn.Conv1d(9, 16, 3, padding=1),
        second=nn.Conv1d(16, 12, 1),
        head=nn.Linear(12, 3),
    )
    return Example(model, (torch.randn(2, 64),))


def gather_and_scatter() -> Example:
    def forward(m: Any, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        x = m.lift(x)
        taken = x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        back = torch.zeros_like(x).scatter_add(1, places.unsqueeze(-1).expand_as(taken), m.mix(taken))
        return m.head(back)

    model = Composed(forward, lift=nn.Linear(6, 16), mix=nn.Linear(16, 16), head=nn.Linear(16, 3))
    return Example(model, (torch.randn(2, 4, 6), torch.tensor([[0, 2], [3, 1]])))


def best_tokens() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.lift(x)
        places = m.score(x).squeeze(-1).topk(2, dim=1).indices
        chosen = x[torch.arange(x.shape[0])[:, None], places]
        ordered = m.mix(chosen).sort(dim=1, descending=True).values
        return m.head(ordered)

    return on_sequences(
        forward,
        6,
        4,
        lift=nn.Linear(6, 16),
        score=nn.Linear(16, 1),
        mix=nn.Linear(16, 12),
        head=nn.Linear(12, 3),
    )


def best_channels() -> Example:
    """The largest channels are picked: their order matters, the layers before are free."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.head(m.second(m.first(x).relu()).topk(4, dim=-1).values)

    return on_vectors(forward, 6, first=nn.Linear(6, 16), second=nn.Linear(16, 16), head=nn.Linear(4, 3))


def slice_assignment() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.first(x)
        half = x.shape[1] // 2
        y = torch.zeros_like(x)
        y[:, :half] = x[:, half:]
        y[:, half:] = x[:, :half].tanh()
        y[:, :, 0] = 0
        return m.head(y)

    return on_images(forward, first=nn.Conv2d(3, 16, 3), head=nn.Conv2d(16, 4, 1))


def written_into_a_result() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.first(x)
        if not torch.is_grad_enabled():
            return m.head(torch.mul(x, m.gain, out=torch.empty_like(x)))
        return m.head(x * m.gain)

    return on_vectors(forward, 6, first=nn.Linear(6, 16), gain=parameter(16), head=nn.Linear(16, 3))


def chunks_unbound_and_stacked() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        parts = m.lift(x).chunk(4, dim=-1)
        stacked = torch.stack([part * (number + 1) for number, part in enumerate(parts)], dim=1)
        one, two, *others = stacked.unbind(1)
        return m.head(torch.cat([one + others[0], torch.maximum(two, others[1])], dim=-1))

    return on_vectors(forward, 6, lift=nn.Linear(6, 32), head=nn.Linear(16, 3))


def axes_moved_about() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.lift(x).unflatten(-1, (m.heads, -1))
        x = torch.movedim(x, 2, 1).swapaxes(1, 3)
        x = torch.moveaxis(x, (1, 3), (3, 1)).transpose(1, 2).flatten(2)
        x = m.mix(x).swapdims(1, 2).mT
        return m.head(x)

    return on_sequences(
        forward, 6, 4, heads=4, lift=nn.Linear(6, 16), mix=nn.Linear(16, 16), head=nn.Linear(16, 3)
    )


def repeated() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.lift(x)
        tiled = x.repeat(1, 2) * m.tiled
        spread = x.repeat_interleave(2, dim=1) * m.spread
        return m.head(torch.cat([tiled, spread, x.tile((2,))], dim=1))

    return on_vectors(
        forward, 6, lift=nn.Linear(6, 8), tiled=parameter(16), spread=parameter(16), head=nn.Linear(48, 3)
    )


def strided_views() -> Example:
    """Windows by ``as_strided`` over memory: nothing there can be followed; the layers before it are free."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.second(m.first(x).relu()).contiguous()
        windows = x.as_strided((x.shape[0], 15, 2), (x.stride(0), 1, 1))
        return m.head(windows.sum(-1))

    return on_vectors(forward, 6, first=nn.Linear(6, 24), second=nn.Linear(24, 16), head=nn.Linear(15, 3))


def softmax_over_channels() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.first(x)
        return m.head(torch.cat([F.softmax(x, dim=1), F.log_softmax(x, 1), F.normalize(x, dim=1)], 1))

    return on_images(forward, first=nn.Conv2d(3, 16, 1), head=nn.Conv2d(48, 4, 1))


def outer_products() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        left, right = m.left(x), m.right(x)
        pairs = (left.unsqueeze(2) * right.unsqueeze(1)).flatten(1)
        gram = torch.bmm(left.unsqueeze(2), left.unsqueeze(1)).flatten(1)
        return m.head(pairs) + m.square(gram)

    return on_vectors(
        forward,
        6,
        left=nn.Linear(6, 4),
        right=nn.Linear(6, 8),
        head=nn.Linear(32, 3),
        square=nn.Linear(16, 3),
    )


def gram_matrix() -> Example:
    """Channels against channels (as style losses do), summed away by a learned weight a pair."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        flat = m.stem(x).flatten(2)
        gram = flat @ flat.transpose(1, 2) / flat.shape[-1]
        return m.head(gram.flatten(1))

    return on_images(forward, stem=nn.Conv2d(3, 8, 3), head=nn.Linear(64, 3))


def tokens_mixed() -> Example:
    """A mixer: a linear layer over the transposed tokens."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.patches(x).flatten(2).transpose(1, 2)
        x = x + m.tokens(m.norm(x).transpose(1, 2)).transpose(1, 2)
        return m.head((x + m.channels(x)).mean(1))

    return on_images(
        forward,
        patches=nn.Conv2d(3, 16, 2, 2),
        norm=nn.LayerNorm(16),
        tokens=nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)),
        channels=nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)),
        head=nn.Linear(16, 3),
    )


def reductions_of_channels() -> Example:
    """Spatial attention: mean and maximum over the channels gate the channels."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        gate = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True), x.std(1, keepdim=True)], 1)
        return m.head(x * m.gate(gate).sigmoid() + torch.logsumexp(x, 1, keepdim=True))

    return on_images(
        forward, stem=nn.Conv2d(3, 16, 1), gate=nn.Conv2d(3, 1, 3, padding=1), head=nn.Conv2d(16, 4, 1)
    )


def shifted_channels() -> Example:
    """Groups of channels move by one pixel (as TSM and shift networks do)."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        fold = x.shape[1] // 4
        out = torch.zeros_like(x)
        out[:, :fold, :, 1:] = x[:, :fold, :, :-1]
        out[:, fold : 2 * fold, :, :-1] = x[:, fold : 2 * fold, :, 1:]
        out[:, 2 * fold :] = x[:, 2 * fold :]
        return m.head(out)

    return on_images(forward, stem=nn.Conv2d(3, 16, 1), head=nn.Conv2d(16, 4, 1))


def permuted_by_a_buffer() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.second(m.first(x).relu())
        return m.head(x[:, m.order] + x.index_select(1, m.order.flip(0)) + x.flip(1))

    return on_vectors(
        forward,
        6,
        order=torch.randperm(16),
        first=nn.Linear(6, 24),
        second=nn.Linear(24, 16),
        head=nn.Linear(16, 3),
    )


MODELS: dict[str, Builder] = {
    case.__name__: case
    for case in (
        einsum_with_weights, einsum_diagonal, tensordot, fourier_mixing, spectrogram, gather_and_scatter, best_tokens,
        best_channels, slice_assignment, written_into_a_result, chunks_unbound_and_stacked, axes_moved_about, repeated,
        strided_views, softmax_over_channels, outer_products, gram_matrix, tokens_mixed, reductions_of_channels,
        shifted_channels, permuted_by_a_buffer,
    )
}  # fmt: skip
