"""Bad input to ``dw.quantize``: a clear error before any change, or the fallback that docs/quantization.md promises."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dwindle.config.errors import ConfigError, ExportError
from dwindle.export.qdq import export_qdq
from dwindle.quantization import OBSERVERS, compare, parity, quantization_parameters, quantize
from quantization.test_runtimes import in_onnxruntime, in_openvino

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def refused(model, data, message, **options):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=message):
        quantize(model, data, **options)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert not model._forward_hooks


@pytest.mark.parametrize("data", [[], iter(()), [torch.empty(0, 6)]], ids=["list", "iterator", "no rows"])
def test_empty_calibration(data):
    refused(net(), data, "no batch|nothing was observed")


def test_nan_in_the_data():
    x = X.clone()
    x[3, 2] = math.nan
    refused(net(), [X, x], "calibration_data holds NaN")


def test_nan_that_the_model_makes():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.second(self.first(x).sqrt())

    refused(Root(), [X], "make NaN at (.*)sqrt")


@pytest.mark.parametrize("observer", list(OBSERVERS))
def test_infinite_values_do_not_widen_a_range(observer):
    x = X.clone()
    x[0, 0], x[1, 1] = math.inf, -math.inf
    quantized = quantize(net(), [x, X], observer=observer, bias_correction=False, settle_scales=False)
    scale, zero_point, _, _ = quantization_parameters(quantized)
    first = quantized._dwindle_quantization.slots
    number = next(slot.place.input_quantizer for key, slot in first.items() if key.module == "0")
    reach = (255 - int(zero_point[number])) * float(scale[number])
    assert torch.isfinite(scale).all()
    assert reach <= float(X.max()) + float(scale[number])  # the zero point is rounded to a level


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(value):
    model = net()
    with torch.no_grad():
        model[0].weight[1, 2] = value
    refused(model, [X], "NaN|0.weight cannot be quantized: it holds values that are not finite")


@pytest.mark.parametrize("constant", [3.0, -0.25])
def test_constant_activations_are_exact(constant, tmp_path):
    model = net()
    x = torch.full((8, 6), constant)
    quantized = quantize(model, [x], bias_correction=False)
    scale, zero_point, _, _ = quantization_parameters(quantized)
    slots = quantized._dwindle_quantization.slots
    number = next(slot.place.input_quantizer for key, slot in slots.items() if key.module == "0")
    level = round(constant / float(scale[number])) + int(zero_point[number])
    assert (level - int(zero_point[number])) * float(scale[number]) == pytest.approx(constant, rel=1e-6)
    with torch.no_grad():
        assert compare(model(x).numpy(), quantized(x).numpy()).sqnr_db > 25


def test_a_dead_activation_gets_a_range_and_a_warning(tmp_path):
    model = net()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # nothing passes the ReLU
    with pytest.warns(UserWarning, match="only zeros reached 1/relu/0"):
        quantized = quantize(model, [X])
    with torch.no_grad():
        assert compare(model(X).numpy(), quantized(X).numpy()).sqnr_db > 40
        model[0].bias.zero_()
        quantized[0].bias.zero_()
        small = 0.05 * X  # what comes alive later is not cut to nothing
        assert compare(model(small).numpy(), quantized(small).numpy()).sqnr_db > 15


def test_channels_of_zeros_stay_zero_in_both_runtimes(tmp_path):
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 1)

        def forward(self, x):
            return self.second(F.relu(self.first(x)))

    model, x = Root().eval(), torch.randn(8, 3, 6, 6)
    with torch.no_grad():
        model.first.weight[2] = 0.0
        model.second.weight[1] = 0.0
        model.second.bias[1] = 0.0
        model.second.weight[3] = 0.0
        model.second.bias[3] = 2.5
    quantized = quantize(model, [x], bias_correction=False)
    path = export_qdq(quantized, tmp_path / "zeros.onnx", x)
    with torch.no_grad():
        outputs = [quantized(x).numpy(), in_onnxruntime(path)(x.numpy())[0], in_openvino(path)(x.numpy())[0]]
        assert compare(model(x).numpy(), outputs[0]).sqnr_db > 25
    for output in outputs:
        assert np.isfinite(output).all()
        assert (output[:, 1] == 0.0).all()
        np.testing.assert_allclose(output[:, 3], 2.5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int1", "uint17", "int32"])
def test_number_formats_without_kernels(dtype):
    config = [{"op_names": ["2"], "target_names": ["weight"], "quant_dtype": dtype}]
    refused(net(), [X], f"2.weight: quant_dtype '{dtype}' is not known here", config_list=config)


@pytest.mark.parametrize("granularity", ["per_channel", [1, 2]])
def test_activations_have_one_scale(granularity):
    config = [
        {"op_names": ["2"], "target_names": ["_input_"], "quant_dtype": "uint8", "granularity": granularity}
    ]
    refused(net(), [X], "an activation has one scale", config_list=config)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_simulated_but_not_written(dtype, tmp_path):
    model, x = net().to(dtype), X.to(dtype)
    quantized = quantize(model, [x])
    with torch.no_grad():
        result = quantized(x)
        assert result.dtype == dtype
        assert compare(model(x).double().numpy(), result.double().numpy()).sqnr_db > 20
    with pytest.raises(ExportError, match="only float32 models"):
        export_qdq(quantized, tmp_path / "wide.onnx", x)
    assert list(tmp_path.iterdir()) == []


class _Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2.0


class _Unsupported(nn.Module):
    """Recurrence, an embedding, a custom operation, a softmax: all between two linear layers."""

    def __init__(self):
        super().__init__()
        self.embedding, self.first = nn.Embedding(10, 8), nn.Linear(8, 8)
        self.recurrent, self.last = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, tokens):
        hidden = _Doubling.apply(self.first(self.embedding(tokens)))
        return self.last(torch.softmax(self.recurrent(hidden)[0], -1).mean(1))


def test_unsupported_operators_stay_in_float():
    model, tokens = _Unsupported().eval(), torch.randint(0, 10, (6, 5))
    config = [{"op_types": ["Embedding", "Linear"], "target_names": ["weight"], "quant_dtype": "int8"}]
    with pytest.warns(UserWarning, match="embedding.weight: no int8 kernel"):
        quantized = quantize(model, [tokens], config_list=config)
    assert {key.module for key in quantized._dwindle_quantization.slots} == {"first", "last"}
    with torch.no_grad():
        assert compare(model(tokens).numpy(), quantized(tokens).numpy()).sqnr_db > 25
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(model, [tokens])  # nothing was wished that is not done


def test_nothing_to_quantize():
    refused(nn.Sequential(nn.LayerNorm(6), nn.Softmax(-1)), [X], "no operation of this model can run in int8")


def test_what_is_not_finite_stays_so_at_run_time(tmp_path):
    quantized = quantize(net(), [X])
    x = X.clone()
    x[0, 0], x[1, 0], x[2, 0] = math.nan, math.inf, 1e30
    with torch.no_grad():
        result = quantized(x)
    assert torch.isnan(result[0]).all()
    assert torch.isfinite(result[1:]).all()
    assert torch.equal(result[1:2].isfinite(), torch.ones(1, 4, dtype=torch.bool))
    path = export_qdq(quantized, tmp_path / "net.onnx", X)
    rest = x[1:]
    for run in (
        in_onnxruntime(path),
        in_openvino(path),
    ):  # infinity and huge values are the highest level there too
        assert parity(quantized, run, [rest]).sqnr_db > 30
