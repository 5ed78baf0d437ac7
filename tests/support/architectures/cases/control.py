"""Python around the tensors: branches, loops, containers, wrappers, and models with nothing to prune."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from support.architectures.cases.composed import Composed, on_images, on_sequences, on_vectors, parameter
from support.architectures.example import Builder, Example


def data_dependent_branch() -> Example:
    """Which layer runs depends on the numbers."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.first(x)
        x = m.high(x) if x.mean() > -1e9 else m.low(x)
        return m.head(x.relu())

    return on_vectors(
        forward,
        6,
        first=nn.Linear(6, 16),
        high=nn.Linear(16, 16),
        low=nn.Linear(16, 16),
        head=nn.Linear(16, 3),
    )


def nothing_selected() -> Example:
    """A head for selected samples, of which the recorded inputs have none: tensors without elements are reshaped."""

    def forward(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = x.mean((1, 2, 3)) > 1e6
        x = m.stem(x).relu()
        chosen = x[wanted]
        return m.head(x.mean((2, 3))), m.second(m.first(chosen.flatten(1)).relu())

    return on_images(
        forward,
        stem=nn.Conv2d(3, 16, 3, stride=4),
        head=nn.Linear(16, 5),
        first=nn.Linear(16 * 4, 12),
        second=nn.Linear(12, 3),
    )


def data_dependent_loop() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.first(x)
        rounds = 0
        while x.norm() > 1e-3 and rounds < 3:
            x = 0.5 * torch.tanh(m.again(x))
            rounds += 1
        return m.head(x)

    return on_vectors(forward, 6, first=nn.Linear(6, 16), again=nn.Linear(16, 16), head=nn.Linear(16, 3))


def train_only_branch() -> Example:
    """An auxiliary head that exists only in training, and stochastic depth."""

    def forward(m: Any, x: torch.Tensor) -> Any:
        x = m.stem(x).relu()
        early = m.auxiliary(m.squeeze(x).relu().flatten(1)) if m.training else None
        branch = m.block(x)
        if m.training:
            branch = branch * (torch.rand(x.shape[0], 1, 1, 1) < 0.8).to(x.dtype) / 0.8
        out = m.head((x + branch).mean((2, 3)))
        return (out, early) if m.training else out

    return on_images(
        forward,
        stem=nn.Conv2d(3, 16, 3, stride=2),
        squeeze=nn.Conv2d(16, 8, 1),
        auxiliary=nn.Linear(8 * 9, 3),
        block=nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)),
        head=nn.Linear(16, 3),
    )


def unused_head() -> Example:
    """Two tasks, and a third head that nothing calls."""

    def forward(m: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = m.body(x)
        return {"class": m.classes(x), "box": m.boxes(x).sigmoid()}

    return on_vectors(
        forward,
        6,
        body=nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()),
        classes=nn.Linear(16, 5),
        boxes=nn.Linear(16, 4),
        later=nn.Linear(16, 7),
    )


def nested_dictionaries() -> Example:
    def forward(m: Any, batch: dict[str, Any]) -> dict[str, Any]:
        views = [m.view(view) for view in batch["views"]]
        joined = torch.cat([*views, m.meta(batch["meta"]["numbers"])], dim=-1)
        return {"out": {"main": m.head(joined)}, "parts": tuple(m.part(view) for view in views)}

    model = Composed(
        forward, view=nn.Linear(6, 12), meta=nn.Linear(4, 8), part=nn.Linear(12, 2), head=nn.Linear(32, 3)
    )
    inputs = {"views": [torch.randn(2, 6), torch.randn(2, 6)], "meta": {"numbers": torch.randn(2, 4)}}
    return Example(model, (inputs,))


@dataclass
class Batch:
    image: torch.Tensor
    scale: torch.Tensor


@dataclass
class Answer:
    scores: torch.Tensor
    features: list[torch.Tensor] = field(default_factory=list)


torch.utils._pytree.register_dataclass(Batch)


def dataclass_in_and_out() -> Example:
    def forward(m: Any, batch: Batch) -> Answer:
        x = m.stem(batch.image).relu() * batch.scale[:, None, None, None]
        x = m.mid(x).relu()
        return Answer(m.head(x.mean((2, 3))), [m.side(x)])

    model = Composed(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        mid=nn.Conv2d(16, 16, 3),
        side=nn.Conv2d(16, 2, 1),
        head=nn.Linear(16, 3),
    )
    return Example(model, (Batch(torch.randn(2, 3, 8, 8), torch.rand(2)),))


def keyword_arguments() -> Example:
    def forward(m: Any, x: torch.Tensor, *, context: torch.Tensor | None = None, scale: float = 1.0) -> Any:
        x = m.first(x)
        if context is not None:
            x = x + m.context(context)
        return m.head(x.relu() * scale)

    model = Composed(forward, first=nn.Linear(6, 16), context=nn.Linear(4, 16), head=nn.Linear(16, 3))
    return Example(model, (), {"x": torch.randn(2, 6), "context": torch.randn(2, 4), "scale": 0.5})


class Cache:
    """Keys and values seen so far."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys.append(key)
        self.values.append(value)
        return torch.cat(self.keys, dim=2), torch.cat(self.values, dim=2)


def key_value_cache() -> Example:
    """The prompt in two pieces; the second attends to the first through a cache object."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        cache = Cache()
        outputs = []
        for piece in x.split([3, 2], dim=1):
            batch, length, _ = piece.shape
            query, key, value = m.qkv(m.lift(piece)).view(batch, length, 3, m.heads, m.width).unbind(2)
            key, value = cache.update(key.transpose(1, 2), value.transpose(1, 2))
            out = F.scaled_dot_product_attention(query.transpose(1, 2), key, value)
            outputs.append(m.out(out.transpose(1, 2).flatten(2)))
        return m.head(torch.cat(outputs, dim=1))

    return on_sequences(
        forward,
        6,
        5,
        heads=4,
        width=4,
        lift=nn.Linear(6, 16),
        qkv=nn.Linear(16, 48),
        out=nn.Linear(16, 16),
        head=nn.Linear(16, 3),
    )


