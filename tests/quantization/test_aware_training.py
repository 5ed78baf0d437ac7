"""Quantization-aware training: places, stages, exact folding, and the integer model at the end."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import dwindle as dw
from dwindle import simulate
from dwindle.config.errors import ConfigError
from dwindle.quantization import Bits, NumberFormat, QuantizationStages, TrainingQuantizer
from dwindle.quantization.aware_training import bank_of
from dwindle.quantization.quantizers import METHODS, make_quantizer


class Net(nn.Module):
    """Convolutions with normalizations (one with negative factors), a sum, a transposed grouped one, a linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.up, self.norm3 = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), nn.BatchNorm2d(6)
        self.act, self.last = nn.ReLU6(inplace=True), nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.norm1(self.first(x)))
        x = x + self.norm2(self.second(x))
        x = self.act(self.norm3(self.up(x)))
        return self.last(x.mean((2, 3)))


def build(train=True):
    torch.manual_seed(3)
    model = Net()
    with torch.no_grad():
        for norm in (model.norm1, model.norm2, model.norm3):
            norm.weight.uniform_(-1.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
            norm.running_mean.uniform_(-0.3, 0.3)
            norm.running_var.uniform_(0.3, 2.0)
    return model.train(train), [torch.randn(8, 3, 6, 6) for _ in range(4)]


def train(model, quantizer, data, steps=4, rate=0.02):
    target = torch.arange(8) % 4
    with dw.compress(model, [quantizer]) as run:
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
        run.add_parameters_to(optimizer)
        for step in range(steps):
            loss = nn.functional.cross_entropy(model(data[step % len(data)]), target) + run.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step()
    return model.eval()


def noise(reference, other):
    """Return the ratio in dB of what tells samples apart in the reference and of the difference.

    What float sums leave (a few millionths of the values) is no difference.
    """
    error = (reference - other).double().square().sum()
    signal = (reference - reference.mean(0)).double().square().sum()
    least = (1e-6 * reference.double()).square().sum()
    return float(10 * torch.log10(signal / error)) if error > least else np.inf


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("method", list(METHODS))
def test_the_finished_model_is_the_trained_one(method, bits):
    model, data = build()
    quantizer = TrainingQuantizer(model, calibration_data=data[:2], method=method, bits=bits)
    train(model, quantizer, data)
    with torch.no_grad():
        trained = model(data[0])
        finished = quantizer.finish()(data[0])
        plain = quantizer.withdraw()(data[0])
    assert noise(trained, finished) > 45
    assert noise(plain, trained) < 45  # it does round


@pytest.mark.parametrize("granularity", ["default", None])
def test_one_scale_for_a_layer_is_rounded_as_the_folded_weight(granularity):
    model, data = build()
    config = [
        {
            "op_types": ["Conv2d"],
            "target_names": ["weight"],
            "quant_dtype": "int4",
            "granularity": granularity,
        }
    ]
    quantizer = TrainingQuantizer(model, config, calibration_data=data[:2])
    train(model, quantizer, data)
    finished = quantizer.finish()
    with torch.no_grad():
        assert noise(model(data[0]), finished(data[0])) > 45
    scales = finished.get_buffer("_dwindle_quantization_weight_scale")
    assert len(scales) == (8 + 8 if granularity else 1 + 1) + 3 + 4


def reference(model, x):
    """The first block in training mode at 4 bits, in float64 with NumPy: its rounded output."""
    weight = model.first.weight.detach().double().numpy()
    scale = np.abs(weight).max((1, 2, 3), keepdims=True) / 7
    rounded = np.clip(np.round(weight / scale), -7, 7) * scale
    low, high = float(x.min()), float(x.max())
    step = (high - low) / 255
    zero = round(-low / step)
    x = (np.clip(np.round(x.double().numpy() / step) + zero, 0, 255) - zero) * step
    wide = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(wide, (3, 3), (2, 3))
    y = np.einsum("ncxyij,ocij->noxy", windows, rounded)
    mean, variance = y.mean((0, 2, 3), keepdims=True), y.var((0, 2, 3), keepdims=True)
    gamma, beta = (
        own.detach().double().numpy().reshape(1, -1, 1, 1) for own in (model.norm1.weight, model.norm1.bias)
    )
    y = np.maximum((y - mean) / np.sqrt(variance + 1e-5) * gamma + beta, 0)
    step = y.max() / 15
    return np.clip(np.round(y / step), 0, 15) * step


def test_a_training_forward_against_numpy():
    model, data = build()
    bits = Bits(weights=4, activations=4, ends=4)
    config = [{"op_names": ["first"], "target_names": ["_input_0"], "quant_dtype": "uint8"}]
    quantizer = TrainingQuantizer(
        model, config, calibration_data=data[:1], bits=bits, backend="onnxruntime", options={"momentum": 1.0}
    )
    quantizer.attach()
    seen = []
    model.second.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(data[0])
    expected = reference(model, data[0])
    quantizer.withdraw()
    step = expected[expected > 0].min()
    difference = np.abs(seen[0].double().numpy() - expected)
    assert (difference > 1e-5).mean() < 2e-3  # in float32 an edge between two levels may be passed
    assert difference.max() < 1.01 * step


def test_weights_and_activations_wait_for_their_stage():
    model, data = build()
    plain = copy.deepcopy(model)
    stages = QuantizationStages(weights=2, activations=4, watch=2)
    quantizer = TrainingQuantizer(model, calibration_data=data[:1], method="lsq", bits=4, stages=stages)
    target = torch.arange(8) % 4
    differs = []
    with dw.compress(model, [quantizer]) as run:
        optimizer = torch.optim.SGD(model.parameters(), 0.02)
        run.add_parameters_to(optimizer)
        first = [own.clone() for own in quantizer.parameters()]
        for step in range(5):
            with simulate.disabled(model):
                plain.load_state_dict(model.state_dict())
            output = model(data[step % 4])
            differs.append(not torch.equal(plain(data[step % 4]), output))
            optimizer.zero_grad()
            nn.functional.cross_entropy(output, target).backward()
            assert all(own.grad is not None for own in quantizer.parameters())
            if step < 2:
                assert all(not own.grad.any() for own in quantizer.parameters())
            optimizer.step()
            run.step()
            if step == 1:
                assert [torch.equal(*pair) for pair in zip(quantizer.parameters(), first, strict=True)] == [
                    True
                ] * len(first)
            if step == 3:  # activations begin with what the last two steps showed them
                moved = [not torch.equal(*pair) for pair in zip(quantizer.parameters(), first, strict=True)]
                assert all(moved)
    assert differs == [False, False, True, True, True]


def test_watched_ranges_are_those_of_the_steps_before():
    model, data = build()
    stages = QuantizationStages(activations=3, watch=3)
    quantizer = TrainingQuantizer(model, calibration_data=data[:1], stages=stages)
    train(model, quantizer, data, steps=3, rate=0.0)
    bank = bank_of(model)
    number = bank.simulation.placement.inputs[next(key for key in bank.weight_of if key.module == "first")][
        0,
    ]
    low, high = data[0].min(), data[0].max()
    for batch in data[1:3]:
        low, high = low + 0.1 * (batch.min() - low), high + 0.1 * (batch.max() - high)
    assert torch.allclose(bank.activations[number].low, low)
    assert torch.allclose(bank.activations[number].high, high)


def test_frozen_ranges_and_normalizations():
    model, data = build()
    stages = QuantizationStages(freeze_ranges=1, freeze_normalization=2)
    quantizer = TrainingQuantizer(model, calibration_data=data[:1], stages=stages)
    quantizer.attach()
    bank, states = bank_of(model), []
    for step in range(4):
        model.train()
        model(10 * data[step])
        states.append((bank.activations[0].high.clone(), model.norm1.running_mean.clone()))
        quantizer.step()
    assert torch.equal(states[0][0], states[1][0])  # frozen from step 1 on
    assert torch.equal(states[1][0], states[2][0])
    assert not torch.equal(states[0][1], states[1][1])
    assert torch.equal(states[1][1], states[2][1])
    assert torch.equal(states[2][1], states[3][1])
    trained = model(data[0])  # frozen, a training forward is the one of evaluation
    assert torch.equal(trained, model.eval()(data[0]))


def test_gradients_pass_straight_through_inside_and_stop_outside():
    quantizer = make_quantizer("qat", NumberFormat.parse("uint4"), activation=True)
    quantizer.initialize(torch.tensor(0.0), torch.tensor(1.5))
    quantizer.eval()
    value = torch.tensor([-0.3, 0.02, 0.7, 1.52, 1.56, 9.0], requires_grad=True)
    quantizer(value).sum().backward()
    assert value.grad.tolist() == [0, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("bounds", [(0.0, float("inf")), (0.0, 6.0), (-1.0, 1.0)])
@pytest.mark.parametrize("size", [300, 400_000])
@pytest.mark.parametrize("method", list(METHODS))
def test_an_activation_function_and_its_quantizer_in_one(method, size, bounds):
    torch.manual_seed(1)
    value, flow = torch.randn(size) * 4, torch.randn(size)
    results = []
    for together in (True, False):
        quantizer = make_quantizer(method, NumberFormat.parse("uint4"), activation=True)
        quantizer.initialize(
            torch.tensor(max(bounds[0], -0.7)), torch.tensor(min(bounds[1], 5.0)), value[:300].clamp(*bounds)
        )
        held = value.clone().requires_grad_()
        output = (
            quantizer.behind(held, bounds) if together else quantizer(nn.functional.hardtanh(held, *bounds))
        )
        output.backward(flow)
        results.append([output.detach(), held.grad, *(own.grad for own in quantizer.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_masked_weights_stay_zero_and_surgery_keeps_the_quantizers():
    model, data = build(train=False)
    config = [{"op_names": ["first"], "sparse_ratio": 0.5}]
    pruner = dw.pruning.L1NormPruner(model, config, (data[0],))
    quantizer = TrainingQuantizer(model, calibration_data=data[:2], method="lsq", bits=4)
    pruner.compress()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    with dw.compress(model, [quantizer]) as run:
        run.add_parameters_to(optimizer)
        for batch in data:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
            run.step()
    model.eval()
    finished = quantizer.finish()
    assert float((finished.first.weight == 0).flatten(1).all(1).float().mean()) == 0.5
    with torch.no_grad():
        before = model(data[0])
        assert noise(before, finished(data[0])) > 45
    result = dw.realize(model, (data[0],), optimizer=optimizer)
    assert result.verification is not None
    assert model.first.weight.shape[0] == 4
    with torch.no_grad():
        assert noise(before, model(data[0])) > 25  # constants of cut channels are no longer rounded
        assert noise(model(data[0]), quantizer.finish()(data[0])) > 45
    optimizer.zero_grad()
    model.train()(data[1]).square().mean().backward()
    optimizer.step()


def test_attaching_and_withdrawing_leave_no_trace():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    ).eval()
    data = torch.randn(5, 3, 6, 6)
    expected, keys = model(data), list(model.state_dict())
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    quantizer = TrainingQuantizer(model, calibration_data=[data])
    quantizer.attach()
    assert len(model) == 5
    assert type(list(model)[-1]) is nn.Linear
    assert not torch.equal(model(data), expected)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(data), model(data))
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    plain.load_state_dict(simulate.plain_state_dict(model, keep_values=False))
    model.load_state_dict(plain.state_dict())  # a checkpoint of the plain model loads too
    quantizer.withdraw()
    assert type(model) is nn.Sequential
    assert list(model.state_dict()) == keys
    assert torch.equal(model(data), expected)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert bank_of(twin) is not None


def test_a_run_goes_on_from_its_state():
    def make():
        model, data = build()
        stages = QuantizationStages(activations=3, watch=2)
        return model, TrainingQuantizer(model, calibration_data=data[:1], method="lsq", stages=stages), data

    def some(model, quantizer, optimizer, batches):
        for batch in batches:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
            quantizer.step()

    model, quantizer, data = make()
    quantizer.attach()
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    some(model, quantizer, optimizer, data)
    half = copy.deepcopy((model.state_dict(), quantizer.state_dict()))
    some(model, quantizer, optimizer, data[:2])
    other, again, _ = make()
    again.attach()
    other.load_state_dict(half[0])
    again.load_state_dict(half[1])
    some(other, again, torch.optim.SGD(other.parameters(), 0.02), data[:2])
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("method", ["qat", "lsq", "dorefa"])
def test_compiled_whole(method):
    model, data = build()
    quantizer = TrainingQuantizer(model, calibration_data=data[:1], method=method, bits=4)
    quantizer.attach()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for own in (compiled, twin):
        own(data[0]).square().mean().backward()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(
        torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-6)
        for one, other in pairs
        if other.grad is not None
    )
    model.eval()
    assert torch.allclose(compiled(data[1]), twin.eval()(data[1]), atol=1e-5)


def test_gradients_are_rounded_with_gradient_bits():
    model, data = build()
    quantizer = TrainingQuantizer(model, calibration_data=data[:1], method="dorefa", bits=4, gradient_bits=2)
    quantizer.attach()
    model.eval()(data[0][:1]).backward(torch.tensor([[0.9, -0.3, 0.05, -0.6]]))
    # Of one sample the bias's gradient is the rounded one: levels -1, -1/3, 1/3 and 1 of the largest.
    levels = 3 * model.last.bias.grad / 0.9
    assert torch.allclose(levels, levels.round(), atol=1e-5)
    assert set(levels.abs().round().tolist()) <= {1.0, 3.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "lqs"}, "lsq"),
        ({"bits": 1}, "2 to 8"),
        ({"backend": "onnx"}, "onnxruntime"),
        ({"calibration_data": []}, "no batch"),
        (
            {"config_list": [{"op_types": ["Conv2d", "ConvTranspose2d", "Linear"], "quant_dtype": None}]},
            "no operation",
        ),
        (
            {"config_list": [{"op_names": ["last"], "target_names": ["weight"], "quant_dtype": "uint4"}]},
            "symmetric",
        ),
        ({"method": "dorefa", "options": {"momentun": 0.1}}, "momentun"),
    ],
)
def test_bad_arguments_change_nothing(arguments, message):
    model, data = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        TrainingQuantizer(model, **{"calibration_data": data[:1], **arguments})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_bad_data_leave_the_model_as_it_was():
    model, data = build()
    broken = data[0].clone()
    broken[0, 0, 0, 0] = torch.nan
    plain = model.eval()(data[1])
    with pytest.raises(ConfigError, match="NaN"):
        TrainingQuantizer(model, calibration_data=[broken])
    quantizer = TrainingQuantizer(model, calibration_data=[data[0] * torch.inf], method="lsq")
    with pytest.raises(ConfigError, match="finite"), dw.compress(model, [quantizer]):
        pass
    assert type(model) is Net
    assert torch.equal(model(data[1]), plain)
    good = TrainingQuantizer(model, calibration_data=data[:1])
    good.attach()
    with pytest.raises(ConfigError, match="already"):
        TrainingQuantizer(model, calibration_data=data[:1]).attach()
    with pytest.raises(ConfigError, match="withdraw"):
        dw.quantize(model, data[:1])
    good.withdraw()
    with pytest.raises(ConfigError, match="TrainingQuantizer"):
        dw.quantization.finish_training(model)


@pytest.mark.parametrize(
    "steps", [{"weights": -1}, {"watch": 0}, {"activations": 1.5}, {"freeze_ranges": "x"}]
)
def test_stages_are_whole_numbers(steps):
    with pytest.raises(ConfigError, match=next(iter(steps))):
        QuantizationStages(**steps)
