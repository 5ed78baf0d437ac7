"""NNI's distillers under their names, and its test of fusion compression."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn

from compat.nni_loops import batches, padded, train, training_step
from dwindle import simulate
from dwindle.compat.nni.compression import TorchEvaluator
from dwindle.compat.nni.compression.utils import auto_set_denpendency_group_ids
from dwindle.compat.nni.contrib.compression.distillation import (
    Adaptive1dLayerwiseDistiller,
    DynamicLayerwiseDistiller,
)
from dwindle.compat.nni.contrib.compression.pruning import L1NormPruner, TaylorPruner
from dwindle.compat.nni.contrib.compression.quantization import LsqQuantizer, PtqQuantizer, QATQuantizer
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.quantization import is_quantized
from pruning.models import Simple

DIGITS = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))

# The configs of NNI's test assets.
DISTILLATION = [
    {"op_types": ["Linear"], "lambda": 0.75},
    {"op_names": ["conv1", "conv2", "conv3"], "lambda": 0.75},
]
PRUNING = [
    {"op_types": ["Linear"], "exclude_op_names": ["fc2"], "sparse_ratio": 0.75, "granularity": "out_channel"},
    {"op_names": ["conv1", "conv2", "conv3"], "sparse_ratio": 0.75, "granularity": "out_channel"},
]
QUANTIZATION = [
    {"op_names": ["fc1", "fc2"], "quant_dtype": "int8"},
    {
        "op_names": ["conv1", "conv2", "conv3"],
        "quant_dtype": "int8",
        "fuse_names": [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")],
    },
]


def digits() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(x[:, :1], y) for x, y in batches()]


def digits_step(batch: Any, model: nn.Module) -> torch.Tensor:
    return nn.functional.nll_loss(model(batch[0][:, :1]), batch[1])


def teacher_predict(batch: Any, model: nn.Module) -> torch.Tensor:
    return model(batch[0][:, :1])


def simple(seed: int) -> Simple:
    torch.manual_seed(seed)
    return Simple()


def evaluator_of(model: nn.Module) -> TorchEvaluator:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    return TorchEvaluator(train, optimizer, digits_step, scheduler, dummy_input=DIGITS)


def test_fusion_compress() -> None:
    """NNI's ``test_fusion_compress.py``: 100 steps, only the imports (and the size of the images) are others."""
    model, teacher_model = simple(0), simple(1)
    evaluator = evaluator_of(model)
    before = copy.deepcopy(teacher_model.state_dict())

    distiller = DynamicLayerwiseDistiller(model, DISTILLATION, evaluator, teacher_model, teacher_predict)
    config_list = auto_set_denpendency_group_ids(model, PRUNING, DIGITS)
    pruner = TaylorPruner.from_compressor(distiller, config_list, 10)
    quantizer = LsqQuantizer.from_compressor(pruner, QUANTIZATION)
    compressed, calibration = quantizer.compress(100, None)

    assert compressed is model
    assert evaluator.steps == 100
    assert quantizer.fused_compressors == (distiller, pruner)
    assert (distiller.inner.steps, distiller.inner.attached) == (100, False)
    masks = pruner.get_masks()
    for name in ("conv1", "conv2", "conv3", "fc1"):
        assert float((masks[name]["weight"] == 0).double().mean()) == 0.75
        weight = model.get_submodule(name).weight.detach()  # type: ignore[union-attr, operator]
        assert bool((weight[masks[name]["weight"] == 0] == 0).all())
    assert set(calibration) == {"conv1", "conv2", "conv3", "fc1", "fc2"}
    assert all(torch.isfinite(own["weight"]["scale"]).all() for own in calibration.values())
    assert all(torch.equal(own, before[name]) for name, own in teacher_model.state_dict().items())
    model.eval()
    integer = quantizer.integer_model()
    assert is_quantized(integer)
    with torch.no_grad():
        agree = (integer(DIGITS).argmax(1) == model(DIGITS).argmax(1)).double().mean()
    assert float(agree) >= 0.875
    assert len(evaluator.optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", [DynamicLayerwiseDistiller, Adaptive1dLayerwiseDistiller])
def test_distillers(kind: Any) -> None:
    """NNI's ``test_distiller.py``, with what it does not assert."""
    model, teacher_model = simple(0), simple(1)
    losses: list[float] = []

    def loop(model: nn.Module, optimizer: Any, step: Any, *_: Any) -> None:
        for batch in digits() * 4:
            loss = step(batch, model)
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    evaluator = TorchEvaluator(loop, torch.optim.Adam(model.parameters(), lr=1e-3), digits_step)
    distiller = kind(model, DISTILLATION, evaluator, teacher_model, teacher_predict, origin_loss_lambda=0.0)
    if kind is Adaptive1dLayerwiseDistiller:
        with pytest.raises(DwindleError, match="track_forward"):
            distiller.compress(2, None)
        distiller.track_forward(DIGITS)
    assert distiller.compress(24, None) is model
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])  # the task's loss counts nothing


