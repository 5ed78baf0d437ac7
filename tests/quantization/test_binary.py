"""Binary quantizers: forwards and gradients against float64 references of the papers, stages, errors."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dwindle as dw
from dwindle import simulate
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.quantization import (
    BinaryQuantizer,
    BinaryStages,
    BiRealQuantizer,
    BNNQuantizer,
    DoReFaBinaryQuantizer,
    XNORQuantizer,
)
from dwindle.quantization.quantizers import BinaryWeight, SignActivation, StepActivation
from dwindle.quantization.quantizers.binary_gradients import scaled_sign, sign, step
from dwindle.training import accuracy, fit
from dwindle.zoo import BatchLoader, digits

ALL = (BNNQuantizer, XNORQuantizer, DoReFaBinaryQuantizer, BiRealQuantizer)
CONFIG = [{"op_names": ["middle", "deep"], "quant_dtype": "int1"}]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(6), nn.ReLU()
        self.middle = nn.Conv2d(6, 8, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(8)
        self.deep, self.last = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.middle(self.relu(self.norm(self.first(x)))))
        return self.last(self.deep(x.mean((2, 3))))


def network(cls: type | None = None) -> Net:
    """A net; the signs of the first two methods need inputs of both signs."""
    torch.manual_seed(0)
    model = Net()
    if cls in (BNNQuantizer, BiRealQuantizer):
        model.relu = nn.Hardtanh()  # type: ignore[assignment]
    return model


def values(*shape: int) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    """Numbers with the corner cases in front, and a gradient; for torch and for NumPy."""
    generator = torch.Generator().manual_seed(3)
    value = torch.randn(shape, generator=generator, dtype=torch.float64)
    value.view(-1)[:7] = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, 1.0000001, -2.0], dtype=torch.float64)
    gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
    return value.requires_grad_(), gradient, value.detach().numpy().copy(), gradient.numpy()


def taken(output: Tensor, value: Tensor, gradient: Tensor) -> np.ndarray:
    (result,) = torch.autograd.grad(output, value, gradient)
    return result.numpy()


@pytest.mark.parametrize("kind", ["clipped", "polynomial", "identity"])
def test_sign_follows_its_paper(kind: str) -> None:
    value, gradient, v, g = values(4, 9)
    output = sign(value, kind)
    assert np.array_equal(output.detach().numpy(), np.where(v >= 0, 1.0, -1.0))
    slopes = {
        "clipped": np.where(np.abs(v) <= 1, 1.0, 0.0),
        # Bi-Real, equation 6: 2 + 2r from -1 to 0, 2 - 2r from 0 to 1.
        "polynomial": np.select([(v >= -1) & (v < 0), (v >= 0) & (v < 1)], [2 + 2 * v, 2 - 2 * v], 0.0),
        "identity": np.ones_like(v),
    }
    np.testing.assert_allclose(taken(output, value, gradient), g * slopes[kind], rtol=0, atol=1e-15)


def test_polynomial_slope_is_the_derivative_of_bi_reals_approximation() -> None:
    r = np.linspace(-1.4, 1.4, 41)  # misses the corners at -1, 0 and 1 but for 0

    def approximate(x: np.ndarray) -> np.ndarray:
        return np.select([x < -1, x < 0, x < 1], [-1.0 + 0 * x, 2 * x + x**2, 2 * x - x**2], 1.0)

    expected = (approximate(r + 1e-6) - approximate(r - 1e-6)) / 2e-6
    value = torch.tensor(r, requires_grad=True)
    np.testing.assert_allclose(
        taken(sign(value, "polynomial"), value, torch.ones(41).double()), expected, atol=1e-5
    )


@pytest.mark.parametrize("dims", [(1, 2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("kind", ["identity", "xnor", "magnitude"])
def test_scaled_sign_follows_its_paper(dims: tuple[int, ...], kind: str) -> None:
    value, gradient, v, g = values(5, 3, 2, 2)
    output = scaled_sign(value, dims, kind)
    mean = np.abs(v).mean(dims, keepdims=True)
    np.testing.assert_allclose(output.detach().numpy(), np.where(v >= 0, 1.0, -1.0) * mean, rtol=1e-7)
    scale = mean.astype(np.float32).astype(np.float64)
    inside = (np.abs(v) <= 1) * scale
    count = v.size // mean.size
    slope = {"identity": np.ones_like(v), "xnor": 1 / count + inside, "magnitude": inside}[kind]
    np.testing.assert_allclose(taken(output, value, gradient), g * slope, rtol=1e-13)


def test_scale_is_the_least_squares_one() -> None:
    weight = torch.randn(3, 50, dtype=torch.float64)
    scale = BinaryWeight("channel").scale_of(weight)
    signs = torch.where(weight >= 0, 1.0, -1.0).double()
    for row in range(3):
        best = torch.linalg.lstsq(signs[row][:, None], weight[row][:, None]).solution[0, 0]
        assert abs(float(best - scale[row])) < 1e-7


def test_step_follows_nncf() -> None:
    value, gradient, v, g = values(4, 3, 5, 2)
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)  # some values are exactly at the scale
    threshold = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64).reshape(3, 1, 1).requires_grad_()
    output = step(value, scale, threshold)
    out = np.where(v > threshold.detach().numpy() * 1.0, 1.0, 0.0)
    assert np.array_equal(output.detach().numpy(), out)
    to_value, to_scale, to_threshold = torch.autograd.grad(output, [value, scale, threshold], gradient)
    np.testing.assert_allclose(to_value.numpy(), g * ((v >= 0) & (v <= 1.0)), atol=1e-15)
    np.testing.assert_allclose(
        float(to_scale), (g * ((v <= 1.0) * (out - v) / 1.0 + (v > 1.0))).sum(), rtol=1e-12
    )
    expected = -(g * ((v > 0) & (v < 1.0))).sum((0, 2, 3))
    np.testing.assert_allclose(to_threshold.reshape(-1).numpy(), expected, rtol=1e-12)


def test_dorefa_activation_is_round_of_clip() -> None:
    value, gradient, v, g = values(6, 11)
    own = StepActivation(learned=False).double()
    own.start()
    output = own(value)
    assert np.array_equal(output.detach().numpy(), np.round(np.clip(v, 0, 1)))
    np.testing.assert_allclose(taken(output, value, gradient), g * ((v >= 0) & (v <= 1)), atol=1e-15)
    assert not list(own.parameters())


def test_learned_step_reaches_its_parameters_through_exp_and_sigmoid() -> None:
    own = StepActivation(3, -3).double()
    own.initialize(torch.zeros(()), torch.zeros(()), torch.linspace(-1, 2, 5000))
    assert float(own.level()) == pytest.approx(float(torch.linspace(-1, 2, 5000)[-5]))
    own.start()
    value, gradient, v, g = values(2, 3, 4, 4)
    own(value).backward(gradient)
    s, t = float(own.level()), 0.5
    out = np.where(v > t * s, s, 0.0)
    assert own.log_scale.grad is not None
    assert own.logit.grad is not None
    to_scale = (g * ((v <= s) * (out - v) / s + (v > s))).sum()
    np.testing.assert_allclose(float(own.log_scale.grad), to_scale * s, rtol=1e-12)
    to_threshold = -(g * ((v > 0) & (v < s))).sum((0, 2, 3))
    np.testing.assert_allclose(own.logit.grad.numpy(), to_threshold * t * (1 - t), rtol=1e-12)


def test_scale_and_zero_point_give_the_levels() -> None:
    weight = torch.randn(4, 7)
    own = BinaryWeight("channel")
    own.start()
    own.remember(weight)
    scale, zero = own.scale_and_zero_point()
    assert torch.equal(own(weight), torch.where(weight >= 0, 1.0, -1.0) * scale[:, None])
    assert not zero.any()
    steps = StepActivation(learned=False)
    assert steps.scale_and_zero_point()[0] == 1.0
    assert SignActivation().scale_and_zero_point()[0] == 1.0


def test_an_all_zero_channel_stays_zero() -> None:
    weight = torch.randn(3, 5)
    weight[1] = 0
    for kind in ("identity", "xnor", "magnitude"):
        output = scaled_sign(weight.requires_grad_(), (1,), kind)
        assert not output[1].any()
        (gradient,) = torch.autograd.grad(output, weight, torch.ones(3, 5))
        assert gradient.isfinite().all()


def run(
    quantizer: BinaryQuantizer, steps: int, optimizer: torch.optim.Optimizer | None = None, **more: Any
) -> None:
    model = quantizer.model
    generator = torch.Generator().manual_seed(2)
    with dw.compress(model, [quantizer]) as compression:
        own = optimizer or torch.optim.Adam(model.parameters(), lr=1e-2)
        compression.add_parameters_to(own)
        quantizer.follow(own, more.get("restart", True))
        for number in range(steps):
            x = torch.randn(8, 1, 6, 6, generator=generator)
            loss = functional.cross_entropy(model(x), (x.mean((1, 2, 3)) > 0).long()) + compression.loss()
            own.zero_grad()
            loss.backward()
            own.step()
            compression.step()
            if "watch" in more:
                more["watch"](number + 1)


def started(quantizer: BinaryQuantizer) -> set[str]:
    return {str(target) for target, own in quantizer.simulators.items() if own.started}


def test_stages_come_in_order() -> None:
    stages = BinaryStages(2, 4, 5, 9)
    quantizer = XNORQuantizer(network(), CONFIG, stages=stages)
    optimizer = torch.optim.SGD(quantizer.model.parameters(), lr=0.1, weight_decay=0.01)
    seen: dict[int, tuple[int, set[str], float, float]] = {}

    def watch(number: int) -> None:
        group = optimizer.param_groups[0]
        seen[number] = (quantizer.stage, started(quantizer), group["lr"], group["weight_decay"])

    run(quantizer, 9, optimizer, watch=watch)
    inputs = {"middle._input_0", "deep._input_0"}
    both = inputs | {"middle.weight", "deep.weight"}
    assert [seen[n][0] for n in range(1, 10)] == [1, 2, 2, 3, 4, 4, 4, 4, 4]
    assert [seen[n][1] for n in range(1, 6)] == [set(), inputs, inputs, both, both]
    assert [seen[n][2] for n in range(1, 10)] == pytest.approx(
        [0.1] * 5 + [0.1 * (1 - n / 4) ** 2.1 for n in range(1, 5)]
    )
    assert [seen[n][3] for n in range(1, 10)] == [0.01] * 4 + [0.0] * 5


@pytest.mark.parametrize("restart", [True, False])
def test_an_optimizer_that_follows_begins_anew_with_stages_two_and_three(restart: bool) -> None:
    quantizer = XNORQuantizer(network(), CONFIG, stages=BinaryStages(2, 5, 7, 9))
    optimizer = torch.optim.Adam(quantizer.model.parameters(), lr=1e-3)
    weight, counts = quantizer.model.get_parameter("first.weight"), []

    def watch(number: int) -> None:
        counts.append(int(optimizer.state[weight]["step"]) if weight in optimizer.state else 0)

    run(quantizer, 9, optimizer, watch=watch, restart=restart)
    assert counts == ([1, 0, 1, 2, 0, 1, 2, 3, 4] if restart else list(range(1, 10)))


def test_learned_scales_begin_at_the_inputs_of_the_step_before() -> None:
    quantizer = XNORQuantizer(network(), CONFIG, stages=BinaryStages(2, 3))
    inputs: list[Tensor] = []
    quantizer.model.middle.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].detach().clone())
    )
    own: list[float] = []

    def watch(number: int) -> None:
        if number == 2:
            own.append(float(simulator.level()))

    def simulators() -> StepActivation:
        found = quantizer.simulators[next(t for t in quantizer.targets if str(t) == "middle._input_0")]
        assert isinstance(found, StepActivation)
        return found

    quantizer.attach()
    simulator = simulators()
    run(quantizer, 3, watch=watch)
    # The hook stands before the quantizer's, so it sees what the step sees.
    expected = inputs[1].flatten().topk(max(inputs[1].numel() // 1000, 1)).values[-1]
    assert own[0] == pytest.approx(float(expected))


@pytest.mark.parametrize("cls", ALL)
def test_every_method_trains_on_two_values(cls: type[BinaryQuantizer]) -> None:
    model = network(cls)
    before = copy.deepcopy(model.state_dict())
    quantizer = cls(model, CONFIG, example_inputs=torch.randn(8, 1, 6, 6))  # type: ignore[call-arg]
    run(quantizer, 4)
    weight = model.middle.weight
    assert all(len(channel.unique()) == 2 for channel in weight.detach())
    seen: list[Tensor] = []
    model.middle.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.eval()(torch.randn(2, 1, 6, 6))
    assert len(seen[0].unique()) == 2
    for name in ("middle.weight", "deep.weight", "first.weight"):
        assert not torch.equal(before[name], model.state_dict()[name])
    if cls is BNNQuantizer:
        assert all(layer._parameters["weight"].abs().max() <= 1 for layer in (model.middle, model.deep))
    quantizer.withdraw()
    assert not simulate.simulated_targets(model)
    assert set(model.state_dict()) == set(before)


def test_bnn_keeps_numbers_behind_signs_between_minus_one_and_one() -> None:
    model = network(BNNQuantizer)
    with torch.no_grad():
        model.middle.weight.mul_(20)
    quantizer = BNNQuantizer(model, CONFIG)
    run(quantizer, 1)
    assert float(model.middle._parameters["weight"].detach().abs().max()) == 1.0


def test_outputs_of_hardtanh_as_in_nni() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Hardtanh(), nn.Linear(8, 2))
    config = [
        {"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int1"},
        {"op_types": ["Hardtanh"], "target_names": ["_output_0"], "quant_dtype": "int1"},
    ]
    BNNQuantizer(model, config).attach()
    assert set(model[:2](torch.randn(5, 6)).unique().tolist()) == {-1.0, 1.0}


def test_signs_behind_a_relu_are_warned_about() -> None:
    with pytest.warns(UserWarning, match=r"middle._input_0: these inputs are never negative"):
        run(BNNQuantizer(network(), CONFIG), 1)
    with pytest.warns(UserWarning, match=r"middle._input_0: these inputs are never negative"):
        run(BNNQuantizer(network(), CONFIG, stages=BinaryStages(2, 2)), 3)


def test_stops_with_what_waits() -> None:
    quantizer = XNORQuantizer(network(), CONFIG, stages=BinaryStages(1, 50))
    with pytest.warns(UserWarning, match="before middle.weight became binary"):
        run(quantizer, 2)


def test_model_state_brings_the_stage_along() -> None:
    quantizer = XNORQuantizer(network(), CONFIG, stages=BinaryStages(1, 2))
    run(quantizer, 3)
    x = torch.randn(3, 1, 6, 6)
    expected = quantizer.model.eval()(x)
    other = XNORQuantizer(network(), CONFIG, stages=BinaryStages(1, 2))
    other.attach()
    assert not started(other)
    other.model.load_state_dict(quantizer.model.state_dict())
    assert torch.equal(other.model.eval()(x), expected)
    assert torch.equal(copy.deepcopy(quantizer.model)(x), expected)


def test_a_run_can_be_resumed() -> None:
    def parts() -> tuple[XNORQuantizer, torch.optim.Optimizer]:
        quantizer = XNORQuantizer(network(), CONFIG, stages=BinaryStages(2, 3, 4, 8))
        return quantizer, torch.optim.SGD(quantizer.model.parameters(), lr=0.05)

    def steps(quantizer: XNORQuantizer, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            x = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(number))
            loss = quantizer.model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            quantizer.step()

    whole, optimizer = parts()
    with dw.compress(whole.model, [whole]) as compression:
        compression.add_parameters_to(optimizer)
        whole.follow(optimizer)
        steps(whole, optimizer, range(5))
        saved = copy.deepcopy((whole.model.state_dict(), optimizer.state_dict(), whole.state_dict()))
        steps(whole, optimizer, range(5, 7))
    second, optimizer = parts()
    with dw.compress(second.model, [second]) as compression:
        compression.add_parameters_to(optimizer)
        second.follow(optimizer)
        second.model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        second.load_state_dict(saved[2])
        steps(second, optimizer, range(5, 7))
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key]), key


@pytest.mark.parametrize("cls", [XNORQuantizer, BiRealQuantizer])
def test_compiles_to_one_graph_and_runs_under_autocast(cls: type[BinaryQuantizer]) -> None:
    model = network(cls)
    quantizer = cls(model, CONFIG, example_inputs=torch.randn(8, 1, 6, 6))  # type: ignore[call-arg]
    quantizer.attach()
    x = torch.randn(4, 1, 6, 6)

    def gradients(forward: Any) -> list[Tensor]:
        return list(torch.autograd.grad(forward(x).square().sum(), list(model.parameters())))

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled), gradients(model))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        assert output.dtype == torch.bfloat16
        output.float().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters()
    )


def test_errors_come_before_any_change() -> None:
    def refused(model: nn.Module, message: str, kind: type[Exception] = ConfigError, **options: Any) -> None:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(kind, match=message):
            XNORQuantizer(model, options.pop("config", CONFIG), **options).attach()
        assert not simulate.simulated_targets(model, "quantize")
        after = model.state_dict()
        assert all(
            torch.equal(
                after[key],
                value,
            )
            or value.isnan().any()
            for key, value in before.items()
        )
        assert list(after) == list(before)

    x = torch.randn(2, 1, 6, 6)
    refused(network(), "need example_inputs")
    broken = network()
    with torch.no_grad():
        broken.deep.weight[0, 0] = math.nan
    refused(broken, "deep.weight: a weight with NaN", example_inputs=x)
    refused(network(), "middle._input_0: a step needs inputs above zero", example_inputs=x * math.nan)
    silent = network()
    nn.init.constant_(silent.norm.bias, -100.0)
    refused(silent, "middle._input_0: a step needs inputs above zero", example_inputs=x)
    refused(network(), "not binary; 'int1' is", config=[{"op_names": ["deep"], "quant_dtype": "int8"}])
    refused(network(), "of a BatchNorm2d", config=[{"op_names": ["norm"], "quant_dtype": "int1"}])
    nothing = [{"op_names": ["deep"], "quant_dtype": None}]
    refused(network(), "no target is made binary", config=nothing)
    masked = network()
    masked_config = [{"op_names": ["deep"], "sparse_ratio": 0.5}]
    dw.pruning.L1NormPruner(masked, masked_config).compress()
    refused(masked, r"deep.weight has a mask", example_inputs=x)
    with pytest.raises(ConfigError, match=r"weights 'xnoor' is not one of .*did you mean 'xnor'"):
        BinaryQuantizer(network(), CONFIG, weights="xnoor")


def test_learned_steps_that_cannot_start_later_say_so() -> None:
    model = network()
    quantizer = XNORQuantizer(model, CONFIG, stages=BinaryStages(2, 3))
    nn.init.constant_(model.norm.bias, -100.0)
    with pytest.raises(DwindleError, match="a step needs inputs above zero"):
        run(quantizer, 3)
    assert not simulate.simulated_targets(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activations": 5, "weights": 3}, "before activations do"),
        ({"activations": -1}, "not a whole number"),
        ({"decay": 5}, "belong together"),
        ({"decay": 5, "end": 5}, "must lie between"),
        ({"weights": 6, "decay": 5, "end": 9}, "must lie between"),
        ({"power": 0}, "must be positive"),
    ],
)
def test_stages_out_of_order(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BinaryStages(**arguments)


def test_stages_over_a_run() -> None:
    stages = BinaryStages.over(100)
    assert (stages.activations, stages.weights, stages.decay, stages.end) == (20, 40, 70, 100)
    assert [stages.stage(step) for step in (0, 19, 20, 39, 40, 69, 70, 99)] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert stages.learning_rate_factor(85) == pytest.approx(0.5**2.1)
    assert stages.learning_rate_factor(120) == 0.0


@pytest.mark.slow
def test_four_stages_beat_at_once_on_digits() -> None:
    data = digits()

    def score(seed: int, staged: bool) -> float:
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU()]
        for _ in range(3):
            layers += [nn.Linear(48, 48, bias=False), nn.BatchNorm1d(48), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Linear(48, 10))
        loader = BatchLoader(data.train_images, data.train_labels, 64, shuffle=True, seed=seed)
        stages = BinaryStages.over(8 * len(loader))
        quantizer = DoReFaBinaryQuantizer(
            model,
            [{"op_names": ["4", "7", "10"], "quant_dtype": "int1"}],
            stages=stages if staged else BinaryStages(),
            example_inputs=data.train_images[:64],
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        # The same fall of the learning rate for both.
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, stages.learning_rate_factor)
        fit(model, loader, optimizer, epochs=8, compressors=[quantizer], schedule=schedule)
        assert all(own.started for own in quantizer.simulators.values())
        return accuracy(model.eval(), [(data.test_images, data.test_labels)])

    once, four = (sum(score(seed, staged) for seed in range(3)) / 3 for staged in (False, True))
    assert once > 0.85
    assert four > once
