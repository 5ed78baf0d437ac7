"""The examples of NNI 2.x's quantizer documentation, as they stand there, with only the import changed.

``docs/en_US/Compression/Quantizer.rst``, ``QuickStart.rst`` and ``Tutorial.rst`` of 2.0 to 2.6, the quick start and the
example scripts of 2.7 to 2.10. What stands around them in the documents (models, a loop) is small here.
"""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.optimizer import _global_optimizer_pre_hooks

from dwindle import simulate
from dwindle.compat import nni
from dwindle.quantization.aware_training import bank_of

pytestmark = pytest.mark.filterwarnings("ignore:config_list has the form of NNI 2.x")


class Mnist(nn.Module):
    """The documents' ``NaiveModel``, narrower: two convolutions and two linear layers with ReLU6 between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(1, 4, 5), nn.ReLU6()
        self.conv2, self.relu2 = nn.Conv2d(4, 6, 5), nn.ReLU6()
        self.fc1, self.relu3 = nn.Linear(6, 10), nn.ReLU6()
        self.fc2 = nn.Linear(10, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(self.relu1(self.conv1(x)), 2)
        x = functional.max_pool2d(self.relu2(self.conv2(x)), 2)
        x = self.relu3(self.fc1(x.flatten(1)))
        return functional.log_softmax(self.fc2(x), dim=1)


def mnist() -> Mnist:
    torch.manual_seed(0)
    return Mnist()


def digits(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    labels = [torch.randint(0, 10, (8,), generator=generator) for _ in range(count)]
    return [(torch.randn(8, 1, 16, 16, generator=generator) + y[:, None, None, None] / 5, y) for y in labels]


def trainer(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Any, steps: int = 4) -> None:
    model.train()
    for data, target in digits(steps):
        optimizer.zero_grad()
        criterion(model(data), target).backward()
        optimizer.step()


def watched(model: nn.Module) -> list[tuple[bool, bool]]:
    """For each training forward, whether weights and whether activations are rounded in it."""
    seen: list[tuple[bool, bool]] = []

    def look(module: nn.Module, args: Any) -> None:
        bank = bank_of(model)
        if model.training and bank is not None:
            seen.append((bank.rounds_weights, bank.rounds_activations))

    model.conv2.register_forward_pre_hook(look)  # type: ignore[union-attr, operator]
    return seen


def levels(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return weight / scale.reshape(-1, *[1] * (weight.dim() - 1))


def test_naive() -> None:
    model = mnist()
    before = copy.deepcopy(model.state_dict())

    model = nni.algorithms.compression.pytorch.quantization.NaiveQuantizer(model).compress()

    for name in ("conv1", "conv2", "fc1", "fc2"):
        weight, old = model.state_dict()[f"{name}.weight"], before[f"{name}.weight"]
        scale = old.abs().max() / 127
        torch.testing.assert_close(weight, (old / scale).round() * scale)
        assert not torch.equal(weight, old)
        assert torch.equal(model.state_dict()[f"{name}.bias"], before[f"{name}.bias"])


def test_qat_with_a_start_step() -> None:
    """No optimizer and no example input: both are found when the training begins. 7,000 steps are counted to there."""
    from dwindle.compat.nni.algorithms.compression.pytorch.quantization import QAT_Quantizer

    model = mnist()

    config_list = [{
        'quant_types': ['weight'],
        'quant_bits': {
            'weight': 8,
        }, # you can just use `int` here because all `quan_types` share same bits length, see config for `ReLu6` below.
        'op_types':['Conv2d', 'Linear']
    }, {
        'quant_types': ['output'],
        'quant_bits': 8,
        'quant_start_step': 7000,
        'op_types':['ReLU6']
    }]  # fmt: skip
    quantizer = QAT_Quantizer(model, config_list)
    quantizer.compress()

    plain, seen = mnist(), watched(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    assert (quantizer.stages.weights, quantizer.stages.activations) == (0, 7000)
    trainer(model, optimizer, functional.nll_loss, 1)
    assert seen == [(True, False)]  # the very first forward rounds weights
    assert quantizer.own.steps == 1
    quantizer.own.steps = 6998  # as if they had been trained
    trainer(model, optimizer, functional.nll_loss, 4)
    assert seen[1:] == [(True, False), (True, False), (True, True), (True, True)]
    assert quantizer.own.steps == 7002
    calibration = quantizer.get_calibration_config()
    assert set(calibration) == {"conv1", "conv2", "fc1", "fc2", "relu1", "relu2", "relu3"}
    for name in ("relu1", "relu2", "relu3"):
        assert calibration[name]["_output_0"]["quant_dtype"] == "uint8"
        assert float(calibration[name]["_output_0"]["tracked_min"]) == 0
    assert all(calibration[name]["weight"]["quant_bits"] == 8 for name in ("conv1", "conv2", "fc1", "fc2"))
    integer, x = quantizer.integer_model(), digits(1)[0][0]
    for name in ("conv1", "fc2"):
        scale = calibration[name]["weight"]["scale"]
        found = levels(integer.get_parameter(f"{name}.weight").detach(), scale)
        assert float(found.abs().max()) <= 127.5
    with torch.no_grad():
        torch.testing.assert_close(integer(x), model.eval()(x), rtol=0.02, atol=0.02)
    assert not torch.equal(model.conv1.weight, plain.conv1.weight)


def test_dorefa_with_the_default_types() -> None:
    from dwindle.compat.nni.algorithms.compression.pytorch.quantization import DoReFaQuantizer

    model = mnist()

    config_list = [{
        'quant_types': ['weight'],
        'quant_bits': 8,
        'op_types': 'default'
    }]  # fmt: skip
    quantizer = DoReFaQuantizer(model, config_list)
    quantizer.compress()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.5)
    trainer(model, optimizer, functional.nll_loss)
    assert quantizer.own.steps == 4
    calibration = quantizer.get_calibration_config()
    assert {name for name, own in calibration.items() if "weight" in own} == {"conv1", "conv2", "fc1", "fc2"}
    assert all(own["weight"]["quant_bits"] == 8 for own in calibration.values() if "weight" in own)
    # between the first layer and the last weights go through the paper's tanh, so that the largest becomes 1
    weight = model.conv2.weight.detach().double()
    expected = torch.tanh(weight) / torch.tanh(weight).abs().max()
    integer = quantizer.integer_model()
    scale = calibration["conv2"]["weight"]["scale"].double()
    rounded = integer.get_parameter("conv2.weight").detach().double()
    assert float((rounded - expected).abs().max()) <= float(scale.max())


class VGG_Cifar10(nn.Module):
    """The documents' network for CIFAR-10, 32 times narrower: the same modules under the same names."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width, pooled in ((4, False), (4, True), (8, False), (8, True), (16, False), (16, True)):
            layers.append(nn.Conv2d(before, width, kernel_size=3, padding=1, bias=False))
            if pooled:
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            layers += [nn.BatchNorm2d(width, eps=1e-4), nn.Hardtanh(inplace=True)]
            before = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(16 * 4 * 4, 32, bias=False),
            nn.BatchNorm1d(32),
            nn.Hardtanh(inplace=True),
            nn.Linear(32, 32, bias=False),
            nn.BatchNorm1d(32),
            nn.Hardtanh(inplace=True),
            nn.Linear(32, num_classes),
            nn.BatchNorm1d(num_classes, affine=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


def test_bnn_with_two_entries() -> None:
    from dwindle.compat.nni.algorithms.compression.pytorch.quantization import BNNQuantizer

    torch.manual_seed(0)
    model = VGG_Cifar10(num_classes=10)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Hardtanh)]
    assert names == [f"features.{n}" for n in (2, 6, 9, 13, 16, 20)] + ["classifier.2", "classifier.5"]

    configure_list = [{
        'quant_bits': 1,
        'quant_types': ['weight'],
        'op_types': ['Conv2d', 'Linear'],
        'op_names': ['features.0', 'features.3', 'features.7', 'features.10', 'features.14', 'features.17',
                     'classifier.0', 'classifier.3']
    }, {
        'quant_bits': 1,
        'quant_types': ['output'],
        'op_types': ['Hardtanh'],
        'op_names': ['features.6', 'features.9', 'features.13', 'features.16', 'features.20', 'classifier.2',
                     'classifier.5']
    }]  # fmt: skip

    quantizer = BNNQuantizer(model, configure_list)
    model = quantizer.compress()

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    outputs: dict[str, set[float]] = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda own, args, output, name=name: outputs.__setitem__(name, set(output.unique().tolist()))
        )
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 3, 32, 32, generator=generator), torch.randint(0, 10, (8,), generator=generator)
    losses = []
    model.train()
    for _ in range(40):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert quantizer.own.steps == 40
    binary = set(configure_list[0]["op_names"])
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert (set(module.weight.detach().unique().tolist()) <= {-1.0, 1.0}) == (name in binary)
            stored = module._parameters["weight"]
            assert stored is not None
            assert name not in binary or float(stored.detach().abs().max()) <= 1.0  # clipped at each step
    for name in names:
        assert (outputs[name] <= {-1.0, 1.0}) == (name in configure_list[1]["op_names"])
    assert sum(losses[-10:]) < sum(losses[:10])
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_quick_start_with_types_and_schemes() -> None:
    from dwindle.compat.nni.algorithms.compression.pytorch.quantization import QAT_Quantizer

    model = mnist()

    config_list = [{
        'quant_types': ['weight', 'input'],
        'quant_bits': {
            'weight': 8,
            'input': 8,
        }, # you can just use `int` here because all `quan_types` share same bits length, see config for `ReLu6` below.
        'op_types':['Conv2d', 'Linear'],
        'quant_dtype': 'int',
        'quant_scheme': 'per_channel_symmetric'
    }, {
        'quant_types': ['output'],
        'quant_bits': 8,
        'quant_start_step': 7000,
        'op_types':['ReLU6'],
        'quant_dtype': 'uint',
        'quant_scheme': 'per_tensor_affine'
    }]  # fmt: skip
    with pytest.warns(UserWarning, match=r"several starts, \[0, 7000\]") as told:
        quantizer = QAT_Quantizer(model, config_list)
    said = [str(warning.message) for warning in told]
    assert any("input have one scale for all channels" in text for text in said)
    quantizer.compress()

    trainer(model, torch.optim.SGD(model.parameters(), lr=0.01), functional.nll_loss, 2)
    assert (quantizer.stages.weights, quantizer.stages.activations) == (0, 7000)
    calibration = quantizer.get_calibration_config()
    for name, channels in {"conv1": 4, "conv2": 6, "fc1": 10, "fc2": 10}.items():
        weight, inputs = calibration[name]["weight"], calibration[name]["_input_0"]
        assert (weight["quant_dtype"], weight["quant_scheme"], weight["scale"].numel()) == (
            "int8", "symmetric", channels,
        )  # fmt: skip
        assert (inputs["quant_dtype"], inputs["quant_scheme"]) == ("int8", "symmetric")
        assert float(inputs["zero_point"]) == 0


