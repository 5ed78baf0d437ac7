"""Whole experts: found around their router, removed, and equal to a model whose router never chooses them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dwindle as dw
from dwindle.config.errors import ConfigError, RealizeError
from dwindle.graph.analysis import analyse
from dwindle.graph.inspect import describe
from dwindle.realize import ShrinkResult, experts_proof
from dwindle.realize.experts import MaskedRouters


class Listed(nn.Module):
    """A loop over a list of experts; the best two are chosen for each token."""

    def __init__(self, width: int = 8, experts: int = 6, chosen: int = 2, linear: bool = True) -> None:
        super().__init__()
        self.num_experts, self.chosen = experts, chosen
        self.router = nn.Linear(width, experts, bias=linear)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width)) for _ in range(experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, indices = self.router(flat).softmax(-1).topk(self.chosen, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        result = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            tokens, place = torch.where(indices == number)
            result.index_add_(0, tokens, expert(flat[tokens]) * weights[tokens, place, None])
        return result.view(x.shape)


class Stacked(nn.Module):
    """All experts in one tensor, chosen by sigmoid scores; the work is done on dense one-hot weights."""

    def __init__(self, width: int = 8, experts: int = 6, chosen: int = 2) -> None:
        super().__init__()
        self.num_experts, self.top_k = experts, chosen
        self.gate = nn.Parameter(torch.randn(width, experts))
        self.up, self.up_bias = (
            nn.Parameter(torch.randn(experts, width, 12)),
            nn.Parameter(torch.randn(experts, 12)),
        )
        self.down = nn.Parameter(torch.randn(experts, 12, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, indices = (x @ self.gate).sigmoid().topk(self.top_k, dim=-1)
        spread = (F.one_hot(indices, self.num_experts) * weights.unsqueeze(-1)).sum(-2)
        inner = F.gelu(torch.einsum("btd,edf->btef", x, self.up) + self.up_bias)
        return torch.einsum("btef,efd,bte->btd", inner, self.down, spread)


class Soft(nn.Module):
    """Every expert runs; a softmax weighs them."""

    def __init__(self, width: int = 8, experts: int = 6, chosen: int = 0) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        every = torch.stack([expert(x) for expert in self.experts], -1)
        return (every * self.router(x).softmax(-1).unsqueeze(-2)).sum(-1)


class Grouped(Stacked):
    """Chooses groups of experts first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = (x @ self.gate).sigmoid()
        groups = scores.unflatten(-1, (2, -1)).topk(2, dim=-1)[0].sum(-1)
        mask = F.one_hot(groups.argmax(-1), 2).repeat_interleave(self.num_experts // 2, dim=-1)
        weights, indices = (scores * mask).topk(self.top_k, dim=-1)
        spread = (F.one_hot(indices, self.num_experts) * weights.unsqueeze(-1)).sum(-2)
        inner = F.gelu(torch.einsum("btd,edf->btef", x, self.up) + self.up_bias)
        return torch.einsum("btef,efd,bte->btd", inner, self.down, spread)


KINDS: dict[str, type[nn.Module]] = {"listed": Listed, "stacked": Stacked, "soft": Soft}


class Net(nn.Module):
    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(kind(**options) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def inputs(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randn(batch, length, 5)


@contextmanager
def never_chosen(gone: dict[int, torch.Tensor]) -> Iterator[None]:
    """By hand: after each router's scores, those of the removed experts are minus infinity."""
    plain_softmax, plain_sigmoid = torch.Tensor.softmax, torch.Tensor.sigmoid
    calls = iter(range(1000))

    def masked(scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(gone[next(calls) % 2], float("-inf"))

    torch.Tensor.softmax = lambda self, dim: plain_softmax(masked(self), dim)  # type: ignore[assignment,method-assign]
    torch.Tensor.sigmoid = lambda self: plain_sigmoid(masked(self))  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.Tensor.softmax, torch.Tensor.sigmoid = plain_softmax, plain_sigmoid  # type: ignore[method-assign]


def removed(result: ShrinkResult, size: int = 6) -> dict[int, torch.Tensor]:
    """For each layer, which experts went."""
    found = {}
    for layer in range(2):
        name = next(
            n for n in result.plan.keep if n.startswith(f"layers.{layer}.") and ("router" in n or "gate" in n)
        )
        (kept,) = result.plan.keep[name].values()
        found[layer] = torch.ones(size, dtype=torch.bool).index_fill(0, kept, False)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_a_model_that_never_chooses_them(kind: str) -> None:
    model, x = Net(KINDS[kind]).double().eval(), inputs().double()
    dense = copy.deepcopy(model)
    result = dw.prune(model, x, ratio=0.5, axes=["expert"])
    assert result.model is model
    assert [entry["kind"] for entry in result.plan.cuts] == ["expert", "expert"]
    assert all(entry["before"] == 6 and entry["after"] == 3 for entry in result.plan.cuts)
    with torch.no_grad():
        with never_chosen(removed(result)):
            expected = dense(x)
        assert torch.allclose(model(x), expected, rtol=0, atol=1e-10)
        assert not torch.allclose(dense(x), expected, rtol=1e-3)
    assert not [note for note in result.notes if "no input of the proof" in note]
    for layer in model.layers:
        assert getattr(layer, "num_experts", 3) == 3
        assert len(getattr(layer, "experts", range(3))) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_trains_and_optimizer_goes_on(kind: str) -> None:
    model, x = Net(KINDS[kind]), inputs()
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    dw.prune(model, x, ratio=0.5, axes=["expert"], optimizer=optimizer)
    left = {id(parameter) for parameter in model.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == left
    assert all(state["exp_avg"].shape == p.shape for p, state in optimizer.state.items())
    before = model.head.weight.detach().clone()
    step()
    assert not torch.equal(before, model.head.weight)


@pytest.mark.parametrize("kind", ["listed", "stacked"])
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model, x = Net(KINDS[kind]).eval(), inputs()
    result = dw.prune(model, x, ratio=0.5, axes=["expert"])
    dw.save(result, tmp_path / "small")
    loaded = dw.load(tmp_path / "small", lambda: Net(KINDS[kind]))
    assert torch.equal(loaded(x), model(x))


def test_as_many_stay_as_are_chosen() -> None:
    model = Net(Listed, chosen=4)
    result = dw.prune(model, inputs(), ratio=0.9, axes=["expert"])
    assert [entry["after"] for entry in result.plan.cuts] == [4, 4]


def test_least_important_experts_go_and_ratios_by_name() -> None:
    model = Net(Listed)
    with torch.no_grad():
        for number in (1, 4):
            for parameter in model.layers[0].experts[number].parameters():
                parameter.mul_(0.01)
    result = dw.prune(model, inputs(), ratio=0.0, ratios={"layers.0": 1 / 3}, axes=["expert"])
    assert result.plan.entries == ["layers.0.experts.1", "layers.0.experts.4"]
    assert [layer.num_experts for layer in model.layers] == [4, 6]
    result = dw.prune(Net(Listed), inputs(), ratio=0.5, ignore=["layers.1"], axes=["expert"])
    assert len(result.plan.cuts) == 1


def test_experts_blocks_and_channels_in_one_call() -> None:
    model, x = Net(Stacked).eval(), inputs()
    before = sum(parameter.numel() for parameter in model.parameters())
    result = dw.prune(model, x, ratio=0.5, axes=["expert", "block", "channels", "feed_forward"])
    assert {entry["kind"] for entry in result.plan.cuts} >= {"expert"}
    assert result.verification is not None
    assert result.verification.max_difference < 1e-9
    assert result.parameters_after < before / 2


def test_experts_in_groups_stay() -> None:
    model = Net(Grouped)
    result = dw.prune(model, inputs(), ratio=0.5, axes=["expert"])
    assert not result.plan.cuts
    reasons = [entry["reason"] for entry in result.frozen if entry["kind"] == "expert"]
    assert len(reasons) == 2
    assert all("by groups" in reason for reason in reasons)
    assert "6 experts, 2 chosen: stay" in describe(analyse(model, (inputs(),)))


def test_scores_that_leave_the_model_keep_the_experts() -> None:
    class Leaving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixture = Listed()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.mixture(x), self.mixture.router(x.reshape(-1, 8))

    result = dw.prune(Leaving(), torch.randn(2, 9, 8), ratio=0.5, axes=["expert"])
    assert not result.plan.cuts


def test_no_mixture_is_seen_where_there_is_none() -> None:
    class Attention(nn.Module):
        """A softmax over as many classes as there are layers."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
            self.head = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x).relu()
            return self.head(x).softmax(-1)

    assert not analyse(Attention(), (torch.randn(2, 8),)).mixtures


def test_untouched_when_the_proof_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Net(Listed).eval(), inputs()
    answer, state = model(x), copy.deepcopy(model.state_dict())

    def asleep(self: MaskedRouters, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))

    monkeypatch.setattr(MaskedRouters, "__torch_dispatch__", asleep)
    with pytest.raises(RealizeError, match="not equal"):
        dw.prune(model, x, ratio=0.5, axes=["expert"])
    monkeypatch.undo()

    def wrong(*_args: Any) -> float:
        return 1.0

    monkeypatch.setattr(experts_proof, "difference", wrong)
    with pytest.raises(RealizeError, match="never choose"):
        dw.prune(model, x, ratio=0.5, axes=["expert"])
    assert torch.equal(model(x), answer)
    assert all(torch.equal(held, state[name]) for name, held in model.state_dict().items())
    assert [layer.num_experts for layer in model.layers] == [6, 6]


def test_experts_are_no_matter_of_a_target() -> None:
    with pytest.raises(ConfigError, match="expert"):
        dw.prune(Net(Listed), inputs(), target={"params": 0.5}, axes=["expert"])


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_mixtral(implementation: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    config._experts_implementation = implementation
    model = transformers.MixtralForCausalLM(config).eval()
    ids = torch.randint(3, 30, (2, 8))
    result = dw.prune(model, (), example_kwargs={"input_ids": ids}, ratio=0.5, axes=["expert"])
    assert [entry["after"] for entry in result.plan.cuts] == [2, 2]
    assert model.config.num_local_experts == 2
    assert all(layer.mlp.experts.gate_up_proj.shape[0] == 2 for layer in model.model.layers)
    with torch.no_grad():
        answer = model(ids).logits
        model.save_pretrained(tmp_path)
        loaded = transformers.MixtralForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.allclose(loaded(ids).logits, answer, atol=1e-5)
