"""What every quantizer of training owes its model: states, copies, compilation, autocast, errors before a change."""

import copy
import math

import pytest
import torch

from dwindle.config.errors import ConfigError
from dwindle.quantization import NumberFormat, fake_quantize
from dwindle.quantization.quantizers import METHODS, LsqQuantizer, make_quantizer
from dwindle.quantization.quantizers.range_search import squared_error

CASES = [(method, activation) for method in METHODS for activation in (False, True)]
RANGED = [case for case in CASES if case[0] != "dorefa"]


def build(method, activation, per_channel=True, started=True):
    """A quantizer with a range, and a tensor for it: activations uint8, weights int4 per channel."""
    torch.manual_seed(4)
    axis = 0 if per_channel and not activation and method != "dorefa" else None
    form = NumberFormat.parse("uint8" if activation else "int4")
    quantizer = make_quantizer(method, form, axis, activation=activation)
    value = torch.randn(6, 3, 4, 4).relu() if activation else torch.randn(6, 3, 3, 3) * 0.1
    if started:
        start(quantizer, value)
    return quantizer, value


def start(quantizer, value):
    edges = (value.amin((1, 2, 3)), value.amax((1, 2, 3))) if quantizer.axis == 0 else value.aminmax()
    quantizer.initialize(*edges, value)


def outcome(quantizer, value, flow):
    quantizer.zero_grad()
    held = value.clone().requires_grad_()
    rounded = quantizer(held)
    rounded.backward(flow)
    return [rounded.detach(), held.grad, *(p.grad for p in quantizer.parameters() if p.requires_grad)]


@pytest.mark.parametrize(("method", "activation"), CASES)
def test_state_and_copies(method, activation):
    quantizer, value = build(method, activation)
    quantizer.eval()
    expected = quantizer(value)
    assert torch.equal(copy.deepcopy(quantizer)(value), expected)
    fresh, _ = build(method, activation, started=False)
    held = list(fresh.parameters())
    fresh.load_state_dict(quantizer.state_dict())
    assert all(now is before for now, before in zip(fresh.parameters(), held, strict=True))
    fresh.eval()
    assert torch.equal(fresh(value), expected)


@pytest.mark.parametrize(("method", "activation"), CASES)
def test_evaluation_is_what_integer_kernels_get(method, activation):
    quantizer, value = build(method, activation)
    optimizer = torch.optim.SGD(
        [p for p in quantizer.parameters() if p.requires_grad] or [torch.zeros(1)], lr=0.05
    )
    for _ in range(3):
        quantizer(value * 1.3).square().sum().backward() if list(quantizer.parameters()) else quantizer(value)
        optimizer.step()
        optimizer.zero_grad()
    quantizer.eval()
    rounded = quantizer(value)
    scale, zero = quantizer.scale_and_zero_point()
    assert (scale.dtype, zero.dtype) == (torch.float32, torch.int32)
    assert scale.shape == zero.shape
    assert not scale.requires_grad
    source = rounded if method == "dorefa" else value
    assert torch.equal(fake_quantize(source, scale, zero, quantizer.form, quantizer.axis), rounded)
    assert not quantizer(torch.zeros_like(value)).any()