def test_the_tutorial_with_a_layer_each() -> None:
    from dwindle.compat.nni.algorithms.compression.pytorch.quantization import QAT_Quantizer

    model = mnist()

    config_list = [{
        'quant_types': ['weight'],
        'quant_bits': 8,
        'op_names': ['conv1']
    },
    {
        'quant_types': ['weight'],
        'quant_bits': 4,
        'quant_start_step': 0,
        'op_names': ['conv2']
    },
    {
        'quant_types': ['weight'],
        'quant_bits': 3,
        'op_names': ['fc1']
    },
    {
        'quant_types': ['weight'],
        'quant_bits': 2,
        'op_names': ['fc2']
    }]  # fmt: skip
    quantizer = QAT_Quantizer(model, config_list)
    quantizer.compress()

    trainer(model, torch.optim.SGD(model.parameters(), lr=0.01), functional.nll_loss)
    calibration = quantizer.get_calibration_config()
    integer = quantizer.integer_model()
    x = digits(1)[0][0]
    kept: dict[str, torch.Tensor] = {}
    for name in ("conv1", "conv2", "fc1", "fc2"):
        integer.get_submodule(name).register_forward_hook(
            lambda own, args, output, name=name: kept.__setitem__(name, output)
        )
    with torch.no_grad():
        integer(x)
    for name, bits in {"conv1": 8, "conv2": 4, "fc1": 3, "fc2": 2}.items():
        assert calibration[name]["weight"]["quant_bits"] == bits
        # the levels that the layer really computes with
        weight = model.get_parameter(f"{name}.weight").detach()
        scale = calibration[name]["weight"]["scale"]
        rounded = levels(weight, scale).round().clamp(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)
        assert len(rounded.unique()) <= 2**bits - 1
        assert torch.isfinite(kept[name]).all()


