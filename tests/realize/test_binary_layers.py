"""Packed binary layers: equal to float products of the same signs to the bit, chosen with proof, saved and loaded."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import dwindle as dw
from dwindle import simulate
from dwindle.config.errors import ConfigError, FileFormatError, RealizeError
from dwindle.config.history import history
from dwindle.quantization import BinaryQuantizer
from dwindle.realize import PackedBinaryConv2d, PackedBinaryLinear, binary_operators
from dwindle.realize.binary_layers import from_description

pytest.importorskip("numba")


def signs_of(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, 1, -1).to(torch.int8)


def inputs(*shape: int, seed: int = 1) -> Tensor:
    """Numbers around zero, some of them exactly zero and exactly at the threshold of the tests."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[x.abs() < 0.1] = 0.0
    x[(x - 0.3).abs() < 0.1] = 0.3
    return x


def binary(x: Tensor, steps: bool, height: float = 0.5, threshold: float = 0.3) -> Tensor:
    """What the simulation makes of an input, in float64."""
    high = torch.tensor(threshold, dtype=x.dtype)
    return (torch.where(x > high, height, 0.0) if steps else torch.where(x >= 0, 1.0, -1.0)).double()


def options(steps: bool) -> dict[str, Any]:
    return {"reaches": not steps, "steps": steps}


def threshold(count: int, steps: bool) -> Tensor:
    return torch.full((count,), 0.3 if steps else 0.0)


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize(
    ("samples", "features", "outputs"), [(1, 1, 1), (3, 63, 5), (7, 64, 70), (2, 65, 3), (5, 700, 130)]
)
def test_linear_equals_the_float_product_to_the_bit(
    samples: int, features: int, outputs: int, steps: bool
) -> None:
    signs, x = signs_of(outputs, features), inputs(samples, features)
    unit = 0.5 if steps else 1.0
    layer = PackedBinaryLinear(
        signs, torch.full((outputs,), unit), None, threshold(features, steps), **options(steps)
    )
    assert torch.equal(layer(x).double(), binary(x, steps) @ signs.double().t())
    assert torch.equal(layer.signs(), signs)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_convolution_equals_the_float_one_to_the_bit(data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    each, outs = data.draw(st.sampled_from([1, 1, 5, 8, 9, 64, 70])), groups * data.draw(st.integers(1, 4))
    kernel = (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3)))
    stride = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)))
    dilation = (data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2)))
    mode = data.draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    padding = data.draw(st.sampled_from([0, 1, 2, (2, 1), "same"]))
    if padding == "same":
        stride = (1, 1)
    steps = data.draw(st.booleans())
    plain = nn.Conv2d(each * groups, outs, kernel, stride, padding, dilation, groups, True, mode).double()
    signs = signs_of(*plain.weight.shape)
    bias = torch.randint(-5, 5, (outs,)).float()
    with torch.no_grad():
        plain.weight.copy_(signs)
        plain.bias.copy_(bias)  # type: ignore[union-attr]
    left, right, top, bottom = plain._reversed_padding_repeated_twice
    layer = PackedBinaryConv2d(
        signs,
        torch.full((outs,), 0.5 if steps else 1.0),
        bias,
        threshold(each * groups, steps),
        stride=stride,
        padding=(top, bottom, left, right),
        dilation=dilation,
        groups=groups,
        padding_mode=mode,
        **options(steps),
    )
    x = inputs(2, each * groups, 9, 8)
    assert torch.equal(layer(x).double(), plain(binary(x, steps)))
    assert torch.equal(layer(x[0]).double(), plain(binary(x[0], steps)))
    assert layer(x).is_contiguous()
    assert torch.equal(layer.signs(), signs)


