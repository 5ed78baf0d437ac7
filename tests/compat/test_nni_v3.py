"""NNI 3.0's pruners: signatures, its test matrix, its documented examples, masked equals small."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn

from compat.nni_loops import DUMMY, batches, evaluate, padded, train, training_step
from dwindle import simulate
from dwindle.compat import nni
from dwindle.compat.nni import (
    AGPPruner,
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    LevelPruner,
    LinearPruner,
    ModelSpeedup,
    MovementPruner,
    SlimPruner,
    TaylorPruner,
    TorchEvaluator,
    auto_set_denpendency_group_ids,
)
from dwindle.config.errors import ConfigError
from pruning.models import Simple

#: Parameter names in NNI 3.0 (``self`` and ``existed_wrappers`` left out).
SIGNATURES = {
    "LevelPruner": "model config_list evaluator",
    "L1NormPruner": "model config_list evaluator",
    "L2NormPruner": "model config_list evaluator",
    "FPGMPruner": "model config_list evaluator",
    "SlimPruner": "model config_list evaluator training_steps regular_scale",
    "TaylorPruner": "model config_list evaluator training_steps",
    "MovementPruner": "model config_list evaluator warmup_step cooldown_begin_step regular_scale",
    "LinearPruner": "pruner interval_steps total_times evaluator",
    "AGPPruner": "pruner interval_steps total_times evaluator",
    "TorchEvaluator": "training_func optimizers training_step lr_schedulers dummy_input evaluating_func",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    names = [key for key in inspect.signature(getattr(nni, name)).parameters if key != "existed_wrappers"]
    assert names == SIGNATURES[name].split()


def test_names_have_nni_s_paths() -> None:
    from dwindle.compat.nni import compression
    from dwindle.compat.nni.compression import pruning, speedup, utils

    assert compression.TorchEvaluator is TorchEvaluator
    assert pruning.AGPPruner is AGPPruner
    assert speedup.ModelSpeedup is ModelSpeedup
    assert utils.auto_set_denpendency_group_ids is auto_set_denpendency_group_ids


# The matrix of NNI's own tests: every pruner, alone and under both schedules, on its test model.

CONFIG: list[dict[str, Any]] = [
    {"op_types": ["Linear"], "exclude_op_names": ["fc2"], "sparse_ratio": 0.75, "granularity": "out_channel"},
    {"op_names": ["conv1", "conv2", "conv3"], "sparse_ratio": 0.75, "granularity": "out_channel"},
]
DIGITS = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def digits_step(batch: Any, model: nn.Module) -> torch.Tensor:
    x, y = batch
    return nn.functional.nll_loss(model(x[:, :1]), y)


def make(kind: str, model: nn.Module, config: Any, evaluator: TorchEvaluator) -> Any:
    if kind == "slim":
        return SlimPruner(model, config, evaluator, training_steps=6)
    if kind == "taylor":
        return TaylorPruner(model, config, evaluator, training_steps=6)
    if kind == "movement":
        return MovementPruner(model, config, evaluator, warmup_step=2, cooldown_begin_step=8)
    return {"level": LevelPruner, "l1": L1NormPruner, "l2": L2NormPruner, "fpgm": FPGMPruner}[kind](
        model, config, evaluator
    )


MATRIX = [(kind, None) for kind in ("level", "l1", "l2", "fpgm", "slim", "taylor", "movement")]
MATRIX += [
    (kind, schedule)
    for kind in ("level", "l1", "l2", "fpgm", "slim", "taylor")
    for schedule in (LinearPruner, AGPPruner)
]


@pytest.mark.parametrize(("kind", "schedule"), MATRIX)
def test_matrix(kind: str, schedule: Any) -> None:
    torch.manual_seed(0)
    model = Simple()
    config = auto_set_denpendency_group_ids(model, CONFIG, DIGITS)
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01, momentum=0.9)
    groups = len(optimizer.param_groups)
    evaluator = TorchEvaluator(train, optimizer, digits_step, dummy_input=DIGITS)
    pruner = make(kind, model, config, evaluator)
    if schedule is not None:
        pruner = schedule(pruner, interval_steps=2, total_times=5)
        compressed, masks = pruner.compress(max_steps=10, max_epochs=None)
    elif kind == "movement":
        compressed, masks = pruner.compress(max_steps=10, max_epochs=None)
    else:
        compressed, masks = pruner.compress()
    assert compressed is model
    for name in ("conv1", "conv2", "conv3", "fc1"):
        assert float((masks[name]["weight"] == 0).double().mean()) == 0.75
        rows = (masks[name]["weight"].flatten(1).sum(1) != 0).float()
        assert torch.equal(masks[name]["bias"], rows)
    assert torch.equal(masks["conv2"]["bias"], masks["conv3"]["bias"])
    assert len(optimizer.param_groups) == groups
    assert not optimizer._optimizer_step_post_hooks
    pruner.unwrap_model()
    assert not simulate.simulated_targets(model)
    small = ModelSpeedup(model, DIGITS, masks).speedup_model()
    assert (small.conv1.out_channels, small.conv2.out_channels, small.conv3.out_channels) == (4, 8, 8)
    assert small.fc1.out_features == 25
    assert small(DIGITS).shape == (4, 10)


def test_one_shot_example_ends_in_a_small_model_that_is_proven() -> None:
    """NNI's norm pruning example: config, groups, pruner, unwrap, speedup, fine-tuning."""
    for kind in (L1NormPruner, L2NormPruner, FPGMPruner):
        model = padded()
        config = auto_set_denpendency_group_ids(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], DUMMY)
        pruner = kind(model, config)
        _, masks = pruner.compress()
        pruner.unwrap_model()
        speedup = ModelSpeedup(model, DUMMY, masks)
        model = speedup.speedup_model()
        assert (model.conv1.out_channels, model.conv2.out_channels, model.fc.in_features) == (4, 6, 6)
        assert speedup.result is not None
        assert speedup.result.verification is not None
        assert speedup.result.verification.max_difference < 1e-9
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), training_step, None, None, 1)
        assert evaluate(model) >= 0