def test_the_quick_start_of_2_10(tmp_path: Path) -> None:
    model = mnist()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    criterion = functional.nll_loss

    config_list = [{
        'quant_types': ['input', 'weight'],
        'quant_bits': {'input': 8, 'weight': 8},
        'op_names': ['conv1']
    }, {
        'quant_types': ['output'],
        'quant_bits': {'output': 8},
        'op_names': ['relu1']
    }, {
        'quant_types': ['input', 'weight'],
        'quant_bits': {'input': 8, 'weight': 8},
        'op_names': ['conv2']
    }, {
        'quant_types': ['output'],
        'quant_bits': {'output': 8},
        'op_names': ['relu2']
    }]  # fmt: skip

    from dwindle.compat.nni.algorithms.compression.pytorch.quantization import QAT_Quantizer

    dummy_input = torch.rand(32, 1, 16, 16)
    quantizer = QAT_Quantizer(model, config_list, optimizer, dummy_input)
    quantizer.compress()
    for _ in range(3):
        trainer(model, optimizer, criterion)
    model_path = str(tmp_path / "mnist_model.pth")
    calibration_path = str(tmp_path / "mnist_calibration.pth")
    onnx_path = str(tmp_path / "mnist_model.onnx")
    calibration_config = quantizer.export_model(
        model_path, calibration_path, onnx_path, (1, 1, 16, 16), torch.device("cpu")
    )

    assert quantizer.own.steps == 12
    assert {name for name, own in calibration_config.items() if "weight" in own} == {"conv1", "conv2"}
    assert "relu1" in calibration_config
    assert calibration_config["relu1"]["_output_0"]["quant_dtype"] == "uint8"
    saved = torch.load(calibration_path, weights_only=True)
    assert set(saved) == set(calibration_config)
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_path, providers=["CPUExecutionProvider"])
    x = digits(1)[0][0][:1]
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model.eval()(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["LsqQuantizer", "DoReFaQuantizer"])
def test_the_examples_in_the_docstrings_of_2_10(name: str) -> None:
    from dwindle.compat.nni.algorithms.compression.pytorch import quantization

    model = mnist()
    config_list = [{'quant_types': ['weight', 'input'], 'quant_bits': {'weight': 8, 'input': 8}, 'op_types': ['Conv2d']}]  # fmt: skip  # noqa: E501
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    more = {"dummy_input": torch.rand(8, 1, 16, 16)} if name == "LsqQuantizer" else {}
    quantizer = getattr(quantization, name)(model, config_list, optimizer, **more)
    quantizer.compress()

    trainer(model, optimizer, functional.nll_loss)
    assert quantizer.own.steps == 4
    calibration = quantizer.get_calibration_config()
    assert {name for name, own in calibration.items() if "weight" in own} == {"conv1", "conv2"}
    assert len(optimizer.param_groups) == (2 if name == "LsqQuantizer" else 1)


