"""16 bits, weights with zero points, groups of weights: the simulation, the file, and what runtimes make of it."""

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dwindle.export.qdq import export_qdq
from dwindle.quantization import Reconstruction, apply_plan, compare, parity, plan_of, quantize
from quantization.test_runtimes import in_onnxruntime, in_openvino


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.depthwise = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.hidden, self.head = nn.Linear(32, 16), nn.Linear(16, 6)

    def forward(self, x):
        x = F.relu(self.depthwise(F.relu(self.conv(x))))
        return self.head(F.gelu(self.hidden(x.flatten(1))))


def made():
    torch.manual_seed(2)
    return Net().eval(), torch.randn(32, 3, 6, 6)


def config(weight, activation, types=("Conv2d", "Linear"), granularity="default"):
    settings = {
        "weight": {"quant_dtype": weight[0], "quant_scheme": weight[1], "granularity": granularity},
        "_input_0": {"quant_dtype": activation[0], "quant_scheme": activation[1]},
        "_output_0": {"quant_dtype": activation[0], "quant_scheme": activation[1]},
    }
    return [{"op_types": list(types), "target_names": list(settings), "target_settings": settings}]


EIGHT = ("uint8", "affine")
CASES = {
    "16 bits": (config(("int16", "symmetric"), ("uint16", "affine")), 70, {"INT16", "UINT16"}),
    "16 signed bits": (config(("int16", "symmetric"), ("int16", "symmetric")), 70, {"INT16"}),
    "12 bits": (config(("int12", "symmetric"), ("uint12", "affine")), 50, {"INT16", "UINT16"}),
    "affine weights": (config(("uint8", "affine"), EIGHT), 30, {"UINT8"}),
    "narrow activations": (config(("int8", "symmetric"), ("uint5", "affine")), 15, {"INT8", "UINT8"}),
    "groups": (config(("int8", "symmetric"), EIGHT, ("Linear",), [1, 8]), 30, {"INT8", "UINT8"}),
    "affine groups": (config(("uint4", "affine"), EIGHT, ("Linear",), [1, 8]), 15, {"UINT8"}),
}


@pytest.mark.parametrize("name", list(CASES))
def test_file_is_the_simulation(name, tmp_path):
    chosen, least, types = CASES[name]
    model, x = made()
    quantized = quantize(model, [x], config_list=chosen, bias_correction=False)
    with torch.no_grad():
        assert compare(model(x).numpy(), quantized(x).numpy()).sqnr_db > least
    path = export_qdq(quantized, tmp_path / "net.onnx", x)
    file = onnx.load(str(path))
    stored = {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in file.graph.initializer}
    assert types <= stored
    assert {entry.version for entry in file.opset_import if not entry.domain} <= {20, 21}
    for run in (in_onnxruntime(path), in_openvino(path)):
        result = parity(quantized, run, [x])
        assert result.sqnr_db > 30
        assert result.equal_predictions == 1.0
    fresh = apply_plan(Net(), plan_of(quantized))
    fresh.load_state_dict(quantized.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x), quantized(x))


def test_groups_lose_less_than_channels():
    model, x = made()
    ratios = []
    with torch.no_grad():
        model.hidden.weight[:, ::8] *= 20
        for granularity in ("default", [1, 4]):
            chosen = config(("int4", "symmetric"), EIGHT, ("Linear",), granularity)
            quantized = quantize(model, [x], config_list=chosen, bias_correction=False)
            ratios.append(compare(model(x).numpy(), quantized(x).numpy()).sqnr_db)
    assert ratios[1] > ratios[0] + 1


@pytest.mark.parametrize("granularity", ["default", [1, 8]])
@pytest.mark.parametrize("weight", [("uint3", "affine"), ("int3", "symmetric")])
def test_learned_rounding_of_all_scales(weight, granularity):
    model, x = made()
    chosen = config(weight, EIGHT, ("Linear",), granularity)
    learned = quantize(
        model, [x], config_list=chosen, rounding=Reconstruction(steps=60), bias_correction=False
    )
    for result in learned._dwindle_quantization.reconstructed:
        assert result.learned <= result.nearest
    gains = [own.learned < own.nearest for own in learned._dwindle_quantization.reconstructed]
    assert any(gains)
