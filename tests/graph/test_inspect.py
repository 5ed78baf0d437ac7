"""What an analysis says: structure that was discovered, reasons and source lines of what stays, rules of users."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import dwindle as dw
from dwindle.graph import Analysis, analyse
from dwindle.graph.analysis import AxisInfo
from dwindle.graph.axes import product
from dwindle.graph.inspect import describe, structure, to_json
from dwindle.graph.rules import registry


def axis_of(analysis: Analysis, parameter: str, dim: int) -> AxisInfo:
    """The one leaf of a parameter's dimension."""
    (leaf,) = set(analysis.parameter_axes[parameter][dim].leaves())
    return analysis.by_axis[leaf]


def made_of(analysis: Analysis, parameter: str) -> list[str]:
    return [structure(analysis, axis) for axis in analysis.parameter_axes[parameter]]


def line_of(function: Callable[..., Any], offset: int) -> str:
    return f"test_inspect.py:{function.__code__.co_firstlineno + offset}"


@pytest.fixture(scope="module")
def bert() -> Analysis:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    model = BertForSequenceClassification(config)
    return analyse(model, (), {"input_ids": torch.randint(0, 50, (2, 7))})


# structure


def test_bert_shows_heads_and_width_that_nobody_told_it(bert: Analysis) -> None:
    layer = "bert.encoder.layer.1."
    for name in ("query", "key", "value"):
        rows = made_of(bert, f"{layer}attention.self.{name}.weight")
        assert rows[0].startswith("4 heads x 8 ")
        assert rows[1] == "32 embedding"
    assert made_of(bert, f"{layer}attention.self.query.weight")[0] == "4 heads x 8 head_width"
    assert made_of(bert, f"{layer}attention.output.dense.weight")[1].startswith("4 heads x 8 ")
    assert "4 heads x 8 head_width" in describe(bert)
    assert made_of(bert, f"{layer}intermediate.dense.weight") == ["64 feed_forward", "32 embedding"]


def test_one_embedding_axis_runs_through_all_of_bert(bert: Analysis) -> None:
    embedding = axis_of(bert, "bert.embeddings.word_embeddings.weight", 1)
    assert embedding.kind == "embedding"
    assert embedding.selected
    for name in (
        "encoder.layer.0.attention.self.query",
        "encoder.layer.1.intermediate.dense",
        "pooler.dense",
    ):
        assert axis_of(bert, f"bert.{name}.weight", 1) is embedding
    assert {f"{name}[{dim}]" for name, dim in embedding.parameter_dims} >= {
        "bert.embeddings.LayerNorm.weight[0]",
        "bert.encoder.layer.1.output.dense.bias[0]",
    }


def test_heads_are_selected_and_widths_stay_or_the_other_way_round() -> None:
    model = HandMade()
    heads = analyse(model, (torch.randn(2, 5, 16),))
    widths = analyse(model, (torch.randn(2, 5, 16),), prefer="head_width")
    assert {info.kind for info in heads.selected()} & {"heads", "head_width"} == {"heads"}
    assert {info.kind for info in widths.selected()} & {"heads", "head_width"} == {"head_width"}
    frozen = [info for info in heads.axes if info.kind == "head_width" and not info.selected]
    assert "another factor of the same product shrinks" in {info.frozen_reason for info in frozen}


class HandMade(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = 4, 4
        self.qkv, self.out, self.head = nn.Linear(16, 48), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            piece.view(*piece.shape[:2], self.heads, self.width).transpose(1, 2)
            for piece in self.qkv(x).chunk(3, -1)
        )
        mixed = (query @ key.mT).softmax(-1) @ value
        return self.head(torch.relu(self.out(mixed.transpose(1, 2).flatten(2))))


def test_fused_query_key_value_shows_its_segments() -> None:
    analysis = analyse(HandMade(), (torch.randn(2, 5, 16),))
    rows = made_of(analysis, "qkv.weight")[0]
    assert rows.count(" + ") == 2
    assert rows.count("4 heads x 4") == 3


