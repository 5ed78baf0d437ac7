"""MACs against formulas written by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dwindle.graph.macs import (
    _count_running,
    count_macs,
    count_macs_by_module,
    counting_kernels,
)
from dwindle.graph.modes import in_mode


class Call(nn.Module):
    """Wraps a function, so that it can be counted."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def attention_layer_macs(batch, queries, keys, width):
    projections = batch * (queries * 2 + keys * 2) * width * width  # query and output; key and value
    return projections + 2 * batch * queries * keys * width


CASES = {
    "linear": (nn.Linear(3, 5), [(2, 7, 3)], 2 * 7 * 3 * 5),
    "linear, no bias": (nn.Linear(3, 5, bias=False), [(2, 3)], 2 * 3 * 5),
    "linear, one vector": (nn.Linear(3, 5), [(3,)], 3 * 5),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), [(2, 4, 10)], 2 * 10 * 6 * 4 * 3),
    "conv2d": (nn.Conv2d(4, 8, 3), [(2, 4, 6, 5)], 2 * 4 * 3 * 8 * 4 * 9),
    "conv2d, strided": (nn.Conv2d(4, 8, 3, stride=2, padding=1), [(1, 4, 8, 8)], 4 * 4 * 8 * 4 * 9),
    "conv2d, grouped": (nn.Conv2d(4, 8, 3, groups=2), [(1, 4, 6, 6)], 4 * 4 * 8 * (4 // 2) * 9),
    "conv2d, depthwise": (nn.Conv2d(6, 6, 5, groups=6, padding=2), [(1, 6, 7, 7)], 7 * 7 * 6 * 25),
    "conv2d, dilated": (nn.Conv2d(3, 2, 3, dilation=2), [(1, 3, 9, 9)], 5 * 5 * 2 * 3 * 9),
    "conv3d": (nn.Conv3d(2, 3, 2), [(1, 2, 4, 4, 4)], 27 * 3 * 2 * 8),
    # each input position is multiplied with the whole kernel
    "transposed": (nn.ConvTranspose2d(4, 8, 3, stride=2), [(1, 4, 5, 5)], 25 * 4 * 8 * 9),
    "transposed, grouped": (nn.ConvTranspose2d(4, 8, 3, groups=2), [(1, 4, 5, 5)], 25 * 4 * (8 // 2) * 9),
    "LSTM": (nn.LSTM(3, 5), [(7, 2, 3)], 7 * 2 * 4 * 5 * (3 + 5)),
    "LSTM, two layers, both ways": (
        nn.LSTM(3, 5, num_layers=2, bidirectional=True),
        [(7, 2, 3)],
        7 * 2 * 2 * 4 * 5 * ((3 + 5) + (10 + 5)),
    ),
    "LSTM, projected": (nn.LSTM(3, 5, proj_size=2), [(7, 2, 3)], 7 * 2 * (4 * 5 * (3 + 2) + 5 * 2)),
    "GRU": (nn.GRU(3, 5), [(7, 2, 3)], 7 * 2 * 3 * 5 * (3 + 5)),
    "RNN": (nn.RNN(3, 5), [(7, 2, 3)], 7 * 2 * 5 * (3 + 5)),
    "LSTM cell": (nn.LSTMCell(3, 5), [(2, 3)], 2 * 4 * 5 * (3 + 5)),
    "attention": (
        nn.MultiheadAttention(8, 2, batch_first=True),
        [(3, 5, 8), (3, 7, 8), (3, 7, 8)],
        attention_layer_macs(3, 5, 7, 8),
    ),
    "transformer layer": (
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        [(3, 5, 8)],
        attention_layer_macs(3, 5, 5, 8) + 2 * 3 * 5 * 8 * 16,
    ),
    "sdpa": (
        Call(F.scaled_dot_product_attention),
        [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)],
        2 * 3 * 5 * 7 * (4 + 6),
    ),
    "sdpa, grouped queries": (
        Call(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)),
        [(2, 6, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)],
        2 * 6 * 5 * 7 * 8,
    ),
    "matmul": (Call(torch.matmul), [(2, 3, 4, 5), (5, 6)], 2 * 3 * 4 * 5 * 6),
    "batched matmul": (Call(torch.matmul), [(2, 3, 4, 5), (2, 3, 5, 6)], 2 * 3 * 4 * 5 * 6),
    "einsum": (Call(lambda a, b: torch.einsum("bij,jk->bik", a, b)), [(2, 3, 4), (4, 5)], 2 * 3 * 4 * 5),
    "matrix and vector": (Call(torch.mv), [(3, 4), (4,)], 12),
    "dot": (Call(torch.dot), [(4,), (4,)], 4),
    "baddbmm": (Call(torch.baddbmm), [(2, 3, 5), (2, 3, 4), (2, 4, 5)], 2 * 3 * 4 * 5),
    "bilinear": (nn.Bilinear(3, 4, 5), [(2, 3), (2, 4)], 2 * 5 * (3 * 4 + 4)),
    "elementwise": (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)), [(1, 3, 4, 4)], 0),
}


