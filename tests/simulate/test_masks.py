"""What masks do to numbers: closed forms, recurrent layers, attention, autocast, compilation, DDP."""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import torch
from torch import nn

from dwindle.config import Target
from dwindle.simulate import attach_mask, detach, register_simulator


class AffineQuantizer(nn.Module):
    """x -> (round(clamp(x / scale + zero, low, high)) - zero) * scale, as NNI's clamp_round."""

    def __init__(self, scale: float, zero: float) -> None:
        super().__init__()
        self.scale, self.zero = scale, zero

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.round(torch.clamp(x / self.scale + self.zero, -127, 127)) - self.zero) * self.scale


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 3, 3)


def test_input_channel_mask_equals_zeroed_input() -> None:
    model, x = conv(), torch.randn(2, 3, 5, 5)
    mask = torch.ones(3, 3, 1, 1)
    mask[:, 0] = 0
    x_zeroed = x.clone()
    x_zeroed[:, 0] = 0
    expected = model(x_zeroed)
    attach_mask(model, Target("", "weight"), mask)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)


def test_output_channel_mask_leaves_the_bias_only() -> None:
    model, x = conv(), torch.randn(2, 3, 5, 5)
    attach_mask(model, Target("", "weight"), torch.tensor([0.0, 1, 1]).reshape(3, 1, 1, 1))
    expected = dict(model.named_parameters())["bias"][0].expand(2, 3, 3)
    assert torch.equal(model(x)[:, 0], expected)


def test_input_and_output_masks() -> None:
    model, x = conv(), torch.randn(2, 3, 5, 5)
    keep = torch.tensor([1.0, 0, 1])
    expected = model(x * keep.reshape(1, 3, 1, 1)) * keep.reshape(1, 3, 1, 1)
    attach_mask(model, Target("", "_input_0"), keep, axis=1)
    attach_mask(model, Target("", "_output_0"), keep.reshape(1, 3, 1, 1))
    assert torch.equal(model(x), expected)
    assert torch.equal(model(input=x), expected)


def test_all_targets_masked_and_quantized_equal_the_formula() -> None:
    model, x = conv(), torch.randn(2, 3, 5, 5)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    keep = torch.tensor([0.0, 1, 1])
    forms = {"_input_0": (0.4, 5.0), "weight": (0.5, 5.0), "_output_0": (0.3, 15.0)}
    masks = {
        "_input_0": keep.reshape(1, 3, 1, 1),
        "weight": keep.reshape(3, 1, 1, 1),
        "_output_0": keep.reshape(1, 3, 1, 1),
    }
    for name, (scale, zero) in forms.items():
        register_simulator(model, Target("", name), AffineQuantizer(scale, zero), "quantize")
        attach_mask(model, Target("", name), masks[name])

    def closed(tensor: torch.Tensor, name: str) -> torch.Tensor:
        scale, zero = forms[name]
        return (torch.round(torch.clamp(tensor / scale + zero, -127, 127)) - zero) * scale

    inner = nn.functional.conv2d(
        closed(x * masks["_input_0"], "_input_0"), closed(weight * masks["weight"], "weight"), bias
    )
    assert torch.equal(model(x), closed(inner * masks["_output_0"], "_output_0"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_add_removes_entries_of_a_softmax_in_any_dtype(dtype: torch.dtype) -> None:
    model = nn.Softmax(-1)
    scores = (torch.randn(4, 6) * 100).to(dtype)
    mask = torch.tensor([1.0, 1, 0, 1, 0, 1])
    attach_mask(model, Target("", "_input_0"), mask, apply_method="add")
    expected = torch.zeros(4, 6, dtype=dtype)
    expected[:, mask.bool()] = torch.softmax(scores[:, mask.bool()], -1)
    torch.testing.assert_close(model(scores), expected)
    attach_mask(model, Target("", "_input_0"), torch.zeros(6), apply_method="add")
    assert torch.isfinite(model(scores)).all()


def test_bypass_changes_nothing() -> None:
    model, x = conv(), torch.randn(1, 3, 5, 5)
    expected = model(x)
    attach_mask(model, Target("", "weight"), torch.zeros(()), apply_method="bypass")
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_read_the_masked_weights(kind: type[nn.RNNBase]) -> None:
    model, x = kind(4, 3), torch.randn(5, 2, 4)
    mask = (torch.rand_like(model.weight_ih_l0) > 0.5).float()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.weight_ih_l0.mul_(mask)
    attach_mask(model, Target("", "weight_ih_l0"), mask)
    assert torch.equal(model(x)[0], reference(x)[0])
    model(x)[0].sum().backward()
    gradient = dict(model.named_parameters())["weight_ih_l0"].grad
    assert gradient is not None
    assert torch.equal(gradient[mask == 0], torch.zeros_like(gradient[mask == 0]))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x)[0], reference(x)[0])
    detach(model)
    assert torch.equal(model(x)[0], reference(x)[0])
    with torch.no_grad():
        model.weight_ih_l0.zero_()
    assert not torch.equal(model(x)[0], reference(x)[0])  # the live parameter is read again


