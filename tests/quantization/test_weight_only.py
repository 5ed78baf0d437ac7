"""``dw.quantize_weights``: which layers, what they become, what is left alone, and what goes wrong loudly."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dwindle as dw
from dwindle.config import Target
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.quantization.free_scales import FreeScales, find_free_scales
from dwindle.quantization.weight_only import packed_weights, quantize_weights, weight_rows
from dwindle.quantization.weight_only.statistics import input_sums
from dwindle.quantization.weight_only.structure import Reading, free_units, readings
from dwindle.simulate import attach_mask
from dwindle.simulate.attaching import detach

WIDTH, INNER, WORDS = 64, 96, 50


class Scale(nn.Module):
    """A norm without a shift, written out: the scale is a parameter in a product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Decoder(nn.Module):
    """One block of a language model: layers that share an input, a gated product, a tied output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.first, self.second, self.last = Scale(), nn.LayerNorm(WIDTH), Scale()
        self.query, self.key, self.value, self.mixed = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        y = self.first(x)
        query, key, value = self.query(y), self.key(y), self.value(y)
        mixed = torch.softmax(query @ key.transpose(-1, -2) / 8, -1) @ value
        x = x + self.mixed(mixed)
        y = self.second(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.last(x))


LAYERS = ["query", "key", "value", "mixed", "gate", "up", "down"]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    made = Decoder().eval()
    with torch.no_grad():
        made.first.weight[5] *= 30  # a channel that matters more than others
        made.second.weight[7] *= 30
    return made


@pytest.fixture
def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, WORDS, (4, 12), generator=generator) for _ in range(5)]


def lost(model: nn.Module, other: nn.Module, data: list[Tensor]) -> float:
    with torch.no_grad():
        return sum(float((model(batch) - other(batch)).square().sum()) for batch in data)


def makers(scales: FreeScales, reading: Reading) -> list[str]:
    """The parameters that make what layers read, where its scale is free."""
    units = free_units(scales, reading)
    return (
        []
        if units is None
        else sorted(name for name, own in scales.made.items() if torch.isin(own, units).any())
    )


def test_what_reads_what(model: nn.Module, data: list[Tensor]) -> None:
    found, scales = readings(model, ((data[0],), {}), LAYERS), find_free_scales(model, (data[0],), {})
    assert [(own.layers, makers(scales, own)) for own in found] == [
        (["query", "key", "value"], ["first.weight"]),
        (["mixed"], ["value.bias", "value.weight"]),
        (["gate", "up"], ["second.bias", "second.weight"]),
        (["down"], ["up.weight"]),
    ]


def test_a_value_with_another_reader_is_not_scalable(data: list[Tensor]) -> None:
    class Sum(Decoder):
        def forward(self, tokens: Tensor) -> Tensor:
            y = self.first(self.embedding(tokens))
            return self.query(y) + y

    class Twice(Decoder):
        def forward(self, tokens: Tensor) -> Tensor:
            y = self.first(self.embedding(tokens))
            return self.query(y) + self.key(y)

    for other in (Sum(), Twice()):
        example = ((data[0],), {})
        (own,) = readings(other, example, ["query"])
        assert own.layers == ["query"]
        assert makers(find_free_scales(other, *example), own) == []


def test_sums_of_inputs(model: nn.Module, data: list[Tensor]) -> None:
    order = readings(model, ((data[0],), {}), LAYERS)
    sums = input_sums(model, order, data, None, None)
    with torch.no_grad():
        read = [model.first(model.embedding(batch)).reshape(-1, WIDTH).double().numpy() for batch in data]
    norms = [np.linalg.norm(rows, axis=1, keepdims=True) for rows in read]
    limits = [
        4 * np.sort(own, axis=0)[(len(own) - 1) // 2] for own in norms
    ]  # torch's median is the lower one
    capped = [rows * np.minimum(1, limit / own) for rows, limit, own in zip(read, limits, norms, strict=True)]
    x = torch.from_numpy(np.concatenate(capped))
    assert torch.allclose(sums["query"].hessian.double(), x.t() @ x / len(x), rtol=1e-4, atol=1e-5)
    assert torch.allclose(sums["query"].magnitude.double(), x.abs().mean(0), rtol=1e-4)
    assert sums["query"].samples == 5 * 4 * 12


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq", "awq"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_all_methods(model: nn.Module, data: list[Tensor], method: str, symmetric: bool) -> None:
    before = copy.deepcopy(model.state_dict())
    small = dw.quantize_weights(model, 4, 32, method, data=data, symmetric=symmetric)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sorted(packed_weights(small)) == sorted(LAYERS)  # the tied output layer is left alone
    for name, own in packed_weights(small).items():
        layer = small.get_submodule(name)
        matrix = own.matrix() if own.input_factor is None else own.matrix() * own.input_factor
        assert torch.equal(layer.weight, matrix)
        assert own.levels().max() <= 15
        assert all(len(group.unique()) <= 16 for group in own.matrix().reshape(-1, 32))
    with torch.no_grad():
        whole = sum(float(model(batch).square().sum()) for batch in data)
    assert 0 < lost(model, small, data) < 0.05 * whole
    rows = weight_rows(small)
    assert [row.error for row in rows] == sorted((row.error for row in rows), reverse=True)
    bits = [8 * row.stored_bytes / (row.float_bytes / 4) for row in rows]
    assert bits == pytest.approx([4 + 1.0 + (0 if symmetric else 4 / 32)] * 7, rel=0.1)


def test_methods_with_data_lose_less(model: nn.Module, data: list[Tensor]) -> None:
    plain = quantize_weights(model, 3, 32, "rtn", data=data, fit=True)
    rounded = quantize_weights(model, 3, 32, "rtn")
    assert lost(model, plain, data) < lost(model, rounded, data)
    for method in ("gptq", "awq"):
        small = quantize_weights(model, 3, 32, method, data=data)
        assert lost(model, small, data) < lost(model, rounded, data)


@pytest.mark.parametrize("masked", [True, False])
def test_gptq_keeps_zeros_of_masks(model: nn.Module, data: list[Tensor], masked: bool) -> None:
    keep = torch.rand(WIDTH, INNER, generator=torch.Generator().manual_seed(3)) < 0.5
    attach_mask(model, Target("down", "weight"), keep)
    if not masked:  # what dw.realize leaves: plain zeros
        detach(model)
    pruned = copy.deepcopy(model)
    small = quantize_weights(model, 3, 32, "gptq", data=data, keep_zeros=not masked)
    assert bool((small.down.weight[~keep] == 0).all())
    assert float((small.down.weight[keep] == 0).float().mean()) < 0.5
    assert lost(pruned, small, data) < lost(pruned, quantize_weights(model, 3, 32, "rtn"), data)
    if not masked:
        moved = quantize_weights(model, 3, 32, "gptq", data=data)
        assert not bool((moved.down.weight[~keep] == 0).all())


def test_scales_of_awq_go_where_they_change_nothing(model: nn.Module, data: list[Tensor]) -> None:
    small = quantize_weights(model, 3, 32, "awq", data=data)
    assert not torch.equal(small.first.weight, model.first.weight)
    assert all(own.input_factor is None for own in packed_weights(small).values())
    scaled = detach(copy.deepcopy(small), keep_values=False)
    with torch.no_grad():
        assert torch.allclose(scaled(data[0]), model(data[0]), rtol=1e-4, atol=1e-4)
    kept = detach(copy.deepcopy(small))
    with torch.no_grad():
        assert torch.equal(kept(data[0]), small(data[0]))


def test_little_memory_means_more_passes_that_see_what_was_lost(model: nn.Module, data: list[Tensor]) -> None:
    class Counting(list[Tensor]):
        passes = 0

        def __iter__(self) -> Iterator[Tensor]:
            type(self).passes += 1
            return super().__iter__()

    counted = Counting(data)
    small = quantize_weights(model, 3, 32, "gptq", data=counted, memory=1)
    at_once = quantize_weights(model, 3, 32, "gptq", data=data)
    assert Counting.passes >= 4
    assert torch.equal(small.query.weight, at_once.query.weight)
    assert not torch.equal(small.down.weight, at_once.down.weight)
    assert torch.equal(
        quantize_weights(model, 3, 32, "gptq", data=iter(data), memory=1).down.weight, small.down.weight
    )


def test_config_list(model: nn.Module, data: list[Tensor]) -> None:
    config: list[dict[str, Any]] = [
        {
            "op_names": ["query"],
            "target_names": ["weight"],
            "quant_dtype": "int8",
            "granularity": "out_channel",
        },
        {"op_names": ["down"], "target_names": ["weight"], "quant_dtype": "uint2", "granularity": [1, 16]},
        {"op_names": ["head"], "target_names": ["weight"], "quant_dtype": "uint4"},
    ]
    found = packed_weights(quantize_weights(model, 4, 32, config_list=config))
    assert {
        name: (own.form.bits, own.form.group_size, own.form.symmetric) for name, own in found.items()
    } == {
        "query": (8, None, True),
        "down": (2, 16, False),
        "head": (4, 32, False),
    }


def test_numbers_survive_copies_states_and_compilation(model: nn.Module, data: list[Tensor]) -> None:
    small = quantize_weights(model, 3, 24, "gptq", data=data)  # groups that do not divide 64
    with torch.no_grad():
        wanted = small(data[0])
        assert torch.equal(copy.deepcopy(small)(data[0]), wanted)
        fresh = quantize_weights(Decoder(), 3, 24)
        fresh.load_state_dict(small.state_dict())
        assert torch.equal(fresh(data[0]), wanted)
        assert torch.equal(torch.compile(small, backend="eager", fullgraph=True)(data[0]), wanted)


def test_saving(model: nn.Module, data: list[Tensor], tmp_path: Path) -> None:
    small = quantize_weights(model, 4, 32, "awq", data=data)
    dw.save(small, tmp_path / "simulated")
    with torch.no_grad():
        assert torch.equal(dw.load(tmp_path / "simulated", Decoder())(data[0]), small(data[0]))


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"bits": 1}, "bits"),
            ({"group_size": 0}, "group_size"),
            ({"method": "gptk"}, "did you mean 'gptq'"),
            ({"method": "gptq"}, "needs data"),
            ({"method": "awq", "data": []}, "no batch"),
            ({"damping": 0.0}, "damping"),
            (
                {
                    "config_list": [
                        {"op_types": ["LayerNorm"], "target_names": ["weight"], "quant_dtype": "int4"}
                    ]
                },
                "Linear",
            ),
            (
                {"config_list": [{"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": None}]},
                "no linear",
            ),
        ],
    )
    def test_arguments(self, model: nn.Module, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            quantize_weights(model, **arguments)

    @pytest.mark.parametrize("method", ["gptq", "awq"])
    def test_in_place_leaves_the_model_as_it_was(
        self, model: nn.Module, data: list[Tensor], method: str
    ) -> None:
        before, keys = copy.deepcopy(model.state_dict()), list(model.state_dict())
        poison = model.down.register_forward_pre_hook(lambda module, args: (args[0] * float("nan"),))
        with pytest.raises(DwindleError, match="down: its inputs hold NaN"):
            quantize_weights(model, 4, 32, method, data=data, memory=1, in_place=True)
        poison.remove()
        assert list(model.state_dict()) == keys
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not packed_weights(model)

    def test_data_that_end_early(self, model: nn.Module, data: list[Tensor]) -> None:
        with pytest.raises(ConfigError, match="ended after 5 of 9"):
            quantize_weights(model, 4, 32, "gptq", data=data, batches=9)

    def test_weights_that_are_not_finite(self, model: nn.Module) -> None:
        with torch.no_grad():
            model.gate.weight[0, 0] = float("inf")
        with pytest.raises(DwindleError, match=r"gate\.weight holds NaN or infinite"):
            quantize_weights(model)

    def test_twice(self, model: nn.Module) -> None:
        with pytest.raises(ConfigError, match="quantized already"):
            quantize_weights(quantize_weights(model))

    def test_a_layer_of_zeros_and_one_that_sees_nothing(self, model: nn.Module, data: list[Tensor]) -> None:
        with torch.no_grad():
            model.up.weight.zero_()
            model.first.weight[3] = 0  # the column is never used
        for method in ("gptq", "awq", "hqq"):
            small = quantize_weights(model, 4, 32, method, data=data)
            assert bool((small.up.weight == 0).all())
            with torch.no_grad():
                assert bool(small(data[0]).isfinite().all())
