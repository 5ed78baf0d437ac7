"""Recording: it sees every operator and every size, and leaves no trace on the model."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from torch import nn

import dwindle as dw
from dwindle.config.errors import CaptureError
from dwindle.graph import analyse, record
from dwindle.graph.expressions import Attribute, Dimension, describe, variables
from dwindle.graph.nodes import Node
from dwindle.graph.trace import Trace


class Block(nn.Module):
    """Convolution, norm, dropout, sizes from attributes, shapes and literals."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.groups, self.sizes = 2, [4, 16]
        self.head = nn.Linear(8, 5)
        self.register_buffer("scale", torch.rand(8))
        self.steps = torch.tensor([1, 2, 3])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.norm(self.conv(x)))
        x = x.view(x.shape[0], self.groups, x.shape[1] // self.groups, *self.sizes)
        x = x.flatten(1, 2).mean((2, 3)) * self.scale
        return self.head(x)


def images() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Identity and bits of everything that recording must leave alone."""
    state: dict[str, Any] = {}
    for path, module in model.named_modules():
        for key, held in {**module._parameters, **module._buffers, **vars(module)}.items():
            if isinstance(held, torch.Tensor):
                state[f"{path}.{key}"] = (
                    id(held),
                    held.detach().clone(),
                    held.device,
                    held.requires_grad,
                    held._version,
                )
            elif isinstance(held, int | float | tuple | list | torch.Size):
                items = held if isinstance(held, tuple | list) else [held]
                state[f"{path}.{key}"] = (type(held), repr(held), [type(item) for item in items])
        hooks = [key for key in vars(module) if "hooks" in key]
        state[f"{path} hooks"] = [(key, list(vars(module)[key])) for key in hooks]
        state[f"{path} keys"] = sorted(vars(module))
    return state


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, own in before.items():
        for a, b in zip(own, after[key], strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, key


def names(trace: Trace) -> list[str]:
    return [node.name for node in trace.live_nodes()]


def calls(trace: Trace, name: str) -> list[Node]:
    return [node for node in trace.nodes if node.name == name]


# nothing is left behind


@pytest.mark.parametrize("device", ["meta", "real"])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_untouched(device: str, training: bool) -> None:
    model = Block().train()
    model.norm.eval()
    model.weights = [3, 4]
    before, random_state = state_of(model), torch.get_rng_state()
    globally = (
        torch.nn.modules.module._global_forward_hooks,
        torch.nn.modules.module._global_forward_pre_hooks,
    )
    counts = [len(hooks) for hooks in globally]
    sqrt, fast_path = math.sqrt, torch.backends.mha.get_fastpath_enabled()
    x = images()
    random_state, copied = torch.get_rng_state(), x.clone()
    record(model, (x,), training=training, device=device)
    assert_same(before, state_of(model))
    assert torch.equal(random_state, torch.get_rng_state())
    assert torch.equal(x, copied)
    assert model.drop.training
    assert not model.norm.training
    assert [len(hooks) for hooks in globally] == counts
    assert math.sqrt is sqrt
    assert torch.backends.mha.get_fastpath_enabled() is fast_path
    assert torch.get_default_device() == torch.device("cpu")


def test_statistics_are_bit_equal_after_an_analysis_of_both_modes() -> None:
    model = Block().train()
    model(images())
    before = copy.deepcopy(model.state_dict())
    analyse(model, (images(),))
    assert all(torch.equal(held, before[key]) for key, held in model.state_dict().items())
    assert int(model.norm.num_batches_tracked) == 1


@pytest.mark.parametrize("device", ["meta", "real"])
def test_a_failure_leaves_nothing_behind_either(device: str) -> None:
    model = Block().train()
    before, random_state = state_of(model), torch.get_rng_state()
    with pytest.raises(CaptureError, match="Block could not be run on the example inputs in evaluation mode"):
        record(model, (torch.ones(2, 4, 8, 8),), device=device)
    assert_same(before, state_of(model))
    assert torch.equal(random_state, torch.get_rng_state())
    assert model.training
    model(images()).sum().backward()


def test_gradients_can_flow_after_recording() -> None:
    model = Block()
    record(model, (images(),))
    model(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any(parameter.is_inference() for parameter in model.parameters())


# what is seen


@pytest.mark.parametrize("training", [False, True])
def test_meta_and_real_recordings_give_the_same_operators(training: bool) -> None:
    model = Block()
    first, second = (record(model, (images(),), training=training, device=own) for own in ("meta", "real"))
    assert first.executed_on == "meta"
    assert second.executed_on == "real"
    described = [
        [
            (n.name, n.module, n.where, [o.shape for o in n.outputs], [describe(s) for s in n.sizes or []])
            for n in t.nodes
        ]
        for t in (first, second)
    ]
    assert described[0] == described[1]
    assert "dropout" in names(first)
    assert "batch_norm" in names(first)


def test_composite_operators_are_seen_whole() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    found = names(record(model, (torch.randn(2, 5, 16),)))
    assert found.count("layer_norm") == 2
    assert "scaled_dot_product_attention" in found
    assert found.count("linear") == 4
    assert "addmm" not in found


def test_sizes_remember_where_they_came_from() -> None:
    trace = record(Block(), (images(),))
    (view,) = calls(trace, "view")
    sizes = [item for item in view.sizes or []]
    assert [describe(item) for item in sizes] == [
        "size(0)",
        "groups",
        "(size(1) // groups)",
        "sizes[0]",
        "sizes[1]",
    ]
    assert isinstance(sizes[0], Dimension)
    assert sizes[0].value is calls(trace, "dropout")[0].output
    assert isinstance(sizes[1], Attribute)
    assert trace.owners[sizes[1].owner][0] == ""
    assert {type(variable) for variable in variables(sizes[2])} == {Attribute, Dimension}


def test_literals_stay_literals() -> None:
    class Literal(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(-1, 2, 3)

    (call,) = calls(record(Literal(), (torch.ones(4, 6),)), "reshape")
    assert call.sizes == [-1, 2, 3]
    assert all(type(item) is int for item in call.sizes or [])


def test_comparisons_between_sizes_and_attributes_are_noted() -> None:
    class Checked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[-1] != self.width:
                raise ValueError("wrong width")
            return x * 2

    trace = record(Checked(), (torch.ones(4, 6),))
    pairs = {frozenset((describe(a), describe(b))) for a, b in trace.equalities}
    assert frozenset(("size(1)", "width")) in pairs


def test_temperatures_are_followed() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.shape[-1] ** -0.5 + x / math.sqrt(x.size(1))

    trace = record(Scaled(), (torch.ones(4, 9),))
    found = [describe(item) for node in trace.nodes for item in node.floats or []]
    assert found == ["(size(1) ** -0.5)", "sqrt(size(1))"]


def test_paths_and_source_lines() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Inner()))
    trace = record(model, (torch.ones(2, 4),))
    assert [(node.name, node.module) for node in trace.nodes] == [
        ("linear", "0"),
        ("relu", "1.0"),
        ("linear", "1.1.layer"),
        ("add", "1.1"),
    ]
    first = Inner.forward.__code__.co_firstlineno
    assert trace.nodes[-1].where.endswith(f"test_recorder.py:{first + 1}")


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + 1


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: list[torch.Tensor]


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, batch: dict[str, torch.Tensor], *, scale: torch.Tensor, flag: bool = False) -> Output:
        hidden = self.first(batch["x"]) + batch["y"][0]
        return Output(self.second(hidden) * (scale if flag else -scale), [hidden])


def test_inputs_in_dictionaries_keywords_and_dataclasses() -> None:
    args = ({"x": torch.randn(2, 4), "y": [torch.randn(2, 8), "text"]},)
    trace = record(Mixed(), args, {"scale": torch.randn(3), "flag": True})
    assert [value.shape for value in trace.inputs] == [(2, 4), (2, 8), (3,)]
    assert "neg" not in names(trace)
    assert {value.shape for value in trace.outputs} == {(2, 3), (2, 8)}


def test_dead_code_is_not_live() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.unused(x)[:, -1].sum()
            return self.used(x)

    trace = record(Dead(), (torch.ones(2, 4),))
    assert [node.name for node in trace.nodes].count("linear") == 2
    assert names(trace) == ["linear"]
    assert trace.live_nodes()[0].args[1].name == "used.weight"


def test_in_place_changes_are_live_and_followed() -> None:
    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.zeros_like(x)
            y[:, :2] = x[:, 2:]
            y.add_(1)
            return y

    trace = record(InPlace(), (torch.ones(2, 4),))
    assert "copy_" in names(trace)
    assert trace.outputs[0].producer is calls(trace, "add_")[0]


def test_code_that_looks_at_values_is_recorded_with_real_ones() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plus, self.minus = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.plus(x) if x.sum() > 0 else self.minus(x)

    model = Branching()
    for sign, used in ((1, "plus.weight"), (-1, "minus.weight")):
        trace = record(model, (sign * torch.ones(2, 4),))
        assert trace.executed_on == "real"
        assert [node.args[1].name for node in trace.nodes if node.name == "linear"] == [used]


def test_tensors_made_from_numbers_are_kept() -> None:
    class Made(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.tensor([1.0, 2.0, 3.0])

    trace = record(Made(), (torch.ones(2, 3),))
    (constant,) = [
        value for node in trace.live_nodes() for value in node.inputs() if value.kind == "constant"
    ]
    assert trace.executed_on == "real"
    assert constant.tensor is not None
    assert constant.tensor.tolist() == [1.0, 2.0, 3.0]


def test_tied_weights_are_one_value() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(x))

    trace = record(Tied(), (torch.tensor([[1, 2]]),))
    assert list(trace.parameters) == ["embed.weight"]
    (embedding,), (linear,) = calls(trace, "embedding"), calls(trace, "linear")
    assert embedding.args[0] is linear.args[1] is trace.parameters["embed.weight"]


def test_shared_modules_keep_their_first_path() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    trace = record(Shared(), (torch.ones(2, 4),))
    assert list(trace.parameters) == ["first.weight", "first.bias"]
    assert [node.module for node in trace.nodes] == ["first", "first"]


def test_plain_tensor_attributes_are_owned() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.mask = nn.Linear(4, 4), torch.rand(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * self.mask

    trace = record(Plain(), (torch.ones(2, 4),))
    assert trace.parameters["mask"].kind == "buffer"
    assert trace.live_nodes()[-1].args[1] is trace.parameters["mask"]


def test_recurrent_weights_are_owned() -> None:
    trace = record(nn.LSTM(4, 6, num_layers=2, batch_first=True), (torch.ones(2, 5, 4),))
    (call,) = calls(trace, "lstm")
    assert [value.name for value in call.args[2]][:2] == ["weight_ih_l0", "weight_hh_l0"]


def test_parametrized_weights_keep_the_users_names() -> None:
    from dwindle import simulate
    from dwindle.config import Target

    model = nn.Sequential(nn.Linear(4, 4))
    simulate.attach_mask(model, Target("0", "weight"), torch.ones(4, 4))
    trace = record(model, (torch.ones(2, 4),))
    assert "0.weight" in trace.parameters


def test_integers_work_as_plain_ones_inside_the_model() -> None:
    """Indexing, ranges, dictionary keys, formatting, floor division, torch factories."""

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.depth = 3, 2
            self.table = {3: "three"}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.table[self.heads] == f"{'three'}"
            assert [0, 1, 2][self.depth] == 2
            parts = [x[..., number] for number in range(self.heads)]
            grid = torch.arange(self.heads).float() + torch.zeros(x.shape[0], self.heads)
            assert type(x.shape[0] / 2) is not int
            assert isinstance(x.shape, torch.Size)
            batch, *_ = x.shape
            assert min(batch, self.heads) in (2, 3)
            return torch.stack(parts, -1) + grid

    model = Uses()
    record(model, (torch.ones(2, 3),))
    assert type(model.heads) is int


def test_huggingface_outputs_and_configs() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    model = BertModel(config)
    before = copy.deepcopy(config.to_dict())
    ids = torch.randint(0, 30, (2, 5))
    trace = record(model, (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert {value.shape for value in trace.outputs} == {(2, 5, 16), (2, 16)}
    assert model.config.to_dict() == before
    assert type(model.config.hidden_size) is int
    assert type(model.encoder.layer[0].attention.self.attention_head_size) is int


@functools.lru_cache
def _table(size: int) -> torch.Tensor:
    return torch.arange(size).flip(0)


class _Cached(nn.Module):
    """Looks up rows by an index that a cached function makes."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(6, 16))
        self.first, self.last = nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)) + self.rows[_table(6)].mean(0))


def test_caches_of_functions_hold_nothing_of_a_recording() -> None:
    """A tensor made on the meta device, or under inference mode, must not come back in the user's own run."""
    _table.cache_clear()
    model, x = _Cached(), torch.randn(2, 5)
    result = dw.prune(model, x, ratio=0.5)
    assert result.verification.max_difference <= 1e-9
    assert _table.cache_info().currsize == 0
    model(x).sum().backward()
    assert not _table(6).is_meta
    assert not _table(6).is_inference()