def test_scale_and_bias_are_one_product_and_one_sum() -> None:
    signs, x, scale, bias = signs_of(6, 90), inputs(4, 90), torch.rand(6), torch.randn(6)
    layer = PackedBinaryLinear(signs, scale, bias, torch.zeros(90))
    integers = (binary(x, False) @ signs.double().t()).float()
    assert torch.equal(layer(x), integers * scale + bias)
    double = copy.deepcopy(layer).double()
    assert torch.equal(double(x.double()), integers.double() * scale.double() + bias.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_number_types(dtype: torch.dtype) -> None:
    layer = PackedBinaryConv2d(
        signs_of(4, 3, 3, 3), torch.ones(4), None, torch.zeros(3), padding=(1, 1, 1, 1)
    )
    x = inputs(2, 3, 5, 5).to(dtype)
    assert layer(x).dtype == dtype
    assert torch.equal(layer(x).float(), layer(x.float()))


def test_large_work_is_shared_between_threads_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = PackedBinaryConv2d(
        signs_of(37, 20, 3, 3), torch.rand(37), None, torch.zeros(20), padding=(1, 1, 1, 1)
    )
    x = inputs(3, 20, 9, 9)
    alone = layer(x)
    monkeypatch.setattr(binary_operators, "_WORTH_SHARING", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(layer(x), alone)


def test_memory_layouts_and_empty_batches() -> None:
    layer = PackedBinaryConv2d(signs_of(4, 6, 3, 3), torch.ones(4), None, torch.zeros(6))
    x = inputs(2, 6, 7, 7)
    assert torch.equal(layer(x.to(memory_format=torch.channels_last)), layer(x))
    assert layer(x[:0]).shape == (0, 4, 5, 5)
    linear = PackedBinaryLinear(signs_of(4, 6), torch.ones(4), None, torch.zeros(6))
    assert torch.equal(linear(x.movedim(1, -1)), linear(x.movedim(1, -1).contiguous()))
    assert linear(x[:0, :, 0, 0]).shape == (0, 4)


def test_wrong_inputs_are_refused() -> None:
    conv = PackedBinaryConv2d(signs_of(4, 6, 3, 3), torch.ones(4), None, torch.zeros(6))
    linear = PackedBinaryLinear(signs_of(4, 6), torch.ones(4), None, torch.zeros(6))
    with pytest.raises(ConfigError, match="6 channels"):
        conv(torch.zeros(1, 5, 7, 7))
    with pytest.raises(ConfigError, match="too small for a window"):
        conv(torch.zeros(1, 6, 2, 7))
    with pytest.raises(ConfigError, match="6 features"):
        linear(torch.zeros(1, 5))
    with pytest.raises(ConfigError, match="floating tensors on the CPU"):
        linear(torch.zeros(1, 6, dtype=torch.int32))
    with pytest.raises(ConfigError, match="floating tensors on the CPU"):
        linear(torch.zeros(1, 6, device="meta"))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 10, 3, stride=2, padding=1, groups=2)
        self.norm2 = nn.BatchNorm2d(10)
        self.deep, self.weight_only, self.last = nn.Linear(10, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.conv(self.norm(self.first(x))))
        return self.last(self.weight_only(self.deep(x.mean((2, 3)))))


CONFIG = [
    {"op_names": ["conv", "deep"], "quant_dtype": "int1"},
    {"op_names": ["weight_only"], "target_names": ["weight"], "quant_dtype": "int1"},
]
X = inputs(3, 2, 8, 8)


def trained(weights: str = "xnor", activations: str = "scale_threshold") -> Net:
    torch.manual_seed(0)
    model = Net()
    quantizer = BinaryQuantizer(model, CONFIG, weights=weights, activations=activations, example_inputs=X)
    with dw.compress(model, [quantizer]) as run:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        run.add_parameters_to(optimizer)
        for _ in range(3):
            loss = functional.mse_loss(model(X), torch.ones(3, 4))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step()
    return model.eval()


@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        ("bnn", "bnn"),
        ("xnor", "scale_threshold"),
        ("dorefa", "dorefa"),
        ("bireal", "bireal"),
        ("xnor_paper", "bnn"),
    ],
)
def test_packed_model_equals_its_simulation(weights: str, activations: str) -> None:
    model = trained(weights, activations)
    expected = model(X)
    result = dw.pack_binary(model, X, rounds=2)
    assert [(row.name, row.packed) for row in result.rows] == [
        ("conv", True),
        ("deep", True),
        ("weight_only", False),
    ]
    assert result.rows[2].reason == "its input is not binary"
    assert all(
        row.difference <= 1e-6 and row.bytes_after < row.bytes_before for row in result.rows if row.packed
    )
    assert result.max_difference <= 1e-5
    torch.testing.assert_close(model(X), expected)
    assert isinstance(model.conv, PackedBinaryConv2d)
    assert "2 of 3 binary layers are packed" in result.summary()
    assert set(result.to_json()["layers"][0]["milliseconds"]) == {"float", "packed"}


def test_packed_weight_is_the_simulated_one() -> None:
    model = trained("xnor", "bnn")
    simulated = {name: model.get_submodule(name).weight.detach().clone() for name in ("conv", "deep")}
    dw.pack_binary(model, X, rounds=0)
    for name, weight in simulated.items():
        assert torch.equal(model.get_submodule(name).weight, weight)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = trained()
    quantized = [name for name, _ in model.named_modules() if name == "weight_only"]
    simulate.detach(model, targets=[t for t in simulate.simulated_targets(model) if t.module in quantized])
    dw.pack_binary(model, X, rounds=0)
    assert history(model)[-1]["kind"] == "pack_binary"
    dw.save(model, tmp_path / "packed")
    loaded = dw.load(tmp_path / "packed", model=Net)
    assert torch.equal(loaded.eval()(X), model(X))
    assert torch.equal(copy.deepcopy(model)(X), model(X))
    with pytest.raises(FileFormatError, match="pack_binary"):
        dw.load(tmp_path / "packed", model=lambda: nn.Sequential(nn.Linear(3, 3)))


