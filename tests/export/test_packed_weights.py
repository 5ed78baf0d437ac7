"""Packed weights made real: torch's own kernels, ONNX Runtime and OpenVINO, each equal to the simulation."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import dwindle as dw
from dwindle.config.errors import ConfigError, ExportError, RealizeError
from dwindle.export import weight_only
from dwindle.export.weight_only import BlockForm, block_form
from dwindle.quantization.weight_only import PackedWeight, quantize_weights
from dwindle.realize import PackedLinear


class Feed(nn.Module):
    """Two layers, a bias, and a layer that is called twice."""

    def __init__(self, inner: int = 96) -> None:
        super().__init__()
        self.up, self.square = nn.Linear(64, inner), nn.Linear(inner, inner)
        self.down = nn.Linear(inner, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(x))
        return self.down(self.square(torch.tanh(self.square(hidden))) + hidden)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Feed().eval()


def sqnr(wanted: Tensor, found: Tensor) -> float:
    return float(10 * torch.log10(wanted.square().sum() / (wanted - found).square().sum()))


FORMS = [(4, 32, False), (3, 16, True), (2, 32, False), (8, None, True), (6, None, False)]


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "suffix"),
    [*((*form, "onnx") for form in FORMS), (4, 32, False, "xml"), (2, 32, False, "xml")],
)
def test_files(
    model: nn.Module, tmp_path: Path, bits: int, group_size: int | None, symmetric: bool, suffix: str
) -> None:
    x = torch.randn(5, 64)
    small = quantize_weights(model, bits, group_size, "hqq", symmetric=symmetric)
    result = dw.export(small, tmp_path / f"model.{suffix}", x, exact_products=True, tolerance=1e-3)
    assert result.max_difference is not None
    assert result.max_difference < 1e-4
    assert result.dynamic_batch
    packed = sum(
        own.packed.nbytes for own in small.modules() if isinstance(own, dw.quantization.PackedWeight)
    )
    whole = sum(own.nbytes for own in model.parameters())
    weights = tmp_path / f"model.{'bin' if suffix == 'xml' else 'onnx'}"
    assert weights.stat().st_size < packed * 2 + 0.25 * whole + 4000
    if suffix == "xml":
        kept = {2: "u2", 3: "u4", 4: "u4", 6: "u8", 8: "u8"}[bits]
        assert (tmp_path / "model.xml").read_text().count(f'element_type="{kept}"') >= 6
    with torch.no_grad():
        assert isinstance(small.up, nn.Linear)
        assert small(x).shape == (5, 64)


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(4, 32, False), (8, None, True)])
def test_fast_products_are_near(
    model: nn.Module, tmp_path: Path, bits: int, group_size: int | None, symmetric: bool
) -> None:
    x = torch.randn(5, 64)
    small = quantize_weights(model, bits, group_size, symmetric=symmetric)
    dw.export(small, tmp_path / "model.onnx", x)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        assert sqnr(small(x), torch.from_numpy(session.run(None, {"x": x.numpy()})[0])) > 30


@pytest.mark.parametrize("suffix", ["onnx", "xml"])
def test_less_than_thirty_decibels_is_an_error(
    model: nn.Module, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, small = torch.randn(5, 64), quantize_weights(model, 4, 32)
    path = tmp_path / f"model.{suffix}"
    good = dw.export(small, path, x)
    assert good.quantized
    assert good.parity_db is None or good.parity_db > 30
    before = path.read_bytes()

    def louder(name: str, weight: PackedWeight) -> BlockForm:
        form = block_form(name, weight)
        return replace(form, scale=form.scale * 1.05)  # 26 dB in each layer

    monkeypatch.setattr(weight_only, "block_form", louder)
    with pytest.raises(ExportError, match=r"computes something else .* allowed are 0.0316"):
        dw.export(small, path, x)
    assert path.read_bytes() == before


def test_awq_with_scaled_inputs(model: nn.Module, tmp_path: Path) -> None:
    data = torch.randn(64, 64) * torch.logspace(-1.5, 1.5, 64)
    small = quantize_weights(model, 4, 32, "awq", data=data)
    assert dw.quantization.packed_weights(small)["up"].input_factor is not None
    assert dw.export(small, tmp_path / "model.onnx", data[:4], exact_products=True).max_difference < 1e-3  # type: ignore[operator]
    with torch.no_grad():
        wanted = small(data)
        packed = dw.pack_weights(small, data).model
        assert sqnr(wanted, packed(data)) > 100
        exported = dw.export(packed, tmp_path / "packed.onnx", data[:4], exact_products=True)
        assert exported.max_difference is not None
        assert exported.max_difference < 1e-3


@pytest.mark.parametrize(
    ("form", "kernel", "chosen"),
    [
        ((4, 32, False), "exact", "dequantize"),
        ((4, 32, False), "fast", "int4"),
        ((3, 32, True), "fast", "int4"),
        ((8, None, True), "fast", "int8"),
        ((4, 16, False), "fast", "dequantize"),
        ((8, 32, False), "fast", "dequantize"),
    ],
)
def test_packed_layers(
    model: nn.Module, tmp_path: Path, form: tuple[int, int | None, bool], kernel: str, chosen: str
) -> None:
    x = torch.randn(3, 64)
    small = quantize_weights(model, *form[:2], symmetric=form[2])
    with torch.no_grad():
        wanted = small(x)
        result = dw.pack_weights(small, x, kernel=kernel)
        assert set(result.kernels.values()) == {chosen}
        found, many = result.model(x), torch.randn(40, 64)
        if chosen == "dequantize":
            assert torch.equal(found, wanted)
        else:
            assert sqnr(wanted, found) > 40
        assert torch.equal(result.model(many)[:3], result.model(many.clone())[:3])
        assert result.bytes["after"] < 0.5 * sum(own.nbytes for own in model.parameters())
        assert torch.equal(copy.deepcopy(result.model)(x), found)
        dw.save(result.model, tmp_path / "packed")
        assert torch.equal(dw.load(tmp_path / "packed", Feed())(x), found)
    assert isinstance(result.model.up, PackedLinear)
    assert result.model.up.weight.shape == (96, 64)


def test_a_failure_leaves_the_simulation(model: nn.Module) -> None:
    small = quantize_weights(model, 4, 32)
    before = {name: type(module) for name, module in small.named_modules()}
    with pytest.raises(RealizeError, match="unchanged"):
        dw.pack_weights(small, torch.randn(3, 64), kernel="fast", least_sqnr=300.0)
    assert before == {name: type(module) for name, module in small.named_modules()}
    with pytest.raises(ConfigError, match="int8 kernel wants"):
        dw.pack_weights(small, torch.randn(3, 64), kernel="int8")
    with pytest.raises(ConfigError, match="did you mean 'exact'"):
        dw.pack_weights(small, torch.randn(3, 64), kernel="exakt")
    with pytest.raises(ConfigError, match="quantize_weights first"):
        dw.pack_weights(model, torch.randn(3, 64))


def test_groups_that_no_runtime_knows(model: nn.Module, tmp_path: Path) -> None:
    small = quantize_weights(model, 4, 24)
    with pytest.raises(ExportError, match="groups of 24"):
        dw.export(small, tmp_path / "model.onnx", torch.randn(3, 64))
    assert not list(tmp_path.iterdir())
    assert isinstance(small.up, nn.Linear)
