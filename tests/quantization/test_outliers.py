"""Outlier channels that are divided at run time: the formula, the model it leaves, and the file."""

import copy

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import dwindle as dw
from dwindle.export.qdq import export_qdq
from dwindle.quantization import NumberFormat, layer_errors, parity, quantize
from dwindle.quantization.outliers import (
    BUFFER,
    WeightRounding,
    best_divisor,
    divided_error,
    installed_factors,
)
from quantization.test_runtimes import in_onnxruntime, in_openvino

UINT8 = NumberFormat.parse("uint8")


class Block(nn.Module):
    """Three layers that read one norm, whose output goes on in a sum: nothing can be folded."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.out = nn.Linear(16, 16)

    def forward(self, x):
        x = self.norm(x)
        weights = torch.softmax(self.query(x) @ self.key(x).transpose(1, 2) / 4, -1)
        return x + self.out(nn.functional.gelu(weights @ self.value(x)))


def block():
    torch.manual_seed(0)
    model = Block().eval()
    with torch.no_grad():
        model.norm.weight[3] = 40.0
        for layer in (model.query, model.key, model.value):
            layer.weight[:, 3] *= 0.02
    return model, [torch.randn(8, 5, 16) for _ in range(4)]


def reference_error(rows, edges, weights, divisor, share):
    """The formula again, in NumPy and float64."""
    low, high = min((edges[0] / divisor).min(), 0), max((edges[1] / divisor).max(), 0)
    scale = np.float64(np.float32((high - low) / 255))
    zero = np.clip(np.round(-low / scale), 0, 255)
    values, multiplied = rows / divisor, weights * divisor
    rounded = (np.clip(np.round(values / scale) + zero, 0, 255) - zero) * scale
    steps = np.abs(multiplied).max(1, keepdims=True) / 127
    nearest = np.round(multiplied / steps) * steps
    from_values = ((rounded - values) @ multiplied.T) ** 2
    from_weights = (values @ (nearest - multiplied).T) ** 2
    return from_values.sum() + share * from_weights.sum()


def test_error_is_that_of_the_formula():
    torch.manual_seed(1)
    rows, weights = torch.randn(64, 6) * torch.tensor([1.0, 1, 1, 30, 1, 1]), torch.randn(5, 6)
    edges = rows.double().amin(0) * 1.1, rows.double().amax(0) * 0.9
    for divisor in (torch.ones(6).double(), torch.tensor([1.0, 1, 2, 11, 1, 1]).double()):
        got = divided_error(rows, edges, weights, UINT8, divisor, WeightRounding(0.5))
        numbers = (rows.double().numpy(), [edge.numpy() for edge in edges], weights.double().numpy())
        assert got == pytest.approx(reference_error(*numbers, divisor.numpy(), 0.5), rel=2e-2)


def test_divisor_brings_outliers_down_to_one_threshold_and_nothing_else():
    torch.manual_seed(1)
    rows, weights = torch.randn(512, 8), torch.randn(5, 8)
    rows[:, 3] *= 40
    weights[:, 3] /= 40
    edges = rows.double().amin(0), rows.double().amax(0)
    divisor = best_divisor(rows, edges, weights, UINT8)
    largest = torch.maximum(-edges[0], edges[1])
    threshold = float(largest[3] / divisor[3])
    assert threshold < 8
    torch.testing.assert_close(divisor, (largest / threshold).clamp(min=1.0))
    assert best_divisor(rows[:, :3], (edges[0][:3], edges[1][:3]), weights[:, :3], UINT8) is None
    nothing = torch.zeros(8).double()
    assert best_divisor(rows * 0, (nothing, nothing), weights, UINT8) is None


def test_the_float_function_stays_and_the_quantized_one_gains():
    model, data = block()
    plain = quantize(model, data, bias_correction=False)
    divided = quantize(model, data, outliers=True, bias_correction=False)
    assert set(installed_factors(divided)) >= {"query", "key", "value"}
    assert all(torch.equal(divided.query._buffers[BUFFER], f) for f in (divided.key._buffers[BUFFER],))
    x = torch.randn(16, 5, 16)
    with torch.no_grad():
        expected = model(x)
        errors = [float((q(x) - expected).square().sum()) for q in (plain, divided)]
    assert errors[1] < errors[0] / 4
    rows = {row.name: row for row in layer_errors(model, divided, [x])}
    assert rows["query/linear/0"].own_sqnr_db > 35


def test_files_quantize_the_shared_value_once_and_agree(tmp_path):
    model, data = block()
    quantized = quantize(model, data, preset="int8_transformer")
    path = export_qdq(quantized, tmp_path / "model.onnx", data[0])
    nodes = onnx.load(path).graph.node
    quantizers = [node for node in nodes if node.op_type == "QuantizeLinear"]
    assert len(quantizers) == 2
    for run in (in_onnxruntime(path), in_openvino(path)):
        assert parity(quantized, run, [data[0], data[1][:3]]).sqnr_db > 45


def test_copies_saved_models_and_checkpoints_compute_the_same(tmp_path):
    model, data = block()
    quantized = quantize(model, data, outliers=True)
    dw.save(quantized, tmp_path / "saved")
    again = dw.load(tmp_path / "saved", Block())
    with torch.no_grad():
        expected = quantized(data[0])
        assert torch.equal(again(data[0]), expected)
        assert torch.equal(copy.deepcopy(quantized)(data[0]), expected)


def test_rows_that_are_not_finite_are_passed_over():
    model, data = block()
    spoiled = [batch.clone() for batch in data]
    spoiled[0][0, 0] = torch.inf

    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = copy.deepcopy(model.query)

        def forward(self, x):
            return self.layer(x * model.norm.weight)

    divided = quantize(Direct().eval(), spoiled, outliers=True, bias_correction=False)
    factors = installed_factors(divided)["layer"]
    assert bool(torch.isfinite(factors).all())
    assert float(factors[3]) < 0.3