def test_the_loss_is_nnis() -> None:
    model, teacher_model = simple(0), simple(1)
    seen: list[float] = []

    def loop(model: nn.Module, optimizer: Any, step: Any, *_: Any) -> None:
        seen.append(float(step(digits()[0], model).detach()))
        optimizer.step()

    evaluator = TorchEvaluator(loop, torch.optim.SGD(model.parameters(), lr=0.1), digits_step)
    config = [{"op_names": ["conv1"], "lambda": 0.5}, {"op_names": ["fc2"], "apply_method": "kl"}]
    calls: list[Any] = []

    def predict(batch: Any, teacher: nn.Module) -> torch.Tensor:
        calls.append(batch)
        return teacher_predict(batch, teacher)

    reference = copy.deepcopy(model).train()
    DynamicLayerwiseDistiller(model, config, evaluator, teacher_model, predict, 0.3).compress(1, None)
    x, y = digits()[0]
    kept: dict[str, list[torch.Tensor]] = {}
    for network in (reference, teacher_model.eval()):
        for name in ("conv1", "fc2"):
            network.get_submodule(name).register_forward_hook(
                lambda own, args, output, name=name: kept.setdefault(name, []).append(output.detach())
            )
    task = nn.functional.nll_loss(reference(x), y)
    teacher_model(x)
    student, teacher = ((own / 2) for own in kept["fc2"])
    divergence = nn.functional.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean") * 4
    expected = 0.3 * task + 0.5 * nn.functional.mse_loss(*kept["conv1"]) + divergence
    assert seen == pytest.approx([float(expected.detach())], rel=1e-5)
    assert len(calls) == 1


def test_signatures_and_errors() -> None:
    names = "model config_list evaluator teacher_model teacher_predict origin_loss_lambda existed_wrappers"
    for kind in (DynamicLayerwiseDistiller, Adaptive1dLayerwiseDistiller):
        assert list(inspect.signature(kind).parameters) == names.split()
    model, teacher = simple(0), simple(1)
    evaluator = evaluator_of(model)
    pruner = TaylorPruner(model, PRUNING, evaluator, 3)
    chained = DynamicLayerwiseDistiller.from_compressor(pruner, DISTILLATION, teacher, teacher_predict, 0.5)
    assert (chained.teacher_model, chained.origin_loss_lambda, chained.evaluator) == (teacher, 0.5, evaluator)
    assert QATQuantizer.from_compressor(chained, QUANTIZATION, 7).start_step == 7
    with pytest.raises(ConfigError, match="training_steps, evaluator, got 3 values"):
        TaylorPruner.from_compressor(chained, PRUNING, 3, evaluator, 4)
    with pytest.raises(ConfigError, match="did you mean 'training_steps'"):
        TaylorPruner.from_compressor(chained, PRUNING, training_step=3)
    with pytest.raises(ConfigError, match="'training_steps' is given twice"):
        TaylorPruner.from_compressor(chained, PRUNING, 3, training_steps=3)
    with pytest.raises(ConfigError, match="needs a pruner, quantizer or distiller"):
        TaylorPruner.from_compressor(model, PRUNING, 3)
    with pytest.raises(ConfigError, match="teacher_predict must be a function"):
        DynamicLayerwiseDistiller(model, DISTILLATION, evaluator, teacher, None)  # type: ignore[arg-type]
    assert not simulate.simulated_targets(model)


def test_a_chain_that_fails_leaves_nothing_on_the_model() -> None:
    model = padded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    evaluator = TorchEvaluator(train, optimizer, training_step)
    teacher = padded(1)
    distiller = DynamicLayerwiseDistiller(
        model, [{"op_names": ["fc"]}], evaluator, teacher, lambda batch, own: own(batch[0])
    )
    pruner = TaylorPruner.from_compressor(distiller, [{"op_names": ["conv1"], "sparse_ratio": 0.5}], 9)
    with pytest.raises(ConfigError, match="ended after 3 steps"):
        pruner.compress(3, None)
    assert not simulate.simulated_targets(model)
    assert not any(own._forward_hooks or own._forward_pre_hooks for own in model.modules())
    assert len(optimizer.param_groups) == 1


def test_masks_then_quantization_after_training() -> None:
    model = padded()
    evaluator = TorchEvaluator(train, torch.optim.SGD(model.parameters(), lr=0.05), training_step)
    pruner = L1NormPruner(model, [{"op_names": ["conv1"], "sparse_ratio": 0.5}], evaluator)
    quantizer = PtqQuantizer.from_compressor(pruner, [{"op_names": ["conv1", "fc"], "quant_dtype": "int8"}])
    _, calibration = quantizer.compress(4, None)
    assert set(calibration) == {"conv1", "fc"}
    mask = pruner.get_masks()["conv1"]["weight"]
    assert float((mask == 0).double().mean()) == 0.5