def test_units_of_coupled_parameters_agree() -> None:
    """Coupled dims share ids; for each unit the same index: the contract with the pruners."""
    analysis = analyse(HandMade(), (torch.randn(2, 5, 16),))
    (rows, row_index), (columns, column_index) = (
        analysis.units("qkv.weight", 0),
        analysis.units("out.weight", 1),
    )
    heads = next(info for info in analysis.selected() if info.kind == "heads")
    assert rows.tolist() == [heads.id] * 48
    assert columns.tolist() == [heads.id] * 16
    assert row_index.tolist() == [head for _ in range(3) for head in range(4) for _ in range(4)]
    assert column_index.tolist() == [head for head in range(4) for _ in range(4)]
    ids, index = analysis.units("head.weight", 0)
    assert ids.tolist() == index.tolist() == [-1, -1, -1]


def test_channel_groups_of_resnet18() -> None:
    """The dependency sets that NNI 2.10 asserted, read from the axes."""
    from torchvision.models import resnet18

    analysis = analyse(resnet18(), (torch.randn(2, 3, 32, 32),))
    found = set()
    for info in analysis.selected():
        producers = {
            name.removesuffix(".weight") for name, dim in info.parameter_dims if dim == 0 and "weight" in name
        }
        convolutions = frozenset(name for name in producers if "conv" in name or "downsample.0" in name)
        if len(convolutions) > 1:
            found.add(convolutions)
    assert found == {
        frozenset({"conv1", "layer1.0.conv2", "layer1.1.conv2"}),
        *(
            frozenset({f"layer{k}.0.conv2", f"layer{k}.1.conv2", f"layer{k}.0.downsample.0"})
            for k in (2, 3, 4)
        ),
    }


# reasons