def test_speedup_without_groups_masks_what_is_behind_a_masked_channel() -> None:
    """The norm's shift of a masked channel is not left in the way, although its convolution is padded."""
    model = padded().eval()
    _, masks = L1NormPruner(model, [{"op_names": ["conv1"], "sparse_ratio": 0.5}]).compress()
    reference = copy.deepcopy(model)
    speedup = ModelSpeedup(model, DUMMY, masks)
    small = speedup.speedup_model()
    assert small.conv1.out_channels == small.conv2.in_channels == 4
    gone = masks["conv1"]["bias"] == 0
    with torch.no_grad():
        reference.bn1.weight[gone] = 0
        reference.bn1.bias[gone] = 0
    assert torch.allclose(small(DUMMY), reference(DUMMY), atol=1e-6)
    # conv2 and conv3 are added: masking conv2 alone cannot remove a channel of the sum
    model = padded()
    _, masks = L1NormPruner(model, [{"op_names": ["conv2"], "sparse_ratio": 0.5}]).compress()
    assert ModelSpeedup(model, DUMMY, masks).speedup_model().fc.in_features == 12


def test_masks_from_a_file_keywords_and_what_is_not_supported(tmp_path: Any) -> None:
    model = padded()
    _, masks = L1NormPruner(model, [{"op_names": ["conv1"], "sparse_ratio": 0.5}]).compress()
    torch.save(masks, tmp_path / "masks.pth")
    plain = padded()
    small = ModelSpeedup(
        plain, {"x": DUMMY}, masks_file=str(tmp_path / "masks.pth"), batch_size=2
    ).speedup_model()
    assert small.conv1.out_channels == 4
    with pytest.raises(ConfigError, match="register_axis_rule"):
        ModelSpeedup(plain, DUMMY, masks, customized_replacers=[object()])