@pytest.mark.parametrize("case", CASES)
def test_formula(case):
    model, shapes, expected = CASES[case]
    args = [torch.randn(shape) for shape in shapes]
    assert count_macs(model, args) == expected
    counted = count_macs_by_module(model, args)
    assert counted.total == counted.by_module[""] == expected
    assert sum(counted.by_operator.values()) == expected


@pytest.mark.parametrize("case", CASES)
def test_running_counts_the_same_as_meta(case):
    model, shapes, expected = CASES[case]
    args = tuple(torch.randn(shape) for shape in shapes)
    with in_mode(model, training=False), counting_kernels():
        assert _count_running(model, args, {}, by_module=False).total == expected


def test_dtypes_do_not_matter():
    for dtype in (torch.bfloat16, torch.float64):
        assert count_macs(nn.Linear(3, 5).to(dtype), (torch.randn(2, 3, dtype=dtype),)) == 30


def test_by_module_counts_children_and_repeated_calls():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            self.last = nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.inner(self.inner(x)))

    counted = count_macs_by_module(Shared(), (torch.randn(3, 4),))
    assert counted.by_module == {"": 120, "inner": 96, "inner.0": 96, "inner.1": 0, "last": 24}


def test_model_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    model[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count_macs_by_module(model, (torch.randn(2, 3, 8, 8),))
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_code_that_reads_values_is_counted_by_running():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x) if x.sum().item() > 0 else x

    assert count_macs(Reads(), (torch.ones(2, 4),)) == 32
    assert count_macs(Reads(), (-torch.ones(2, 4),)) == 0


def test_tensors_made_inside_are_counted():
    model = Call(lambda x: x @ torch.ones(4, 6))  # no device given: mixes with the meta device
    assert count_macs(model, (torch.randn(3, 4),)) == 72


def test_kwargs_and_dicts():
    model = Call(lambda pair, *, weight: pair["a"] @ weight)
    assert count_macs(model, ({"a": torch.randn(3, 4)},), {"weight": torch.randn(4, 2)}) == 24


def test_works_inside_inference_mode():
    model, x = nn.Linear(3, 5), torch.randn(2, 3)
    with torch.inference_mode():
        assert count_macs(model, (x,)) == 30


def test_tied_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert count_macs(model, (torch.randn(1, 4),)) == 32


def test_uncounted_operators_are_named():
    counted = count_macs_by_module(Call(lambda x: torch.fft.fft(x)), (torch.randn(8),))
    assert counted.total == 0
    assert any("fft" in name for name in counted.uncounted)


def test_attention_mechanism_switch_is_restored():
    before = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError):
        count_macs(nn.Linear(3, 5), (torch.randn(2, 4),))
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_resnet50_golden_value():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet50()
    # NNI 2.10's golden value, made of convolutions and the classifier; it takes no account of biases and norms
    assert count_macs(model, (torch.randn(1, 3, 224, 224),)) == 4_089_184_256