class Reasons(nn.Module):
    """One layer for each reason to stay; the offsets below count from the line of ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.literal = nn.Linear(6, 8), nn.Linear(8, 24)
        self.sorted, self.free, self.head = nn.Linear(24, 8), nn.Linear(8, 16), nn.Linear(16, 3)
        self.never = nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.lift(x))
        x = self.literal(x).view(-1, 4, 6)
        x = self.sorted(x.flatten(1))
        x = x.sort(-1).values
        return self.head(torch.relu(self.free(x)))


def test_reasons_and_source_lines() -> None:
    analysis = analyse(Reasons(), (torch.randn(2, 6),))

    def why(parameter: str, dim: int) -> tuple[str, str]:
        leaves = [analysis.by_axis[leaf] for leaf in analysis.parameter_axes[parameter][dim].leaves()]
        assert not any(info.selected for info in leaves)
        return leaves[0].frozen_reason or "", leaves[0].source_line or ""

    assert why("lift.weight", 1)[0] == "model input"
    assert why("head.weight", 0)[0] == "model output"
    reason, line = why("literal.weight", 0)
    assert "literal in the code" in reason
    assert line.endswith(line_of(Reasons.forward, 2))
    assert why("sorted.weight", 0)[1].endswith(line_of(Reasons.forward, 4))
    assert why("never.weight", 0)[0] == "no recorded run uses it"
    assert axis_of(analysis, "lift.weight", 0).selected
    assert axis_of(analysis, "free.weight", 0).selected


def test_the_text_gives_reasons_and_lines() -> None:
    analysis = analyse(Reasons(), (torch.randn(2, 6),))
    text = describe(analysis)
    may, stay = text.split("axes that stay")
    assert "free.weight[0]" in may
    assert "head.weight[0], head.bias[0]: model output" in stay
    assert line_of(Reasons.forward, 2) in stay
    assert "kernel" not in text
    assert "parameters\n" not in describe(analysis, parameters=False)


def test_json_says_the_same() -> None:
    analysis = analyse(HandMade(), (torch.randn(2, 5, 16),))
    data = json.loads(json.dumps(to_json(analysis)))
    assert data["prunable_share"] == pytest.approx(analysis.prunable_share())
    assert {axis["id"] for axis in data["axes"] if axis["prunable"]} == {
        info.id for info in analysis.selected()
    }
    assert all(axis["reason"] for axis in data["axes"] if not axis["prunable"] and axis["size"] >= 4)
    assert data["parameters"]["out.weight"][1].startswith("4 heads x 4")
    assert data["unknown_operators"] == []
    assert len(data["constraints"]) == len(analysis.solver.constraints)
    assert all("equal parts" in text for text in data["constraints"])


def test_constraints_are_shown_with_their_line() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.head = nn.Linear(4, 16), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = self.both(x).chunk(2, -1)
            return self.head(torch.cat([first, second], 0))

    class Uneven(Halves):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = self.both(x).chunk(2, -1)
            return self.left(first) + self.right(second)

    assert "equal parts" in describe(analyse(Uneven(), (torch.randn(2, 4),)))
    assert "equal parts" not in describe(analyse(Halves(), (torch.randn(2, 4),)))  # one axis: always equal


# what must never be cut


def test_integer_buffers_and_unused_tables_are_never_cut() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.place = nn.Embedding(20, 16), nn.Embedding(12, 16)
            self.register_buffer("ids", torch.arange(12))
            self.register_buffer("order", torch.randperm(16))
            self.unused = nn.Parameter(torch.randn(12, 16))
            self.head = nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x) + self.place(self.ids[: x.shape[1]])
            return self.head(x[..., self.order].mean(1))

    model = Table()
    analysis = analyse(model, (torch.randint(0, 20, (2, 12)),))
    for name, dim in (
        ("ids", 0),
        ("order", 0),
        ("unused", 0),
        ("unused", 1),
        ("embed.weight", 0),
        ("place.weight", 0),
    ):
        assert not axis_of(analysis, name, dim).selected, name
    result = dw.prune(model, torch.randint(0, 20, (2, 12)), ratio=0.5)
    assert not {"ids", "order", "unused"} & set(result.plan.keep)
    assert all(
        0 not in dims for name, dims in result.plan.keep.items() if "weight" in name and "head" not in name
    )
    assert model.ids.tolist() == list(range(12))


def test_position_ids_as_long_as_the_width_are_not_confused_with_it(bert: Analysis) -> None:
    """BERT's position table and ids have 16 rows; the sequence was 7 long."""
    for name, dim in (("position_embeddings.weight", 0), ("position_ids", 1)):
        own = bert.parameter_axes[f"bert.embeddings.{name}"][dim].leaves()
        leaves = [bert.by_axis[leaf] for leaf in own if leaf.size > 1]
        assert leaves
        assert not any(info.selected for info in leaves)
    assert axis_of(bert, "bert.embeddings.position_embeddings.weight", 1).kind == "embedding"


def test_training_only_branches_share_the_axes() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.auxiliary, self.head = nn.Linear(4, 16), nn.Linear(16, 3), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> Any:
            x = torch.relu(self.trunk(x))
            return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)

    model = Auxiliary()
    both, evaluation = (
        analyse(model, (torch.randn(2, 4),)),
        analyse(model, (torch.randn(2, 4),), training=False),
    )
    assert axis_of(both, "auxiliary.weight", 1) is axis_of(both, "head.weight", 1)
    assert axis_of(evaluation, "auxiliary.weight", 1) is not axis_of(evaluation, "head.weight", 1)


def test_training_that_cannot_be_recorded_is_noted() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(4, 16), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                raise RuntimeError("needs targets")
            return self.head(torch.relu(self.first(x)))

    analysis = analyse(Broken(), (torch.randn(2, 4),))
    assert any("training mode could not be recorded" in note for note in analysis.notes)
    assert axis_of(analysis, "first.weight", 0).selected


def test_a_batch_of_one_does_not_hide_a_merge_with_the_batch() -> None:
    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(4, 16), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return self.head(x.reshape(x.shape[0] * 16, 1).reshape(x.shape[0], 16))

    model = Merged()
    analysis = analyse(model, (torch.randn(1, 4),))
    assert analysis.example_args[0].shape[0] == 2
    dw.prune(model, torch.randn(1, 4), ratio=0.5)
    assert model(torch.randn(5, 4)).shape == (5, 3)


# rules of users


@torch.library.custom_op("dwindle_tests::scaled", mutates_args=())
def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor


@scaled.register_fake
def _(x: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("dwindle_tests::pair_up", mutates_args=())
def pair_up(x: torch.Tensor) -> torch.Tensor:
    """Index (i, j) of the result is i of the first with j of itself doubled: each index twice."""
    return x.repeat_interleave(2, dim=-1)


@pair_up.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty([*x.shape[:-1], 2 * x.shape[-1]])


@pytest.fixture
def _rules() -> Iterator[None]:
    before = dict(registry._USER_RULES)
    yield
    registry._USER_RULES.clear()
    registry._USER_RULES.update(before)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 8)
        self.third, self.head = nn.Linear(8, 8), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.ops.dwindle_tests.scaled(self.first(x), 2.0)
        x = self.third(torch.relu(self.second(x)))
        return self.head(torch.ops.dwindle_tests.pair_up(x))


def test_an_operator_without_rule_freezes_and_is_listed() -> None:
    analysis = analyse(Custom(), (torch.randn(2, 4),))
    first = axis_of(analysis, "first.weight", 0)
    assert first.frozen_reason == "operator scaled has no axis rule"
    assert (first.source_line or "").endswith(line_of(Custom.forward, 1))
    assert axis_of(analysis, "second.weight", 0).selected
    listed = to_json(analysis)["unknown_operators"]
    assert sorted(entry["operator"] for entry in listed) == ["pair_up", "scaled"]
    scaled = next(entry for entry in listed if entry["operator"] == "scaled")
    assert scaled["line"].endswith(line_of(Custom.forward, 1))
    assert scaled["parameters"] == ["first.weight", "first.bias", "second.weight"]
    assert scaled["elements"] == 8 * 4 + 8 + 8 * 8
    assert scaled["share"] == pytest.approx(scaled["elements"] / (40 + 72 + 72 + 51))
    assert sum("is not followed" in note for note in analysis.notes) == 2
    text = describe(analysis)
    assert "operator scaled at" in text
    assert "froze first.weight, first.bias, second.weight (104 elements, 44.3% of the parameters)" in text
    model = Custom()
    dw.prune(model, torch.randn(2, 4), ratio=0.5)
    assert model.first.out_features == model.third.out_features == 8
    assert model.second.out_features == 4


@pytest.mark.usefixtures("_rules")
def test_a_rule_of_a_few_lines_makes_it_prunable() -> None:
    @dw.register_axis_rule("scaled")
    def same_axes(node: Any, scope: Any) -> None:
        node.output.axes = list(next(node.inputs()).axes)

    @dw.register_axis_rule("pair_up")
    def each_twice(node: Any, scope: Any) -> None:
        data = next(node.inputs())
        node.output.axes = [*data.axes[:-1], product([data.axes[-1], scope.leaf(2, "copies")])]

    analysis = analyse(Custom(), (torch.randn(2, 4),))
    assert to_json(analysis)["unknown_operators"] == []
    model = Custom()
    result = dw.prune(model, torch.randn(2, 4), ratio=0.5)
    assert model.first.out_features == model.second.out_features == model.third.out_features == 4
    kept = result.plan.keep["third.weight"][0].tolist()
    assert result.plan.keep["head.weight"][1].tolist() == [
        2 * index + copy for index in kept for copy in (0, 1)
    ]


@pytest.mark.usefixtures("_rules")
def test_a_rule_that_raises_freezes() -> None:
    @dw.register_axis_rule("scaled")
    def broken(node: Any, scope: Any) -> None:
        raise ValueError("only for float64")

    analysis = analyse(Custom(), (torch.randn(2, 4),))
    assert "only for float64" in (axis_of(analysis, "first.weight", 0).frozen_reason or "")


@pytest.mark.usefixtures("_rules")
def test_a_rule_that_forgets_an_output_freezes() -> None:
    @dw.register_axis_rule("scaled")
    def forgetful(node: Any, scope: Any) -> None:
        node.output.axes = []

    analysis = analyse(Custom(), (torch.randn(2, 4),))
    assert "does not cover this call" in (axis_of(analysis, "first.weight", 0).frozen_reason or "")
