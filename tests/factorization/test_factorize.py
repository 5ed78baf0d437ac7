"""``dw.factorize``: what becomes small, what stays and why, and that it goes together with everything else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dwindle as dw
from dwindle.config.errors import CaptureError, ConfigError, RealizeError
from dwindle.factorization import FactorizedConvolution, FactorizedLinear
from dwindle.graph.macs import count_macs
from factorization.models import Reader, network, perceptron


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def untouched(model: nn.Module, state: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[name], state[name]) for name in state)


def test_target_is_met_and_everything_left_has_its_reason() -> None:
    model, x = network(), torch.randn(2, 3, 12, 12)
    hooked: list[Any] = []
    model.conv2.register_forward_hook(lambda module, args, output: hooked.append(output.shape))
    before = count_macs(model, (x,))
    result = dw.factorize(model, example_inputs=(x,), target={"macs": 0.8})
    assert result.model is model
    assert result.macs_before == before
    assert result.macs_after == count_macs(model, (x,)) <= 0.8 * before
    assert result.macs_after > 0.75 * before
    assert (
        result.parameters_after == sum(own.numel() for own in model.parameters()) < result.parameters_before
    )
    assert isinstance(model.conv2, FactorizedConvolution)
    assert result.layers["conv2"].method == "tucker"
    for name, layer in result.layers.items():
        assert model.get_submodule(name).ranks == layer.ranks
        assert layer.macs_after < layer.macs_before
    left = result.left
    assert "shared with" in left["first"]
    assert "shared with" in left["second"]
    assert "4 groups" in left["grouped"]
    assert "no call" in left["unused"]
    assert "no call" in left["attention.out_proj"]
    assert result.proof < 1e-9
    assert 0 < result.output_change < 1
    assert all(name in result.summary() for name in [*result.layers, *left])
    hooked.clear()
    assert model(x).shape == (2, 20)
    assert hooked == [(2, 24, 6, 6)], "the user's hook stays with the layer"


@pytest.mark.parametrize("options", [{"rank": 4}, {"rank_ratio": 0.3}, {"energy": 0.5}, {"rank": "vbmf"}])
def test_ranks_of_every_kind(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 20)).double()
    with torch.no_grad():
        for number in (0, 2):
            own = model[number].weight
            own.copy_(
                torch.randn(own.shape[0], 4) @ torch.randn(4, own.shape[1]) + 0.01 * torch.randn(own.shape)
            )
    weights = [model[number].weight.detach().clone() for number in (0, 2)]
    result = dw.factorize(model, example_inputs=torch.randn(3, 20, dtype=torch.float64), **options)
    for number, weight in zip((0, 2), weights, strict=True):
        (rank,) = result.ranks[str(number)]
        values = torch.linalg.svdvals(weight)
        if options.get("rank") in (4, "vbmf"):
            assert rank == 4
        elif "rank_ratio" in options:
            assert rank == 6
        else:
            assert (
                values[:rank].square().sum()
                >= 0.5 * values.square().sum()
                > values[: rank - 1].square().sum()
            )
        assert isinstance(model[number], FactorizedLinear)
        expected = float(values[rank:].square().sum().sqrt() / values.square().sum().sqrt())
        assert result.layers[str(number)].weight_error == pytest.approx(expected, rel=1e-9)


def test_data_make_the_outputs_better_and_the_bias_takes_the_mean() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24)).double()
    mixing = torch.randn(16, 16, dtype=torch.float64) * torch.logspace(0, -2, 16, dtype=torch.float64)
    data = [torch.randn(64, 16, dtype=torch.float64) @ mixing.t() + 1.0 for _ in range(3)]
    rows = torch.cat(data)
    expected = model(rows).detach()
    plain, aware = copy.deepcopy(model), copy.deepcopy(model)
    dw.factorize(plain, example_inputs=data[0], rank=3)
    result = dw.factorize(aware, example_inputs=data[0], rank=3, data=data)
    with torch.no_grad():
        errors = [float((own(rows) - expected).square().mean()) for own in (plain, aware)]
        means = [(own(rows) - expected).mean(0).abs().max() for own in (plain, aware)]
    assert errors[1] < 0.5 * errors[0]
    assert means[1] < 1e-10 < means[0]
    # the reported error is the one on the data, relative to how the outputs vary
    variance = (expected - expected.mean(0)).square().mean()
    assert result.layers["0"].output_error == pytest.approx((errors[1] / float(variance)) ** 0.5, rel=1e-6)


def test_config_list_says_ranks_and_methods_layer_by_layer() -> None:
    model, x = network(), torch.randn(2, 3, 12, 12)
    entries = [
        {"op_names": ["conv2"], "method": "tucker", "rank": [8, 6]},
        {"op_names": ["conv1"], "method": "cp", "rank": 5},
        {"op_names": ["pointwise"], "rank": 30},
        {"op_types": ["Linear"], "exclude_op_names": ["first", "second"], "energy": 0.8, "round_to": 4},
    ]
    result = dw.factorize(model, entries, example_inputs=(x,))
    assert result.ranks["conv2"] == (8, 6)
    assert result.layers["conv1"].method == "cp"
    assert "rank 24 would take 1.75 times" in result.left["pointwise"]
    assert "up to 13 it would save" in result.left["pointwise"]
    assert result.ranks["head"][0] % 4 == 0 or "head" in result.left


def test_a_weight_that_the_forward_reads_stays_whole() -> None:
    torch.manual_seed(0)
    model, x = Reader(), torch.randn(3, 24)
    expected = model.outer.weight
    result = dw.factorize(model, example_inputs=x, rank=4)
    assert list(result.layers) == ["inner"]
    assert "reads its weight" in result.left["outer"]
    assert model.outer.weight is expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give a target"),
        ({"target": {"mac": 0.5}}, "exactly one of macs, params"),
        ({"target": {"macs": 1.5}}, "not a share"),
        ({"target": {"macs": 0.01}}, "cannot be"),
        ({"rank": 3, "energy": 0.5}, "exclude each other"),
        ({"rank": 3, "target": {"macs": 0.9}}, "exclude each other"),
        ({"rank": "vmbf"}, "did you mean 'vbmf'"),
        ({"method": "tuker", "rank": 3}, "did you mean 'tucker'"),
        ({"config_list": [{"op_names": ["hea"], "rank": 3}]}, "did you mean 'head'"),
        ({"config_list": [{"op_names": ["head"], "rnk": 3}]}, "did you mean 'rank'"),
        ({"config_list": [{"op_names": ["norm"], "rank": 3}]}, "only weights of Linear"),
        ({"config_list": [{"op_names": ["head"], "rank": [3, 4]}]}, "takes 1 of them"),
        ({"config_list": [{"op_names": ["head"]}]}, "no rank"),
        ({"config_list": [{"op_names": ["head"], "sparse_ratio": 0.5}]}, "belongs to pruning"),
    ],
)
def test_mistakes_are_named_before_anything_changes(options: dict[str, Any], message: str) -> None:
    model = network()
    state = state_of(model)
    with pytest.raises(ConfigError, match=message):
        dw.factorize(model, example_inputs=(torch.randn(2, 3, 12, 12),), **options)
    assert untouched(model, state)


def test_failures_leave_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = perceptron().train(), torch.randn(4, 16)
    state, layers = state_of(model), list(model)
    with pytest.raises(CaptureError, match="fails on the example inputs"):
        dw.factorize(model, example_inputs=torch.randn(4, 15), rank=2)

    calls: list[int] = []

    def refuse(module: nn.Module, args: Any) -> None:
        calls.append(1)
        if type(model[0]) is FactorizedLinear:
            raise ValueError("no such layer")

    handle = model.register_forward_pre_hook(refuse)
    with pytest.raises(RealizeError, match="no such layer"):
        dw.factorize(model, example_inputs=x, rank=2, data=[x])
    handle.remove()
    monkeypatch.setitem(dw.factorize.__globals__, "TOLERANCE", -1.0)
    with pytest.raises(RealizeError, match="differs from the layer of its product"):
        dw.factorize(model, example_inputs=x, rank=2)
    assert calls
    assert untouched(model, state)
    assert all(new is old for new, old in zip(model, layers, strict=True))
    assert model.training
    assert all(module.training for module in model.modules())


def test_a_live_optimizer_goes_on() -> None:
    torch.manual_seed(0)
    model, x = perceptron(), torch.randn(8, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model(x).square().sum().backward()
    optimizer.step()
    bias, moments = model[0].bias, optimizer.state[model[0].bias]["exp_avg"].clone()
    dw.factorize(model, example_inputs=x, rank=4, optimizer=optimizer)
    held = {id(own) for group in optimizer.param_groups for own in group["params"]}
    assert held == {id(own) for own in model.parameters()}
    assert model[0].bias is bias
    assert torch.equal(optimizer.state[bias]["exp_avg"], moments)
    optimizer.zero_grad()
    model(x).square().sum().backward()
    before = model[2][0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[2][0].weight, before)


def test_factorize_prune_quantize_export_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = perceptron(), torch.randn(8, 16)
    dw.factorize(model, [{"op_names": ["0", "2"], "rank": 8}], example_inputs=x)
    chain = model[2]
    assert isinstance(chain, FactorizedLinear)
    rank = chain.ranks
    pruned = dw.prune(model, (x,), ratio=0.25)
    small = pruned.model
    assert small[2].ranks < rank, "the widths between the parts are channels like others"
    assert small[2].out_features == small[2].weight.shape[0] < 24
    dw.save(small, tmp_path / "small")
    again = dw.load(tmp_path / "small", model=perceptron)
    assert torch.equal(again(x), small(x))
    quantized = dw.quantize(small, [torch.randn(16, 16) for _ in range(2)], preset="int8")
    entry = dw.export(quantized, tmp_path / "model.onnx", example_inputs=(x,))
    assert (tmp_path / "model.onnx").stat().st_size > 0
    assert entry is not None
    with pytest.raises(ConfigError, match="quantized"):
        dw.factorize(quantized, example_inputs=x, rank=2)


def test_a_convolution_survives_saving(tmp_path: Path) -> None:
    model, x = network(), torch.randn(2, 3, 12, 12)
    dw.factorize(model, [{"op_names": ["conv1", "conv2"], "rank": 4}], example_inputs=(x,))
    dw.save(model, tmp_path / "small")
    again = dw.load(tmp_path / "small", model=network)
    assert torch.equal(again(x), model(x))
    assert again.conv2.ranks == (4, 4)


def test_hugging_face_conv1d() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=50, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(0, 50, (2, 8))
    names = ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"]
    result = dw.factorize(
        model, [{"op_names": names, "rank": 8}, {"op_types": ["Linear"], "rank": 4}], example_inputs=tokens
    )
    assert set(result.layers) == set(names)
    assert model.transformer.h[0].mlp.c_fc.weight.shape == (32, 128)
    assert "shared with 'transformer.wte'" in result.left["lm_head"]
