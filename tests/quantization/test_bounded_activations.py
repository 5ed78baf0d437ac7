"""Ranges that are learned behind a bounded activation end where it does, so that ONNX Runtime computes in integers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import dwindle as dw
from dwindle.quantization import TrainingQuantizer
from dwindle.quantization.aware_training import bank_of, finished

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


class Bounded(nn.Module):
    """Convolutions with a normalization and a ReLU6, most of whose values are cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU6())
        self.second = nn.Sequential(
            nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16), nn.ReLU6(inplace=True)
        )
        self.last = nn.Conv2d(16, 8, 1)
        for part in (self.first, self.second):
            nn.init.constant_(part[1].weight, 30.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(x))).mean((2, 3))


@pytest.mark.parametrize("method", ["lsq", "lsq_plus", "pact", "qat"])
def test_the_runtime_has_nothing_to_clip(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Bounded()
    batches = [torch.randn(8, 3, 16, 16) for _ in range(3)]
    quantizer = TrainingQuantizer(model, calibration_data=batches, method=method, backend="onnxruntime")
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with dw.compress(model, [quantizer]) as run:
        bank = bank_of(model)
        assert bank is not None
        for number in range(6):
            loss = model(batches[number % 3]).square().mean() + run.loss()
            loss.backward()
            if number == 3:  # as if it had learned to: far beyond the bound
                with torch.no_grad():
                    for name, value in bank.activations.named_parameters():
                        if name.endswith(("scale", "clip")):
                            value.mul_(3)
            optimizer.step()
            optimizer.zero_grad()
            run.step()
        assert sorted(bank.ends.values()) == [6.0, 6.0]
    dw.export(finished(model.eval()), tmp_path / "model.onnx", example_inputs=(batches[0],))

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    plain, optimized = (
        [node.op_type for node in onnx.load(tmp_path / name).graph.node]
        for name in ("model.onnx", "optimized.onnx")
    )
    assert plain.count("Clip") == 2
    assert "Clip" not in optimized
    assert optimized.count("QLinearConv") == 3