@pytest.mark.parametrize("training", [True, False])
def test_transformer_layer_with_masks_everywhere(training: bool) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0).train(training)
    x = torch.randn(2, 3, 8)
    reference = copy.deepcopy(model)
    keep = (torch.arange(16) % 2).float()
    with torch.no_grad():
        reference.linear1.weight.mul_(keep[:, None])
        reference.self_attn.in_proj_weight[:4].zero_()
    attach_mask(model, Target("linear1", "weight"), keep[:, None])
    rows = torch.ones(24, 1)
    rows[:4] = 0
    attach_mask(model, Target("self_attn", "in_proj_weight"), rows)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x), rtol=0, atol=1e-6)
        attach_mask(model, Target("linear1", "_output_0"), torch.zeros(16))
        reference.linear2.weight.zero_()  # relu(0) = 0 whatever follows
        torch.testing.assert_close(model(x), reference(x), rtol=0, atol=1e-6)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, left: torch.Tensor, *, right: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        value = left if right is None else left + right
        return {"sum": value, "inner": self.inner(value)}


def test_inputs_by_name_and_outputs_by_place() -> None:
    model, a, b = Named(), torch.randn(2, 3), torch.randn(2, 3)
    keep = torch.tensor([1.0, 0, 1])
    attach_mask(model, Target("", "_input_right"), keep)
    attach_mask(model, Target("", "_input_left"), 1 - keep)
    attach_mask(model, Target("", "_output_1"), torch.zeros(3))
    out = model(a, right=b)
    assert torch.equal(out["sum"], a * (1 - keep) + b * keep)
    assert torch.equal(out["inner"], torch.zeros(2, 3))
    assert torch.equal(model(left=a)["sum"], a * (1 - keep))


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
    attach_mask(model, Target("0", "weight"), torch.tensor([0.0, 1, 1, 0]).reshape(4, 1, 1, 1))
    attach_mask(model, Target("0", "bias"), torch.tensor([0.0, 1, 1, 0]))
    attach_mask(model, Target("3", "_input_0"), (torch.arange(16) % 3 > 0).float())
    attach_mask(model, Target("1", "_output_0"), torch.tensor([1.0, 0, 1, 1]), axis=1)
    return model


def test_autocast_keeps_the_low_precision() -> None:
    model, x = network(), torch.randn(2, 3, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
    torch.testing.assert_close(out.float(), model(x), rtol=0.05, atol=0.05)
    gradient = dict(model.named_parameters())["0.weight"].grad
    assert gradient is not None
    assert torch.equal(gradient[0], torch.zeros(3, 3, 3))


def test_compiles_as_one_graph_with_gradients() -> None:
    model, x = network(), torch.randn(2, 3, 4, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(x)
    assert torch.equal(compiled(x), expected)
    compiled(x).sum().backward()
    gradient = dict(model.named_parameters())["0.weight"].grad
    assert gradient is not None
    compiled_gradient = gradient.clone()
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(dict(model.named_parameters())["0.weight"].grad, compiled_gradient)


def test_export_and_functional_call_use_the_users_names() -> None:
    model, x = network().eval(), torch.randn(2, 3, 4, 4)
    program = torch.export.export(model, (x,))
    assert torch.equal(program.module()(x), model(x))
    assert "0.weight" in program.state_dict
    ones = {"0.weight": torch.ones(4, 3, 3, 3)}
    out = torch.func.functional_call(model, ones, (x,))
    with torch.no_grad():
        dict(model.named_parameters())["0.weight"].fill_(1)
    assert torch.equal(model(x), out)


def test_data_parallel_training_in_one_process() -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29517")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    try:
        model = network()
        plain = copy.deepcopy(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        other = torch.optim.SGD(plain.parameters(), lr=0.1)
        x = torch.randn(2, 3, 4, 4)
        for module, own in ((wrapped, optimizer), (plain, other)):
            module(x).square().sum().backward()
            own.step()
        np.testing.assert_array_equal(model[0].weight.detach().numpy(), plain[0].weight.detach().numpy())
        assert "module.0.weight" in dict(wrapped.named_parameters())
    finally:
        torch.distributed.destroy_process_group()