def test_another_models_optimizer_is_not_followed_and_nothing_is_left_behind() -> None:
    from dwindle.compat.nni.algorithms.compression.pytorch.quantization import QAT_Quantizer

    before = len(_global_optimizer_pre_hooks)
    model, other = mnist(), mnist()
    quantizer = QAT_Quantizer(model, [{"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Linear"]}])
    quantizer.compress()
    with torch.no_grad():
        model(digits(1)[0][0])
    assert len(_global_optimizer_pre_hooks) == before + 1
    trainer(other, torch.optim.SGD(other.parameters(), 0.1), functional.nll_loss, 2)
    assert quantizer.own.steps == 0
    first, second = (torch.optim.SGD(model.parameters(), 0.1) for _ in range(2))
    trainer(model, first, functional.nll_loss, 3)
    trainer(model, second, functional.nll_loss, 2)
    assert quantizer.own.steps == 3  # those of the first that trained it
    assert len(_global_optimizer_pre_hooks) == before
    never = mnist()
    QAT_Quantizer(never, [{"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Linear"]}]).compress()
    with torch.no_grad():
        never(digits(1)[0][0])
    assert len(_global_optimizer_pre_hooks) == before + 1
    gone = weakref.ref(never)
    del never
    gc.collect()
    assert gone() is None
    assert len(_global_optimizer_pre_hooks) == before
    assert not simulate.simulated_targets(model)


def test_paths_that_something_else_began_to_import() -> None:
    """Packages are found below a package that is there already, and names that are nothing are told."""
    script = """
import dwindle.compat.nni.algorithms.compression, dwindle.compat.nni.contrib
from dwindle.compat import nni
print(nni.algorithms.compression.pytorch.quantization.NaiveQuantizer.__name__)
print(nni.contrib.compression.pruning.L1NormPruner.__name__, nni.compression.pytorch.speedup.v2.ModelSpeedup.__name__)
for owner in (nni, nni.algorithms.compression):
    try:
        owner.pytorhc
    except AttributeError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        "NaiveQuantizer",
        "L1NormPruner ModelSpeedup",
        "module 'dwindle.compat.nni' has no attribute 'pytorhc'",
        "module 'dwindle.compat.nni.algorithms.compression' has no attribute 'pytorhc'",
    ]
