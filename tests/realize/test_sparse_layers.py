"""Sparse layers: the same numbers, chosen by measurement, saved and loaded, and an honest account."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dwindle as dw
from dwindle.config.errors import ConfigError, FileFormatError, RealizeError
from dwindle.config.history import history
from dwindle.pruning import LevelPruner
from dwindle.realize import SparseLinear
from dwindle.realize.sparse_linear import block_density, from_description


class Conv1D(nn.Module):
    """Hugging Face's transposed linear layer, known by its name."""

    def __init__(self, out: int, inside: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inside, out)), nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.t(), self.bias)


def zeroed(matrix: Tensor, share: float, block: int = 1) -> Tensor:
    """Zero blocks of a matrix at random."""
    rows, columns = (size // block for size in matrix.shape)
    keep = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) >= share
    return matrix * keep.repeat_interleave(block, 0).repeat_interleave(block, 1)


class Net(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, width, 3, padding=1)
        self.scattered, self.blocks = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.transposed, self.dense = Conv1D(width, width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).transpose(1, 2)
        return self.dense(self.transposed(torch.relu(self.blocks(torch.relu(self.scattered(x))))))


def network(width: int = 64) -> Net:
    torch.manual_seed(0)
    model = Net(width).eval()
    with torch.no_grad():
        model.conv.weight[::2] = 0
        model.scattered.weight.copy_(zeroed(model.scattered.weight, 0.95))
        squares = (
            torch.arange(4)[:, None] + torch.arange(4)
        ) % 2  # a chessboard: blocks of 32 are never empty
        model.blocks.weight.mul_(squares.repeat_interleave(16, 0).repeat_interleave(16, 1))
        model.transposed.weight.copy_(zeroed(model.transposed.weight, 0.9))
    return model


@pytest.fixture
def sparse_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock says: BSR with large blocks is fastest, then CSR, then dense."""
    order = ["bsr32", "bsr16", "bsr8", "bsr4", "csr", "dense"]

    def clock(forms: dict[str, Any], rounds: int) -> dict[str, float]:
        return {name: 1.0 + order.index(name) if name in order else 1.0 for name in forms}

    monkeypatch.setattr("dwindle.realize.sparse_layers._fastest", clock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("layout", "block"), [("csr", 1), ("bsr", 4), ("bsr", 16)])
@pytest.mark.parametrize("shape", [(32,), (3, 32), (2, 3, 32)])
def test_a_sparse_layer_is_the_dense_one(
    layout: str, block: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    for bias in (torch.randn(48, dtype=dtype), None):
        weight = zeroed(torch.randn(48, 32, dtype=dtype), 0.6, block)
        layer = SparseLinear(weight, bias, layout=layout, block=block)
        x = torch.randn(shape, dtype=dtype)
        assert torch.equal(layer.weight, weight)
        assert torch.allclose(layer(x), nn.functional.linear(x, weight, bias), atol=1e-5)
        assert torch.equal(copy.deepcopy(layer).double().weight, weight.double())
        assert torch.equal(layer.to_linear().weight, weight)
    assert layer.density == pytest.approx(block_density(weight, block))


def test_nothing_and_everything_zero() -> None:
    for weight in (torch.zeros(8, 8), torch.ones(8, 8)):
        for layout in ("csr", "bsr"):
            layer = SparseLinear(weight, None, layout=layout, block=4)
            x = torch.randn(3, 8)
            assert torch.allclose(layer(x), x @ weight.t(), atol=1e-6)


@pytest.mark.usefixtures("sparse_wins")
def test_layers_are_replaced_where_they_are_faster() -> None:
    model, x = network(), torch.randn(2, 4, 10)
    before, weights = model(x), {name: p.clone() for name, p in model.named_parameters()}
    result = dw.sparsify(model, x)
    chosen = {row.name: row.chosen for row in result.rows}
    assert chosen == {"conv": "dense", "scattered": "csr", "blocks": "bsr16", "transposed": "csr"}
    assert isinstance(model.dense, nn.Linear)  # it holds no zeros
    assert torch.allclose(model(x), before, atol=1e-4)
    assert result.max_difference < 1e-5
    assert torch.equal(model.scattered.weight, weights["scattered.weight"])
    assert torch.equal(model.transposed.weight, weights["transposed.weight"].t())
    assert model.blocks.block == 16
    assert not model.training
    text = result.summary()
    assert "no sparse convolution" in text
    assert "3 of 4 layers" in text
    assert "ONNX Runtime and OpenVINO gain nothing" in text
    assert result.to_json()["layers"][1]["gain"] > 1
    dense = dw.densified(model)
    assert isinstance(dense.scattered, nn.Linear)
    assert isinstance(model.scattered, SparseLinear)  # the copy is another model
    assert torch.allclose(dense(x), before, atol=1e-4)


def test_the_gain_is_measured() -> None:
    """99.5 % zeros of a large matrix: an order of magnitude, whatever else the machine does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1536, 1536), nn.ReLU(), nn.Linear(1536, 1536)).eval()
    with torch.no_grad():
        model[0].weight.copy_(zeroed(model[0].weight, 0.995))
        model[2].weight.copy_(zeroed(model[2].weight, 0.15))
    result = dw.sparsify(model, torch.randn(16, 1536))
    assert [row.chosen for row in result.rows] == ["csr", "dense"]
    assert result.rows[0].gain > 2
    assert "too few zeros" in result.rows[1].reason
    assert result.milliseconds["before"] > 0
    assert result.milliseconds["after"] > 0


