"""What runs in int8 and why not the rest, on models small enough to say it by hand."""

import json

import torch
import torch.nn.functional as F
from torch import nn

from dwindle.quantization.explanation import explain_placement
from quantization.models import Encoder, residual


def facts_of(model, inputs, **options):
    found = explain_placement(model.eval(), inputs, **options)
    return {fact.call: fact for fact in found.operations}, found


def test_states_of_a_convolutional_network():
    facts, found = facts_of(*residual())
    states = {call: fact.state for call, fact in facts.items()}
    assert states == {
        "stem.0/conv2d/0": "int8",
        "stem.1/batch_norm/0": "folded",
        "stem.2/hardtanh/0": "fused",
        "depthwise/conv2d/0": "int8",
        "norm/batch_norm/0": "folded",
        "(model)/relu/0": "fused",
        "(model)/adaptive_avg_pool2d/0": "float",
        "squeeze/conv2d/0": "int8",
        "(model)/relu/1": "float",
        "excite/conv2d/0": "int8",
        "(model)/sigmoid/0": "float",
        "(model)/mul/0": "int8",
        "project/conv2d/0": "int8",
        "(model)/add_/0": "int8",
        "(model)/relu/2": "fused",
        "(model)/pad/0": "moves",
        "branch/conv2d/0": "int8",
        "(model)/relu/3": "fused",
        "(model)/max_pool2d/0": "moves",
        "(model)/cat/0": "int8",
        "(model)/adaptive_avg_pool2d/1": "int8",
        "(model)/flatten/0": "moves",
        "head/linear/0": "int8",
    }
    assert found.counts == {"int8": 11, "folded": 2, "fused": 4, "float": 3, "moves": 3}
    assert facts["stem.0/conv2d/0"].weight == "stem.0.weight, 8 bits, -127 to 127, symmetric, per channel"
    sigmoid = facts["(model)/sigmoid/0"]
    assert sigmoid.reason == "onnxruntime has no int8 kernel for sigmoid; rounded for (model)/mul/0"
    assert sigmoid.line.split(":")[0].endswith("models.py")
    # All that only moves or joins values shares one scale.
    cat = facts["(model)/cat/0"]
    assert set(cat.reads) == {cat.writes} == {facts["(model)/relu/2"].writes}
    shared = found.quantizers[cat.writes]
    assert {"(model)/cat/0 (out)", "(model)/pad/0 (out)", "(model)/max_pool2d/0 (out)"} <= set(shared.places)


def test_reasons():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third, self.left = (nn.Conv2d(4, 4, 1) for _ in range(4))
            self.norm, self.last = nn.LayerNorm(4), nn.Linear(4, 4)
            self.hyper = nn.Linear(4, 4)

        def forward(self, x):
            a, b = F.relu(self.first(x)), self.second(x) * 2.0
            c = self.left(self.third(a + F.silu(b)))
            d = self.norm(c.mean((2, 3)))
            e = F.linear(d, self.hyper(d)[:4])
            return self.last(torch.softmax(d @ e.t(), -1))

    facts, _ = facts_of(
        Net(), torch.randn(4, 4, 2, 2), config_list=[{"op_names": ["left"], "quant_dtype": None}]
    )
    reasons = {call: fact.reason for call, fact in facts.items() if fact.state == "float"}
    assert reasons["(model)/mul/0"] == "an operand is a constant: int8 kernels take two activations"
    assert (
        reasons["(model)/add/0"] == "its operand from (model)/silu/0 is in float; rounded for third/conv2d/0"
    )
    assert reasons["left/conv2d/0"] == "config_list leaves left in float"
    assert reasons["(model)/mean/0"] == "its input is in float"
    assert reasons["norm/layer_norm/0"].startswith(
        "onnxruntime has no int8 kernel for layer_norm; rounded for hyper"
    )
    assert reasons["(model)/linear/0"].startswith("its weight is computed from the inputs")
    assert reasons["(model)/matmul/0"] == "products of two activations are left in float for onnxruntime"
    assert reasons["(model)/softmax/0"].endswith("no int8 kernel for softmax; rounded for last/linear/0")
    assert (
        "the model gives it back" not in facts["last/linear/0"].reason
    )  # a linear layer gives floats anyway
    assert facts["first/conv2d/0"].reads == facts["second/conv2d/0"].reads


def test_results_and_unread_values():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.first(x)
            return F.max_pool2d(y, 2).exp(), self.second(y)

    facts, _ = facts_of(Net(), torch.randn(2, 4, 4, 4))
    assert facts["(model)/max_pool2d/0"].reason == "nothing behind it reads int8"
    assert facts["second/conv2d/0"].reason.endswith(
        "its output stays float: the model gives it back: results stay in full precision"
    )


def test_wishes_that_no_kernel_heeds_are_named():
    config = [{"op_types": ["Embedding", "Linear"], "target_names": ["weight"], "quant_dtype": "int8"}]
    inputs = {"tokens": torch.randint(0, 50, (2, 6))}
    facts, found = facts_of(Encoder(), inputs, config_list=config)
    assert found.unheeded == ["embedding.weight"]
    assert "embedding.weight" in found.describe()
    assert facts["embedding/embedding/0"].reason.startswith("it reads no floating activation; rounded for")


def test_model_is_untouched_and_the_facts_are_plain_data():
    model, x = residual()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = explain_placement(model, x, backend="openvino")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model._forward_hooks
    data = json.loads(json.dumps(found.to_json()))
    assert data["backend"] == "openvino"
    assert len(data["operations"]) == len(found.operations)
    quantized = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)
    )
    assert found.quantized_parameters == quantized
