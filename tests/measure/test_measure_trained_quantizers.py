"""A model that is trained with quantizers is measured as the integer model that it will be."""

from __future__ import annotations

import torch
from torch import nn

import dwindle as dw
from dwindle.quantization import TrainingQuantizer


def test_the_file_of_a_model_in_training_is_that_of_the_finished_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU()
    )
    inputs = torch.randn(2, 3, 8, 8)
    quantizer = TrainingQuantizer(model, calibration_data=[inputs], method="lsq")
    with dw.compress(model, [quantizer]):
        model(inputs)
    found = dw.measure(
        {"trained": model, "finished": quantizer.finish()}, (inputs,), runtimes=["onnxruntime"], repeats=3
    )
    assert found["trained"].bytes_on_disk["onnxruntime"] == found["finished"].bytes_on_disk["onnxruntime"]