@pytest.mark.parametrize(
    ("method", "activation"), [("lsq", False), ("qat", True), ("asymmetric_range", True), ("dorefa", False)]
)
def test_compiled_whole(method, activation):
    quantizer, value = build(method, activation)
    flow = torch.randn_like(value)
    quantizer.train()
    other = copy.deepcopy(quantizer)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    expected = outcome(quantizer, value, flow)
    held = value.clone().requires_grad_()
    rounded = compiled(held)
    rounded.backward(flow)
    got = [rounded.detach(), held.grad, *(p.grad for p in other.parameters() if p.requires_grad)]
    for first, second in zip(got, expected, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    for name, buffer in quantizer.named_buffers():
        torch.testing.assert_close(dict(other.named_buffers())[name], buffer)


@pytest.mark.parametrize(("method", "activation"), CASES)
def test_autocast(method, activation):
    quantizer, value = build(method, activation)
    quantizer.eval()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = quantizer(value)
        half = quantizer(value.bfloat16().requires_grad_())
        half.sum().backward()
    assert torch.equal(rounded, quantizer(value))
    assert half.dtype == torch.bfloat16
    for parameter in quantizer.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


@pytest.mark.parametrize(("method", "activation"), RANGED)
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_broken_ranges_change_nothing(method, activation, broken):
    quantizer, value = build(method, activation)
    before = copy.deepcopy(quantizer.state_dict())
    edges = torch.full((6,) if quantizer.axis == 0 else (), broken)
    with pytest.raises(ConfigError, match="NaN or infinity"):
        quantizer.initialize(-edges, edges)
    with pytest.raises(ConfigError, match="low edge above"):
        quantizer.initialize(torch.ones_like(edges), -torch.ones_like(edges))
    with pytest.raises(ConfigError, match="both sides"):
        quantizer.initialize(torch.zeros(2), torch.ones(3))
    for name, tensor in quantizer.state_dict().items():
        assert torch.equal(tensor, before[name])
    with pytest.raises(ConfigError, match="no range yet"):
        build(method, activation, started=False)[0](value)


@pytest.mark.parametrize("method", ["lsq", "lsq_plus", "tqt"])
def test_broken_or_empty_first_tensors_are_refused(method):
    quantizer, value = build(method, False)
    value[0, 0, 0, 0] = math.nan
    edges = -torch.ones(6), torch.ones(6)
    with pytest.raises(ConfigError, match="NaN or infinity"):
        quantizer.initialize(*edges, value)
    with pytest.raises(ConfigError, match="is empty"):
        quantizer.initialize(*edges, torch.empty(6, 0))


@pytest.mark.parametrize(("method", "activation"), CASES)
def test_constant_and_zero_tensors(method, activation):
    for size in (0.0, 0.3):
        quantizer, value = build(method, activation, started=False)
        value = torch.full_like(value, size)
        start(quantizer, value)
        got = outcome(quantizer, value, torch.ones_like(value))
        assert all(tensor.isfinite().all() for tensor in got if tensor is not None)
        scale, _ = quantizer.scale_and_zero_point()
        assert (scale > 0).all()
        if size == 0:
            assert not got[0].any()


@pytest.mark.parametrize("method", [method for method, activation in RANGED if not activation])
def test_channel_of_zeros_learns_like_the_others(method):
    quantizer, value = build(method, False, started=False)
    value[2] = 0
    start(quantizer, value)
    scale, _ = quantizer.scale_and_zero_point()
    others = torch.cat([scale[:2], scale[3:]])
    assert scale.isfinite().all()
    if method not in ("qat", "pact"):  # these cover weights as they are, at each step
        assert others.min() <= scale[2] <= others.max()
    assert not quantizer(value)[2].any()


def test_negative_and_vanishing_steps_stay_safe():
    quantizer, value = build("lsq", False)
    expected = quantizer(value)
    with torch.no_grad():
        quantizer.scale.neg_()
    assert torch.equal(quantizer(value), expected)
    with torch.no_grad():
        quantizer.scale.zero_()
    assert quantizer(value).isfinite().all()


def test_unknown_methods_are_named():
    with pytest.raises(ConfigError, match="lsq_plus"):
        make_quantizer("lsqq", NumberFormat.parse("int8"), activation=False)


def test_optimizer_made_before_the_start_holds_the_parameters():
    quantizer = LsqQuantizer(NumberFormat.parse("int4"))
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    value = torch.randn(64)
    quantizer.initialize(value.min(), value.max(), value)
    before = quantizer.scale.detach().clone()
    (quantizer(value) - value).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, quantizer.scale)


@pytest.mark.parametrize("method", ["lsq", "lsq_plus", "tqt", "symmetric_range", "asymmetric_range"])
def test_learning_finds_the_range_of_least_error(method):
    torch.manual_seed(0)
    value = torch.randn(2000).abs()
    form = NumberFormat.parse("uint4")
    options = {"power_of_two": False} if method == "tqt" else {}
    quantizer = make_quantizer(method, form, activation=True, **options)
    quantizer.initialize(torch.tensor(0.0), 4 * value.max())  # far too wide
    learned = [parameter for parameter in quantizer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam([{"params": [p], "lr": 0.02 * max(p.abs().item(), 0.5)} for p in learned])
    for _ in range(150):
        optimizer.zero_grad()
        loss = (quantizer(value) - value).square().mean()
        loss.backward()
        optimizer.step()
    highs = torch.linspace(0.05, 1, 96) * value.max()
    errors = squared_error(value.expand(96, -1), torch.zeros(96), highs, form)
    assert loss.item() < 1.1 * errors.min().item()