@pytest.mark.usefixtures("sparse_wins")
def test_saved_and_loaded(tmp_path: Path) -> None:
    model, x = network(), torch.randn(2, 4, 10)
    dw.sparsify(model, x)
    dw.save(model, tmp_path / "model")
    loaded = dw.load(tmp_path / "model", model=Net)
    assert isinstance(loaded.blocks, SparseLinear)
    assert torch.equal(loaded(x), model(x))
    assert history(loaded) == history(model)
    assert [entry["kind"] for entry in history(loaded)] == ["sparsify"]
    with pytest.raises(FileFormatError, match="not the one that was compressed"):
        dw.load(tmp_path / "model", model=lambda: Net(32))


@pytest.mark.parametrize(
    "change",
    [
        {"layout": "coo"},
        {"count": -1},
        {"count": 10**9},
        {"block": 0},
        {"block": 7},
        {"shape": [8]},
        {"bias": None, "shape": 3},
    ],
    ids=str,
)
def test_a_false_description_is_refused(change: dict[str, Any]) -> None:
    good = SparseLinear(torch.eye(8), None, layout="bsr", block=4).description()
    assert from_description(good).values.shape == (2, 4, 4)
    with pytest.raises(FileFormatError, match="no description"):
        from_description({**good, **change})


def test_after_pruning_and_realize() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)), torch.randn(8, 64)
    pruner = LevelPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.9, "granularity": [16, 16]}])
    pruner.compress()
    with pytest.raises(ConfigError, match=r"dw\.realize"):
        dw.sparsify(model, x)
    expected = model(x)
    result = dw.realize(model, example_inputs=(x,))
    assert result.verification is not None
    dw.sparsify(model, x)
    assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.usefixtures("sparse_wins")
def test_what_cannot_be_replaced_stays() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.pattern, self.low = nn.Linear(16, 16), nn.Linear(16, 16)
            self.second.weight = self.first.weight
            self.low.bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            x = self.second(self.first(nn.functional.linear(x, self.read.weight)))
            return self.low(self.pattern(x).bfloat16()).float()

    torch.manual_seed(0)
    model = Odd().eval()
    with torch.no_grad():
        for layer in (model.read, model.first, model.low):
            layer.weight.copy_(zeroed(layer.weight, 0.9))
        model.pattern.weight.view(16, 4, 4)[:, :, ::2] = 0
    x = torch.randn(2, 16)
    before = model(x)
    reasons = {row.name: row.reason for row in dw.sparsify(model, x).rows}
    assert "read directly" in reasons["read"]
    assert "shared" in reasons["first"]
    assert "2:4" in reasons["pattern"]
    assert "bfloat16" in reasons["low"]
    assert torch.equal(model(x), before)
    assert history(model) == []


@pytest.mark.usefixtures("sparse_wins")
def test_a_change_of_the_outputs_is_refused_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(), torch.randn(2, 4, 10)
    before, layers = model(x), dict(model.named_modules())
    right = SparseLinear.forward
    monkeypatch.setattr(SparseLinear, "forward", lambda self, x: right(self, x) * 1.01)
    with pytest.raises(RealizeError, match="unchanged"):
        dw.sparsify(model, x)
    assert dict(model.named_modules()) == layers
    assert torch.equal(model(x), before)
    assert history(model) == []