def test_compiles_to_one_graph_and_is_exported() -> None:
    model = trained()
    dw.pack_binary(model, X, rounds=0)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(X), model(X))
        exported = torch.export.export(model, (X,))
        torch.testing.assert_close(exported.module()(X), model(X))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert {"dwindle.binary_conv2d_direct.default", "dwindle.binary_linear.default"} <= targets


def test_many_channels_are_packed_together_and_few_are_added() -> None:
    for channels, name in ((64, "binary_conv2d"), (8, "binary_conv2d_direct")):
        layer = PackedBinaryConv2d(
            signs_of(3, channels, 3, 3), torch.ones(3), None, torch.zeros(channels), padding=(1, 1, 1, 1)
        )
        x = inputs(2, channels, 6, 6)
        with torch.no_grad():
            exported = torch.export.export(layer, (x,))
            assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
        targets = {str(node.target) for node in exported.graph.nodes}
        assert f"dwindle.{name}.default" in targets
        assert torch.equal(exported.module()(x), layer(x))


def test_depthwise_layers_keep_one_bit_for_each_number() -> None:
    signs = signs_of(40, 1, 5, 5)
    layer = PackedBinaryConv2d(signs, torch.ones(40), None, torch.zeros(40), groups=40)
    assert layer.bits.shape == (40, 1)
    assert torch.equal(layer.signs(), signs)
    with pytest.raises(ConfigError, match="too small"):
        layer(torch.zeros(1, 40, 4, 9))


def test_a_wrong_kernel_is_found_and_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained()
    expected, before = model.train()(X), copy.deepcopy(model.state_dict())
    model.load_state_dict(before)
    module = sys.modules["dwindle.realize.pack_binary"]
    right = module.packed_layer

    def wrong(layer: nn.Module) -> Any:
        packed = right(layer)
        if isinstance(packed, PackedBinaryLinear):
            packed.bits[0, 0] ^= 1  # one sign of one output
        return packed

    monkeypatch.setattr(module, "packed_layer", wrong)
    with pytest.raises(RealizeError, match="deep: the packed layer differs from its simulation"):
        dw.pack_binary(model, X)
    assert isinstance(model.conv, nn.Conv2d)
    assert model.training
    assert model.norm.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(X), expected)
    assert not history(model)


def test_layers_that_gain_too_little_stay_simulated() -> None:
    model = trained()
    expected = model(X)
    result = dw.pack_binary(model, X, least_gain=1e6, rounds=1)
    assert not any(row.packed for row in result.rows)
    assert "times as fast" in result.rows[0].reason
    assert torch.equal(model(X), expected)
    assert not history(model)


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match="nothing in this model is binary"):
        dw.pack_binary(Net(), X)
    with pytest.raises(ConfigError, match="least_gain needs rounds"):
        dw.pack_binary(trained(), X, least_gain=1.0, rounds=0)


def test_surgery_refuses_what_it_would_drop() -> None:
    model = trained()
    expected = model(X)
    with pytest.raises(ConfigError, match=r"conv._input_0 is simulated as binary: dw.pack_binary"):
        dw.realize(model, example_inputs=(X,))
    assert torch.equal(model(X), expected)


def test_a_pruned_network_is_binarized_and_packed() -> None:
    torch.manual_seed(0)
    model = Net()
    x = X
    dw.prune(model, (x,), ratio=0.25)
    quantizer = BinaryQuantizer(model, CONFIG, activations="bireal")
    quantizer.attach()
    quantizer.detach()
    expected = model.eval()(x)
    result = dw.pack_binary(model, x, rounds=0)
    assert [row.packed for row in result.rows] == [True, True, False]
    torch.testing.assert_close(model(x), expected)


def test_without_numba_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained()
    expected = model(X)
    monkeypatch.delitem(sys.modules, "dwindle.realize.binary_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(ConfigError, match=r"pip install 'dwindle\[binary\]'"):
        dw.pack_binary(model, X)
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"kind": "linear", "shape": [2, 3, 4], "reaches": True, "steps": True},
        {"kind": "conv2d", "shape": [1, 1]},
    ],
)
def test_damaged_descriptions(entry: dict[str, Any]) -> None:
    with pytest.raises(FileFormatError, match="no description of a packed binary layer"):
        from_description(entry)
