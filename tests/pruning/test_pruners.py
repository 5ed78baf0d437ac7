"""Pruners with the config alone: exact shares, groups, alignment, training, errors."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dwindle import simulate
from dwindle.config import Target
from dwindle.config.errors import ConfigError
from dwindle.pruning import FPGMPruner, L1NormPruner, L2NormPruner, LevelPruner, Pruner, RandomPruner
from dwindle.training import compress
from pruning.models import Residual, Simple

PRUNERS = [LevelPruner, L1NormPruner, L2NormPruner, FPGMPruner, RandomPruner]

#: NNI's config for the model, with the ids that it finds by itself.
CONFIG: list[dict[str, Any]] = [
    {"op_types": ["Linear"], "exclude_op_names": ["fc2"], "sparse_ratio": 0.75, "granularity": "out_channel"},
    {"op_names": ["conv1"], "sparse_ratio": 0.75, "granularity": "out_channel", "internal_metric_block": 4},
    {
        "op_names": ["conv2", "conv3"],
        "sparse_ratio": 0.75,
        "granularity": "out_channel",
        "dependency_group_id": "add",
        "internal_metric_block": 4,
    },
]


def share(mask: torch.Tensor) -> float:
    return float((mask == 0).double().mean())


@pytest.mark.parametrize("kind", PRUNERS)
def test_nni_matrix(kind: type[Pruner]) -> None:
    model = Simple()
    pruned, masks = kind(model, CONFIG).compress()
    assert pruned is model
    assert list(masks) == ["conv1", "conv2", "conv3", "fc1"]
    for name in masks:
        module = dict(model.named_modules())[name]
        weight = dict(model.named_parameters())[f"{name}.weight"]
        mask = masks[name]["weight"]
        assert mask.shape == weight.shape
        assert mask.is_floating_point()
        assert share(mask) == 0.75
        assert torch.equal(masks[name]["bias"], (mask.flatten(1).sum(1) != 0).float())
        assert torch.equal(module.weight, weight * mask)
    assert torch.equal(masks["conv2"]["bias"], masks["conv3"]["bias"])
    for name, size in (("conv1", 4), ("conv2", 8)):
        assert (masks[name]["bias"].reshape(4, size) == 0).double().mean(1).tolist() == [0.75] * 4
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("kind", [L1NormPruner, L2NormPruner, FPGMPruner])
def test_the_least_important_channels_go(kind: type[Pruner]) -> None:
    model = Simple()
    weight = model.conv3.weight.detach().double().numpy().reshape(32, -1)
    scores = {
        L1NormPruner: np.abs(weight).sum(1),
        L2NormPruner: np.sqrt((weight**2).sum(1)),
        FPGMPruner: np.array([sum(np.linalg.norm(row - other) for other in weight) for row in weight]),
    }[kind]
    _, masks = kind(model, [{"op_names": ["conv3"], "sparse_ratio": 0.3}]).compress()
    gone = np.flatnonzero(masks["conv3"]["bias"].numpy() == 0)
    assert sorted(gone) == sorted(np.argsort(scores)[: int(32 * 0.3)])


@pytest.mark.parametrize("ratio", [0, 0.1, 0.333, 0.5, 0.999, 1])
def test_level_counts_are_exact(ratio: float) -> None:
    model = nn.Linear(13, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, masks = LevelPruner(model, [{"op_types": ["Linear"], "sparse_ratio": ratio}]).compress()
    mask = masks[""]["weight"]
    assert int((mask == 0).sum()) == int(91 * ratio)
    weight = dict(model.named_parameters())["weight"].detach().abs()
    if 0 < int(91 * ratio) < 91:
        assert weight[mask == 0].max() < weight[mask == 1].min()


def test_level_with_a_pattern_and_with_blocks() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Conv2d(8, 4, 3))
    config = [{"op_types": ["Linear", "Conv2d"], "granularity": "2:4"}]
    _, masks = LevelPruner(model, config).compress()
    linear = masks["0"]["weight"].reshape(8, 4, 4)
    assert (linear.sum(-1) == 2).all()
    assert (masks["1"]["weight"].reshape(4, 2, 4, 3, 3).sum(2) == 2).all()
    weight = dict(model.named_parameters())["0.weight"].detach().abs().reshape(8, 4, 4)
    assert (weight.masked_fill(linear == 0, 9).amin(-1) > (weight * (1 - linear)).amax(-1)).all()
    model = nn.Linear(16, 8)
    _, masks = LevelPruner(
        model, [{"op_types": ["Linear"], "sparse_ratio": 0.5, "granularity": [4, 4]}]
    ).compress()
    tiles = masks[""]["weight"].reshape(2, 4, 4, 4).permute(0, 2, 1, 3).reshape(8, 16)
    assert sorted(tiles.sum(1).tolist()) == [0] * 4 + [16] * 4


def test_global_group_ranks_raw_metrics_over_layers_and_honours_bounds() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.mul_(0.01)
    config = {"op_types": ["Linear"], "sparse_ratio": 0.5, "global_group_id": 1}
    _, masks = LevelPruner(copy.deepcopy(model), [config | {"max_sparse_ratio": 0.8}]).compress()
    assert [int((m["weight"] == 0).sum()) for m in masks.values()] == [3276, 4096 - 3276]
    _, masks = LevelPruner(copy.deepcopy(model), [config | {"min_sparse_ratio": 0.2}]).compress()
    assert [int((m["weight"] == 0).sum()) for m in masks.values()] == [4096 - 820, 820]
    pruner = LevelPruner(copy.deepcopy(model), [config])
    pruner.compress()
    assert sum(round(row.achieved * 4096) for row in pruner.report().rows if "weight" in row.target) == 4096


def test_threshold() -> None:
    model = nn.Linear(20, 10)
    _, masks = LevelPruner(model, [{"op_types": ["Linear"], "sparse_threshold": 0.1}]).compress()
    weight = dict(model.named_parameters())["weight"]
    assert torch.equal(masks[""]["weight"] == 1, weight.abs() >= 0.1)


def test_align_to_another_module_and_to_an_input() -> None:
    model = Residual()
    config = [
        {"op_names": ["expand"], "sparse_ratio": 0.5},
        {
            "op_names": ["depthwise"],
            "target_names": ["weight", "_input_0"],
            "align": {"module_name": "expand", "target_name": "weight", "dims": [0]},
        },
    ]
    pruner = L1NormPruner(model, config)
    _, masks = pruner.compress()
    gone = masks["expand"]["bias"] == 0
    assert int(gone.sum()) == 8
    assert torch.equal((masks["depthwise"]["weight"] == 0).reshape(16, 9).all(1), gone)
    assert torch.equal(masks["depthwise"]["_input_0"].reshape(-1) == 0, gone)
    rows = {row.target: row for row in pruner.report().rows}
    assert rows["expand.weight"].requested == 0.5
    assert rows["expand.weight"].achieved == 0.5
    assert rows["depthwise.weight"].follows == "expand.weight"
    assert "expand.weight" in str(pruner.report())


@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_training_keeps_masked_entries_at_zero(kind: type, optimizer_first: bool) -> None:
    model, x, y = Simple(), torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.1, **options)
    pruner = L1NormPruner(model, CONFIG)
    _, masks = pruner.compress()
    masks = {name: {own: mask.clone() for own, mask in nested.items()} for name, nested in masks.items()}
    if not optimizer_first:
        optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.1, **options)
    before = model.conv1.weight.detach().clone()
    for _ in range(3):
        loss = nn.functional.nll_loss(model(x), y) + pruner.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    assert not torch.equal(model.conv1.weight, before)
    modules = dict(model.named_modules())
    for name, nested in masks.items():
        for own, mask in nested.items():
            assert torch.equal(getattr(modules[name], own)[mask == 0], torch.zeros(int((mask == 0).sum())))
    expected = model.eval()(x)
    pruner.detach()
    assert torch.equal(model(x), expected)
    state = model.state_dict()
    assert list(state) == list(Simple().state_dict())
    for name, nested in masks.items():
        for own, mask in nested.items():
            assert not state[f"{name}.{own}"][mask == 0].any()


def test_checkpoints_go_both_ways() -> None:
    model = Simple()
    x = torch.randn(2, 1, 8, 8)
    L1NormPruner(model, CONFIG).compress()
    expected = model.eval()(x)
    plain = Simple().eval()
    plain.load_state_dict(simulate.plain_state_dict(model))
    assert torch.equal(plain(x), expected)
    other = Simple().eval()
    L1NormPruner(other, CONFIG).compress()  # other weights, so other masks
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), expected)
    fresh = Simple().eval()
    L1NormPruner(fresh, CONFIG).compress()
    weights = Simple().state_dict()
    fresh.load_state_dict(weights)
    masked = weights["fc2.weight"]
    assert torch.equal(fresh.fc2.weight, masked)
    assert torch.equal(
        fresh.fc1.weight, weights["fc1.weight"] * fresh.fc1._modules["_dwindle"].weight.mask.value
    )


def test_a_second_pruner_adds_to_the_first() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    _, first = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}]).compress()
    channels = first["0"]["weight"].clone()
    _, both = LevelPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.25}]).compress()
    assert not both["0"]["weight"][channels == 0].any()
    assert share(both["2"]["weight"]) == 0.25


def test_inside_a_run_and_state() -> None:
    model = Simple()
    pruner = L1NormPruner(model, CONFIG)
    with compress(model, [pruner]) as run:
        assert share(pruner.masks["fc1"]["weight"]) == 0.75
        assert float(run.loss()) == 0.0
        assert list(run.parameters()) == []
        state = run.state_dict()
        run.load_state_dict(state)
    assert type(model.fc1) is nn.Linear
    assert share(model.fc1.weight.detach()) == 0.75


def test_compiles_and_copies() -> None:
    model, x = Simple().eval(), torch.randn(2, 1, 8, 8)
    L1NormPruner(model, CONFIG).compress()
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-6)


def test_random_masks_follow_the_seed() -> None:
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
    masks = [RandomPruner(nn.Linear(4, 64), config, seed=seed).compress()[1] for seed in (1, 1, 2)]
    assert torch.equal(masks[0][""]["weight"], masks[1][""]["weight"])
    assert not torch.equal(masks[0][""]["weight"], masks[2][""]["weight"])


@pytest.mark.parametrize(
    ("kind", "entry", "message"),
    [
        (L1NormPruner, {"op_names": ["con1"], "sparse_ratio": 0.5}, "did you mean 'conv1'"),
        (L1NormPruner, {"op_types": ["Linear"], "sparse_ration": 0.5}, "did you mean 'sparse_ratio'"),
        (L1NormPruner, {"op_types": ["Linear"], "sparse_ratio": 1.5}, "sparse_ratio"),
        (L1NormPruner, {"op_types": ["Linear"], "sparse_ratio": 0.5, "granularity": [7, 7]}, "do not divide"),
        (LevelPruner, {"op_names": ["conv1"], "granularity": "2:4"}, "multiple of 4"),
        (
            FPGMPruner,
            {"op_types": ["Linear"], "sparse_ratio": 0.5, "granularity": "element"},
            "compares blocks",
        ),
        (
            L1NormPruner,
            {"op_names": ["conv1", "conv2"], "sparse_ratio": 0.5, "dependency_group_id": 1},
            "conv1.weight has blocks",
        ),
        (
            L1NormPruner,
            {"op_names": ["fc1"], "sparse_ratio": 0.5, "internal_metric_block": 3},
            "does not divide 100 blocks",
        ),
        (
            L1NormPruner,
            {"op_names": ["fc1"], "target_names": ["_input_0"], "sparse_ratio": 0.5},
            "fc1._input_0",
        ),
    ],
)
def test_errors_name_what_is_wrong_and_leave_the_model_alone(
    kind: type[Pruner], entry: dict[str, Any], message: str
) -> None:
    model = Simple()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        kind(model, [entry])
    check_untouched(model, state)


def check_untouched(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    assert simulate.get_masks(model) == {}
    for module in model.modules():
        assert type(module).__dict__.get("_dwindle_base") is None
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_failures_in_compress_leave_the_model_alone() -> None:
    model = Simple()
    with torch.no_grad():
        model.fc1.weight[3, 3] = float("nan")
    state = {name: value.clone() for name, value in model.state_dict().items() if name != "fc1.weight"}
    with pytest.raises(Exception, match="fc1"):
        L1NormPruner(model, CONFIG).compress()
    assert simulate.get_masks(model) == {}
    with pytest.raises(Exception, match=r"shape|size"):
        L1NormPruner(model, CONFIG, example_inputs=(torch.randn(2, 3, 8, 8),)).compress()
    assert simulate.get_masks(model) == {}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


def test_a_target_whose_mask_stage_is_taken_leaves_the_others_alone_too() -> None:
    model = Simple()
    target = Target("fc1", "weight")
    simulate.attach_mask(model, target, apply_method="bypass")
    with pytest.raises(ConfigError, match=r"fc1[.]weight"):
        L1NormPruner(model, CONFIG).compress()
    assert list(simulate.get_masks(model)) == [target]


def test_a_missed_goal_warns() -> None:
    model = Simple()
    config = [{"op_names": ["fc1"], "sparse_ratio": 0.5, "max_sparse_ratio": 0.2}]
    pruner = L1NormPruner(model, config)
    with pytest.warns(UserWarning, match=r"fc1.weight 20% of 50%"):
        pruner.compress()
    assert [row.target for row in pruner.report().missed] == ["fc1.weight"]
    with pytest.raises(ConfigError, match="before"):
        pruner.compress()
