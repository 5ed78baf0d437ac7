"""Head width shrinks where attention is divided by its square root: the weights take up the change, exactly once."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dwindle as dw

HEADS, WIDTH, HIDDEN = 4, 8, 32


class Attention(nn.Module):
    """Attention over (batch, tokens, hidden) with heads of a fixed number; subclasses say how it is scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(6, HIDDEN)
        self.query, self.key = nn.Linear(HIDDEN, HEADS * WIDTH), nn.Linear(HIDDEN, HEADS * WIDTH)
        self.value, self.out = nn.Linear(HIDDEN, HEADS * WIDTH), nn.Linear(HEADS * WIDTH, HIDDEN)
        self.end = nn.Linear(HIDDEN, 3)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.start(x)
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        mixed = self.attend(query, key, value)
        return self.end(x + self.out(mixed.transpose(1, 2).flatten(2)))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value)


def softmax(scores: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return scores.softmax(-1) @ value


class ScoresDivided(Attention):
    def attend(self, query: Any, key: Any, value: Any) -> torch.Tensor:
        return softmax(query @ key.transpose(-1, -2) / math.sqrt(key.size(-1)), value)


class QueryTimesPower(Attention):
    def attend(self, query: Any, key: Any, value: Any) -> torch.Tensor:
        return softmax((query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2), value)


class DividedInPlace(Attention):
    def attend(self, query: Any, key: Any, value: Any) -> torch.Tensor:
        scores = query @ key.mT
        scores /= query.shape[-1] ** 0.5
        return softmax(scores, value)


class RootOfTensor(Attention):
    def attend(self, query: Any, key: Any, value: Any) -> torch.Tensor:
        return softmax(query @ key.mT / torch.sqrt(torch.tensor(query.size(-1), dtype=query.dtype)), value)


class Twice(Attention):
    """Two factors, both computed: each is taken up."""

    def attend(self, query: Any, key: Any, value: Any) -> torch.Tensor:
        quarter = query.shape[-1] ** -0.25
        return softmax((query * quarter) @ (key * quarter).mT, value)


class GivenScale(Attention):
    def attend(self, query: Any, key: Any, value: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=1 / query.shape[-1])


class AddedBatch(Attention):
    def attend(self, query: Any, key: Any, value: Any) -> torch.Tensor:
        q, k = query.flatten(0, 1), key.flatten(0, 1)
        bias = torch.zeros(1, 1, 1, dtype=q.dtype, device=q.device)
        scores = torch.baddbmm(bias, q, k.mT, alpha=1 / math.sqrt(q.shape[-1]))
        return softmax(scores, value.flatten(0, 1)).unflatten(0, (-1, HEADS))


class Rotary(Attention):
    def attend(self, query: Any, key: Any, value: Any) -> torch.Tensor:
        half = query.shape[-1] // 2
        angle = torch.arange(query.shape[-2], device=query.device)[:, None].to(query.dtype)
        sine, cosine = angle.sin(), angle.cos()

        def turn(x: torch.Tensor) -> torch.Tensor:
            left, right = x[..., :half], x[..., half:]
            return x * cosine + torch.cat((-right, left), -1) * sine

        return F.scaled_dot_product_attention(turn(query), turn(key), value)


class Fused(nn.Module):
    """One projection for query, key and value, in the order of ``order``."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.start, self.end = nn.Linear(6, HIDDEN), nn.Linear(HIDDEN, 3)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HEADS * WIDTH), nn.Linear(HEADS * WIDTH, HIDDEN)
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.start(x)
        if self.order == "3hd":
            query, key, value = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.order == "h3d":
            query, key, value = self.qkv(x).unflatten(-1, (HEADS, 3, -1)).permute(3, 0, 2, 1, 4)
        else:
            query, key, value = (
                part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
            )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.end(x + self.out(mixed.transpose(1, 2).flatten(2)))


class Normalized(Attention):
    """A norm over the head width stands before the product: only its weight can carry a factor."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.query_norm = nn.RMSNorm(WIDTH, elementwise_affine=affine)
        self.key_norm = nn.RMSNorm(WIDTH, elementwise_affine=affine)

    def attend(self, query: Any, key: Any, value: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(self.query_norm(query), self.key_norm(key), value)


class QueryUsedTwice(Attention):
    """The query is also a gate, so the change must go to the key."""

    def attend(self, query: Any, key: Any, value: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value) * query.sum(-1, keepdim=True).sigmoid()


class BothUsedTwice(Attention):
    """Query and key are both read by something that would notice: there is no place, so the width stays."""

    def attend(self, query: Any, key: Any, value: Any) -> torch.Tensor:
        gate = query.sum(-1, keepdim=True).sigmoid() * key.sum(-1, keepdim=True).sigmoid()
        return F.scaled_dot_product_attention(query, key, value) * gate


class TwoReaders(Attention):
    """One query in two attentions of the same scale: one change serves both."""

    def attend(self, query: Any, key: Any, value: Any) -> torch.Tensor:
        first = F.scaled_dot_product_attention(query, key, value)
        return first + F.scaled_dot_product_attention(query, value, key)


class TwoScales(Attention):
    """One query in two attentions, one of them with a fixed scale: the change goes to the key."""

    def attend(self, query: Any, key: Any, value: Any) -> torch.Tensor:
        fixed = F.scaled_dot_product_attention(query, value, value, scale=0.3)
        return fixed + F.scaled_dot_product_attention(query, key, value)


class OneScaleStored(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.scale = WIDTH**-0.5

    def attend(self, query: Any, key: Any, value: Any) -> torch.Tensor:
        return softmax((query * self.scale) @ key.mT, value)


class Forgotten(Attention):
    """The number goes through ``float``, so nothing is known of what becomes of it."""

    def attend(self, query: Any, key: Any, value: Any) -> torch.Tensor:
        return softmax(query @ key.mT * (1 / math.log(float(query.shape[-1]) + 1)), value)


class Shared(Attention):
    """One layer, run three times: its weights are multiplied once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.start(x)
        for _ in range(3):
            query, key, value = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
            x = x + self.out(self.attend(query, key, value).transpose(1, 2).flatten(2))
        return self.end(x)


class Grouped(nn.Module):
    """Eight query heads, two key heads."""

    def __init__(self, repeat: bool) -> None:
        super().__init__()
        self.start, self.end = nn.Linear(6, HIDDEN), nn.Linear(HIDDEN, 3)
        self.query, self.out = nn.Linear(HIDDEN, 8 * WIDTH, bias=False), nn.Linear(8 * WIDTH, HIDDEN)
        self.key, self.value = nn.Linear(HIDDEN, 2 * WIDTH), nn.Linear(HIDDEN, 2 * WIDTH)
        self.heads, self.key_heads, self.repeat = 8, 2, repeat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.start(x)
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = (
            layer(x).unflatten(-1, (self.key_heads, -1)).transpose(1, 2) for layer in (self.key, self.value)
        )
        if self.repeat:
            key, value = (own.repeat_interleave(self.heads // self.key_heads, 1) for own in (key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, enable_gqa=not self.repeat)
        return self.end(x + self.out(mixed.transpose(1, 2).flatten(2)))


class TorchAttention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.start, self.end = nn.Linear(6, HIDDEN), nn.Linear(HIDDEN, 3)
        self.attention = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.start(x)
        return self.end(x + self.attention(x, x, x, need_weights=self.need_weights)[0])


def example() -> torch.Tensor:
    return torch.randn(2, 5, 6)


def masked(model: nn.Module, keep: dict[str, dict[int, torch.Tensor]]) -> nn.Module:
    """The full model with zeros where rows and columns went. It knows nothing of scales."""
    parameters = dict(model.named_parameters())
    for name, dims in keep.items():
        for dim, index in dims.items():
            gone = torch.ones(parameters[name].shape[dim], dtype=torch.bool)
            gone[index] = False
            parameters[name].data.movedim(dim, 0)[gone] = 0
    return model


def pruned(model: nn.Module, **options: Any) -> tuple[dw.realize.ShrinkResult, float]:
    """Prune, and compare with the masked full model on inputs of another batch and length, in both modes."""
    dense = copy.deepcopy(model)
    result = dw.prune(model, example(), ratio=0.5, **{"axes": ["head_width"], **options})
    reference, worst = masked(dense, result.plan.keep).double(), 0.0
    small = copy.deepcopy(result.model).double()
    for training in (False, True):
        reference.train(training)
        small.train(training)
        x = torch.randn(3, 7, 6, dtype=torch.float64)
        worst = max(worst, float((reference(x) - small(x)).detach().abs().max()))
    return result, worst


COMPENSATED = {
    "default": Attention,
    "scores divided": ScoresDivided,
    "query times power": QueryTimesPower,
    "divided in place": DividedInPlace,
    "root of a tensor": RootOfTensor,
    "twice": Twice,
    "given scale": GivenScale,
    "baddbmm": AddedBatch,
    "rotary": Rotary,
    "two readers": TwoReaders,
    "two scales": TwoScales,
    "query used twice": QueryUsedTwice,
    "shared": Shared,
    "fused 3hd": lambda: Fused("3hd"),
    "fused h3d": lambda: Fused("h3d"),
    "fused chunk": lambda: Fused("chunk"),
    "grouped": lambda: Grouped(False),
    "repeated": lambda: Grouped(True),
}


@pytest.mark.parametrize("name", COMPENSATED)
def test_half_of_the_width_goes_and_the_temperature_stays(name: str) -> None:
    torch.manual_seed(0)
    result, worst = pruned(COMPENSATED[name]())
    widths = {(cut["before"], cut["after"]) for cut in result.plan.cuts}
    assert widths <= {(WIDTH, WIDTH // 2), (WIDTH // 2, WIDTH // 4)}
    touched = {name for cut in result.plan.cuts for name in cut["parameters"]}
    assert any(name.startswith(("query.weight", "qkv.weight")) for name in touched)
    assert result.plan.scales
    assert worst < 1e-6  # the small weights are float32; the proof itself was made in float64
    assert result.verification.max_difference < 1e-12


def test_the_rows_of_the_query_are_multiplied_exactly_once() -> None:
    model = Shared()
    dense = copy.deepcopy(model)
    result, _ = pruned(model)
    rows = result.plan.keep["query.weight"][0]
    factor = math.sqrt(WIDTH // 2) / math.sqrt(WIDTH)
    torch.testing.assert_close(model.query.weight, dense.query.weight[rows] * factor)
    torch.testing.assert_close(model.query.bias, dense.query.bias[rows] * factor)
    assert torch.equal(model.key.weight, dense.key.weight[result.plan.keep["key.weight"][0]])
    assert torch.equal(model.value.weight, dense.value.weight[result.plan.keep["value.weight"][0]])


def test_of_a_fused_projection_only_the_query_is_multiplied() -> None:
    model = Fused("h3d")
    dense = copy.deepcopy(model)
    result, _ = pruned(model)
    rows = result.plan.keep["qkv.weight"][0]
    ratio = (model.qkv.weight / dense.qkv.weight[rows]).view(HEADS, 3, WIDTH // 2, HIDDEN)
    torch.testing.assert_close(ratio[:, 0], torch.full_like(ratio[:, 0], math.sqrt(0.5)))
    torch.testing.assert_close(ratio[:, 1:], torch.ones_like(ratio[:, 1:]))


def test_a_query_that_something_else_reads_is_left_alone() -> None:
    model = QueryUsedTwice()
    dense = copy.deepcopy(model)
    result, _ = pruned(model)
    assert result.plan.scales[0]["parameters"] == ["key.bias", "key.weight"]
    assert torch.equal(model.query.weight, dense.query.weight[result.plan.keep["query.weight"][0]])


@pytest.mark.parametrize("make", [BothUsedTwice, lambda: Normalized(False)])
def test_without_a_place_the_width_stays_and_says_why(make: Any) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    result, worst = pruned(model)
    reasons = {entry["reason"] for entry in result.frozen if entry["kind"] == "head_width"}
    assert any("no weight can take up its change" in reason for reason in reasons)
    assert model.query.out_features == HEADS * WIDTH
    assert torch.equal(model.query.weight, before["query.weight"])
    assert worst < 1e-6


def test_a_number_of_which_nothing_is_known_keeps_its_size() -> None:
    model = Forgotten()
    _, worst = pruned(model)
    assert model.query.out_features == HEADS * WIDTH
    assert model.value.out_features == HEADS * WIDTH // 2
    assert worst < 1e-6


def test_the_weight_of_a_norm_takes_up_the_change() -> None:
    model = Normalized()
    with torch.no_grad():
        model.query_norm.weight.uniform_(0.5, 2.0)
    dense = copy.deepcopy(model)
    result = dw.prune(model, example(), ratio=0.5, axes=["head_width"])
    kept = result.plan.keep["query_norm.weight"][0]
    torch.testing.assert_close(model.query_norm.weight, dense.query_norm.weight[kept] * math.sqrt(0.5))
    assert result.verification.inside  # the norm runs over the width that was cut
    assert result.verification.max_difference < 1e-12


def test_a_stored_scale_needs_nothing() -> None:
    model = OneScaleStored()
    dense = copy.deepcopy(model)
    result, worst = pruned(model)
    assert not result.plan.scales
    assert model.scale == WIDTH**-0.5
    assert torch.equal(model.query.weight, dense.query.weight[result.plan.keep["query.weight"][0]])
    assert worst < 1e-6


@pytest.mark.parametrize("need_weights", [False, True])
def test_torch_attention_keeps_its_temperature(need_weights: bool) -> None:
    """Its width is hidden / heads, so both go together."""
    model = TorchAttention(need_weights)
    result, worst = pruned(model, axes=["head_width", "channels"])
    assert model.attention.head_dim == WIDTH // 2
    assert model.attention.embed_dim == HIDDEN // 2
    assert result.plan.scales
    assert worst < 1e-6


def test_twice_in_a_row_the_factors_multiply() -> None:
    model = nn.Sequential(TorchAttention(False).start, Attention())
    model[1].start = nn.Linear(HIDDEN, HIDDEN)
    dense = copy.deepcopy(model)
    dw.prune(model, example(), ratio=0.25, axes=["head_width"])
    assert model[1].query.out_features == HEADS * 6
    result = dw.prune(model, example(), ratio=0.5, axes=["head_width"])
    assert model[1].query.out_features == HEADS * 3
    assert result.verification.max_difference < 1e-12
    largest = float((model[1].query.weight.abs().max() / dense[1].query.weight.abs().max()).detach())
    assert largest <= math.sqrt(3 / 8) * 1.0001


def test_the_optimizer_goes_on() -> None:
    model, x = Attention(), example()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    target = torch.randn(2, 5, 3)
    losses = []
    for step in range(12):
        loss = (model(x) - target).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 5:
            dw.prune(model, x, ratio=0.5, axes=["head_width"], optimizer=optimizer)
    assert losses[-1] < losses[0]
    assert all(any(own is held for own in model.parameters()) for held in optimizer.param_groups[0]["params"])