def checkpointed() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.first(x)
        for block in m.blocks:
            run = checkpoint(block, x, use_reentrant=False) if m.training else block(x)
            x = x + run
        return m.head(x)

    blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(2)])
    return on_vectors(forward, 6, first=nn.Linear(6, 16), blocks=blocks, head=nn.Linear(16, 3))


@torch.jit.script
def _scripted_gate(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    if x.dim() == 2:
        return x * torch.sigmoid(gate)
    return x


def scripted_function() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.first(x)
        return m.head(_scripted_gate(x, m.gate(x)))

    return on_vectors(forward, 6, first=nn.Linear(6, 16), gate=nn.Linear(16, 16), head=nn.Linear(16, 3))


def scripted_submodule() -> Example:
    """A compiled part whose parameters cannot be exchanged for smaller ones; the rest can."""
    body = torch.jit.script(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    return on_vectors(nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), body, nn.Linear(16, 3)))


def autocast_region() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.first(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.dtype == torch.float32):
            x = m.second(x).relu()
        return m.head(x.to(m.head.weight.dtype))

    return on_vectors(forward, 6, first=nn.Linear(6, 16), second=nn.Linear(16, 16), head=nn.Linear(16, 3))


def mapped_over_the_batch() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.first(x)
        return m.head(torch.func.vmap(lambda row: torch.tanh(m.weight @ row))(x))

    return on_vectors(forward, 6, first=nn.Linear(6, 16), weight=parameter(12, 16), head=nn.Linear(12, 3))


def no_parameters() -> Example:
    return on_images(nn.Sequential(nn.AvgPool2d(2), nn.ReLU(), nn.Flatten()))


def single_linear() -> Example:
    """Input and output are all there is: nothing can shrink."""
    return on_vectors(nn.Linear(6, 3))


def graph_module() -> Example:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    return on_vectors(fx.symbolic_trace(model))


def nested_containers() -> Example:
    def block(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(width, 2 * width), nn.Sequential(nn.GELU(), nn.Linear(2 * width, width))
        )

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.first(x)
        for group in m.groups:
            for name in group:
                x = x + group[name][0](group[name][1](x))
        return m.head(x)

    group = lambda: nn.ModuleDict({"a": nn.ModuleList([block(16), nn.LayerNorm(16)])})
    return on_vectors(
        forward, 6, first=nn.Linear(6, 16), groups=nn.ModuleList([group(), group()]), head=nn.Linear(16, 3)
    )


def literal_sizes() -> Example:
    """``view(-1, 144)``: the number stands in the code."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.second(m.first(x).relu()).relu()
        return m.out(m.middle(x.view(-1, 16 * 3 * 3)).relu())

    return on_images(
        forward,
        3,
        8,
        first=nn.Conv2d(3, 16, 3, stride=2),
        second=nn.Conv2d(16, 16, 1),
        middle=nn.Linear(144, 24),
        out=nn.Linear(24, 3),
    )


def sizes_by_division() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.lift(x)
        batch, length, width = x.shape
        heads = m.lift.out_features // m.each
        x = x.view(batch, length, heads, width // heads).transpose(1, 2)
        x = (x - x.mean(-1, keepdim=True)).transpose(1, 2).reshape(batch, length, heads * (width // heads))
        return m.head(x)

    return on_sequences(forward, 6, 4, each=4, lift=nn.Linear(6, 16), head=nn.Linear(16, 3))


def experts_by_loop() -> Example:
    """Each token goes to its two best experts; tokens are gathered and put back by number."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        x = m.lift(x).flatten(0, 1)
        weights, chosen = m.router(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(m.experts):
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, expert(x[token]) * weights[token, place, None])
        return m.head((x + out).view(batch, length, -1))

    experts = [nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 16)) for _ in range(4)]
    return on_sequences(
        forward,
        6,
        4,
        lift=nn.Linear(6, 16),
        router=nn.Linear(16, 4, bias=False),
        experts=nn.ModuleList(experts),
        head=nn.Linear(16, 3),
    )


def experts_by_stacked_weights() -> Example:
    """All experts run on all tokens; the router's weights are zero but for the best two."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.lift(x)
        scores = m.router(x)
        best = scores.topk(2, dim=-1).indices
        mask = torch.zeros_like(scores).scatter(-1, best, 1.0)
        weights = (scores.softmax(-1) * mask).unsqueeze(-1)
        hidden = F.silu(torch.einsum("bld,edh->bleh", x, m.up))
        return m.head((torch.einsum("bleh,ehd->bled", hidden, m.down) * weights).sum(2))

    return on_sequences(
        forward,
        6,
        4,
        lift=nn.Linear(6, 16),
        router=nn.Linear(16, 4),
        up=parameter(4, 16, 24),
        down=parameter(4, 24, 16),
        head=nn.Linear(16, 3),
    )


MODELS: dict[str, Builder] = {
    case.__name__: case
    for case in (
        data_dependent_branch, nothing_selected, data_dependent_loop, train_only_branch, unused_head,
        nested_dictionaries, dataclass_in_and_out, keyword_arguments, key_value_cache, checkpointed, scripted_function,
        scripted_submodule, autocast_region, mapped_over_the_batch, no_parameters, single_linear, graph_module,
        nested_containers, literal_sizes, sizes_by_division, experts_by_loop, experts_by_stacked_weights,
    )
}  # fmt: skip
