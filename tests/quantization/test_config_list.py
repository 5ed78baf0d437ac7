"""Settings of a ``config_list`` over the preset."""

import numpy as np
import pytest
import torch
from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.config.history import history
from dwindle.export.qdq import export_qdq
from dwindle.quantization import compare, parity, plan_of, quantize
from quantization.test_runtimes import in_onnxruntime, in_openvino


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc1 = nn.Linear(8 * 16, 16)
        self.fc2 = nn.Linear(16, 5)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(torch.relu(self.conv(x)).flatten(1))))


X = torch.randn(16, 3, 6, 6)


def weights(model):
    return {key[0]: entry for key, entry in plan_of(model)["weights"]}


def test_float_layers_stay_float():
    quantized = quantize(Net(), [X], config_list=[{"op_names": ["fc2"], "quant_dtype": None}])
    assert set(weights(quantized)) == {"conv", "fc1"}


def test_bits_scheme_and_granularity_reach_the_weight(tmp_path):
    config = [
        {
            "op_types": ["Linear"],
            "target_names": ["weight", "_input_"],
            "target_settings": {
                "weight": {"quant_dtype": "int4", "quant_scheme": "symmetric", "granularity": None},
                "_input_0": {"quant_dtype": "uint6", "quant_scheme": "affine"},
            },
        }
    ]
    model = Net()
    quantized = quantize(model, [X], config_list=config)
    found = weights(quantized)
    assert found["conv"]["form"]["highest"] == 127
    assert found["conv"]["length"] == 8
    for name in ("fc1", "fc2"):
        assert (found[name]["form"]["highest"], found[name]["axis"], found[name]["length"]) == (7, None, 1)
    used = {entry["form"]["highest"] for entry in plan_of(quantized)["quantizers"]}
    assert used == {63, 255}
    path = export_qdq(quantized, tmp_path / "few.onnx", X)
    for run in (in_onnxruntime(path), in_openvino(path)):
        assert parity(quantized, run, [X]).sqnr_db > 40
    with torch.no_grad():
        few = compare(model(X).numpy(), quantized(X).numpy()).sqnr_db
        assert few < compare(model(X).numpy(), quantize(model, [X])(X).numpy()).sqnr_db - 5
    assert np.isfinite(few)


def test_too_fine_granularity_is_refused():
    with pytest.raises(ConfigError, match="one for each channel"):
        quantize(
            Net(),
            [X],
            config_list=[
                {
                    "op_names": ["fc1"],
                    "target_names": ["weight"],
                    "quant_dtype": "int8",
                    "granularity": [4, 4],
                }
            ],
        )


def test_history_holds_the_plan():
    quantized = quantize(Net(), [X])
    (entry,) = history(quantized)
    assert entry["kind"] == "quantize"
    assert entry["weights"] == 3
    assert entry["plan"] == plan_of(quantized)
