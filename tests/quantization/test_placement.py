"""Where quantizers stand, on models small enough to say it by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dwindle.quantization.folding import apply_folds, find_folds
from dwindle.quantization.operators import BACKENDS, get_backend
from dwindle.quantization.overrides import overrides_from_config
from dwindle.quantization.placement import place
from dwindle.quantization.recording import record
from quantization.models import Encoder, residual


def placed(model, *args, backend="onnxruntime"):
    return place(record(model.eval(), args, {}), get_backend(backend))


def outputs(placement):
    return {str(key): placement.names[number] for key, number in placement.outputs.items()}


class Block(nn.Module):
    def __init__(self, activation=F.relu):
        super().__init__()
        self.first, self.second, self.last = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.activation = activation

    def forward(self, x):
        x = self.activation(self.first(x))
        return self.last(self.activation(self.second(x) + x))


def test_quantizers_stand_behind_the_relu():
    placement = placed(Block(), torch.randn(2, 3, 4, 4))
    assert set(outputs(placement)) == {"(model)/relu/0", "second/conv2d/0", "(model)/relu/1"}
    assert [str(key) for key in placement.inputs] == ["first/conv2d/0"]
    assert len(placement.weights) == 3


def test_activations_that_do_not_fuse_read_the_quantized_convolution():
    placement = placed(Block(F.silu), torch.randn(2, 3, 4, 4))
    assert set(outputs(placement)) == {"first/conv2d/0", "second/conv2d/0"}
    # The sum feeds an activation in float, so nothing would be won by rounding it.
    assert {key.module for key in placement.inputs} == {"first", "second", "last"}


def test_openvino_computes_activations_and_sums_inside_of_the_convolution():
    placement = placed(Block(F.silu), torch.randn(2, 3, 4, 4), backend="openvino")
    assert set(outputs(placement)) == {
        "(model)/silu/0"
    }  # read twice; the second convolution adds it in float
    placement = placed(Block(), torch.randn(2, 3, 4, 4), backend="openvino")
    assert set(outputs(placement)) == {"(model)/relu/0", "(model)/relu/1"}


def test_of_two_convolutions_that_are_added_openvino_rounds_one():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.left, self.right, self.last = (nn.Conv2d(3, 3, 1) for _ in range(4))

        def forward(self, x):
            x = torch.relu(self.stem(x))
            return self.last(torch.relu(self.left(x) + self.right(x)))

    placement = placed(Two(), torch.randn(2, 3, 4, 4), backend="openvino")
    assert set(outputs(placement)) == {"(model)/relu/0", "left/conv2d/0", "(model)/relu/1"}


def test_openvino_keeps_residual_streams_and_gated_products_in_float():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.gate, self.down = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x):
            return x + self.down(F.silu(self.gate(x)) * self.up(x))

    assert outputs(placed(Gated(), torch.randn(2, 4), backend="openvino")) == {}
    placement = placed(Encoder(), torch.randint(0, 50, (2, 6)), backend="openvino")
    assert not any(key.operation in ("add", "layer_norm") for key in placement.outputs)


def test_residual_stream_of_a_transformer_stays_float():
    placement = placed(Encoder(), torch.randint(0, 50, (2, 6)))
    assert not any(key.operation in ("add", "layer_norm") for key in placement.outputs)
    assert sum(key.operation == "linear" for key in placement.weights) == 2 * 4 + 1


def test_values_that_only_move_share_their_scale():
    class Moves(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(16, 2)

        def forward(self, x):
            x = F.max_pool2d(F.relu(self.first(x)), 2)
            x = torch.cat([F.relu(self.second(x)), x], 1)
            left, _ = x.chunk(2, 1)
            return self.fc(left.flatten(1))

    placement = placed(Moves(), torch.randn(2, 3, 4, 4))
    names = outputs(placement)
    assert len({names[f"(model)/{name}/0"] for name in ("max_pool2d", "cat", "chunk", "flatten")}) == 1
    assert len(placement.names) == 2  # the input, and all the rest


def test_gate_of_squeeze_and_excitation_is_an_int8_product():
    model, x = residual()
    apply_folds(model, find_folds(model, record(model, (x,), {})))
    placement = placed(model, x)
    product = next(key for key in placement.outputs if key.operation == "mul")
    assert len(placement.inputs[product]) == 1  # the gate; the other side is int8 already


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_what_a_gate_is_computed_from_has_headroom_unless_it_is_named(backend):
    model, x = residual()
    apply_folds(model, find_folds(model, record(model, (x,), {})))
    placement = placed(model, x, backend=backend)
    weights = {key.module: place for key, place in placement.weights.items()}
    assert placement.averages == {weights[name].input_quantizer for name in ("squeeze", "excite")}
    assert not {"squeeze", "excite"} & {key.module for key in placement.outputs}
    config = [{"op_names": ["squeeze"], "target_names": ["_input_"], "quant_dtype": "uint8"}]
    named = place(record(model, (x,), {}), get_backend(backend), overrides_from_config(model, config))
    weights = {key.module: place for key, place in named.weights.items()}
    assert named.averages == {weights["excite"].input_quantizer}


def test_a_head_with_a_sigmoid_is_no_gate():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1), nn.Sigmoid()
    )
    placement = placed(model, torch.randn(2, 3, 4, 4))
    assert {key.module for key in placement.weights} == {"0", "4"}


def test_pad_with_another_value_than_zero_is_not_shared():
    class Pads(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return self.second(F.pad(F.relu(self.first(x)), (1, 1, 1, 1), value=-1.0))

    placement = placed(Pads(), torch.randn(2, 3, 4, 4))
    assert "(model)/pad/0" not in outputs(placement)


def test_results_stay_in_full_precision():
    placement = placed(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), torch.randn(2, 3, 4, 4))
    assert outputs(placement) == {}


def test_dynamic_weights_stay_float():
    class Hyper(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return F.linear(x, self.fc(x))

    assert [key.module for key in placed(Hyper(), torch.randn(4, 4)).weights] == ["fc"]


@pytest.mark.parametrize("name", list(BACKENDS))
def test_tables_have_names(name):
    assert get_backend(name).name == name