def test_unwrap_gives_dense_weights_and_wrap_masks_again() -> None:
    model = padded()
    dense = copy.deepcopy(model.state_dict())
    pruner = L1NormPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    masked = model(DUMMY)
    pruner.unwrap_model()
    assert all(torch.equal(value, dense[key]) for key, value in model.named_parameters())
    pruner.wrap_model()
    assert torch.allclose(model(DUMMY), masked, atol=1e-6)
    assert pruner.get_masks().keys() == masks.keys()


def test_gates_of_slim_are_folded_and_not_thrown_away() -> None:
    model = padded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    evaluator = TorchEvaluator(train, optimizer, training_step)
    pruner = SlimPruner(
        model, [{"op_names": ["fc"], "sparse_ratio": 0.5}], evaluator, training_steps=5, regular_scale=3.0
    )
    pruner.compress()
    model.eval()
    masks = pruner.get_masks()
    masked = model(DUMMY)
    pruner.unwrap_model()
    with torch.no_grad():
        model.fc.weight.mul_(masks["fc"]["weight"])
        model.fc.bias.mul_(masks["fc"]["bias"])
    assert torch.allclose(model(DUMMY), masked, atol=1e-6)


def test_fused_compressors_share_one_training() -> None:
    model = padded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    evaluator = TorchEvaluator(train, optimizer, training_step)
    first = TaylorPruner(model, [{"op_names": ["conv1"], "sparse_ratio": 0.5}], evaluator, training_steps=3)
    second = MovementPruner.from_compressor(
        first, [{"op_names": ["fc"], "sparse_ratio": 0.5}], warmup_step=1, cooldown_begin_step=4
    )
    _, masks = second.compress(max_steps=6, max_epochs=None)
    assert evaluator.steps == 6
    assert float((masks["conv1"]["weight"] == 0).float().mean()) == 0.5
    assert float((masks["fc"]["weight"] == 0).float().mean()) == 0.5


def test_losses_of_every_shape_and_a_training_that_ends_early() -> None:
    model = padded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    seen: list[Any] = []
    for result in (lambda loss: loss, lambda loss: (loss, 1), lambda loss: {"loss": loss, "more": 2}):

        def step(batch: Any, model: nn.Module, result: Any = result) -> Any:
            return result(training_step(batch, model))

        def loop(model: nn.Module, optimizer: Any, training_step: Any, *_: Any) -> None:
            for batch in list(batches())[:2]:
                got = training_step(batch, model)
                seen.append(got)
                (
                    got["loss"] if isinstance(got, dict) else got[0] if isinstance(got, tuple) else got
                ).backward()
                optimizer.step()

        before = copy.deepcopy(model.state_dict()).keys()
        pruner = SlimPruner(
            model, [{"op_names": ["fc"], "sparse_ratio": 0.5}], TorchEvaluator(loop, optimizer, step), 9
        )
        with pytest.raises(ConfigError, match="ended after 2 steps"):
            pruner.compress()
        assert not simulate.simulated_targets(model)
        assert model.state_dict().keys() == before
    assert [type(got) for got in seen[::2]] == [torch.Tensor, tuple, dict]


def test_errors() -> None:
    model = padded()
    config = [{"op_names": ["fc"], "sparse_ratio": 0.5}]
    other = torch.optim.SGD(padded().parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="none of the model's parameters"):
        TaylorPruner(model, config, TorchEvaluator(train, other, training_step), 2).compress()
    assert not simulate.simulated_targets(model)
    with pytest.raises(ConfigError, match="needs an evaluator"):
        AGPPruner(L1NormPruner(model, config), 1, 2).compress(max_steps=2, max_epochs=None)
    with pytest.raises(ConfigError, match="must be an evaluator"):
        L1NormPruner(model, config, train)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="warmup_step"):
        MovementPruner(model, config, TorchEvaluator(train, other, training_step), 5, 5)
    with pytest.raises(NotImplementedError):
        AGPPruner.from_compressor()
    good = TorchEvaluator(train, torch.optim.SGD(model.parameters(), lr=0.1), training_step)
    with pytest.raises(ConfigError, match="max_steps 3 is less"):
        AGPPruner(L1NormPruner(model, config, good), 2, 2).compress(max_steps=3, max_epochs=None)
