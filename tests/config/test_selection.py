"""Which modules an entry selects."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from dwindle.config import Target, excluded_modules, resolve
from dwindle.config.errors import ConfigError

from .models import Scaled, Shared, Small, SubLinear

LINEARS = [*(f"blocks.{index}.0" for index in range(12)), "fc1", "fc2"]


def modules(model, **entry) -> list[str]:
    found = resolve(model, [{"sparse_ratio": 0.5, **entry}], "pruning")
    return list(dict.fromkeys(target.module for target in found))


def test_types_match_subclasses():
    assert modules(Small(), op_types=["Linear"]) == LINEARS
    assert modules(Small(), op_types=["SubLinear"]) == ["fc1"]
    assert modules(Small(), op_types=[nn.Linear]) == LINEARS
    assert modules(Small(), op_types=["torch.nn.modules.linear.Linear", SubLinear]) == LINEARS
    assert modules(Small(), op_types=["_ConvNd"]) == ["conv1", "conv2", "up"]


def test_names_and_expressions_add_up_and_meet_types():
    model = Small()
    assert modules(model, op_names=["fc2", "conv1"]) == ["conv1", "fc2"]
    assert modules(model, op_names=["fc2"], op_names_re=[r"conv\d"]) == ["conv1", "conv2", "fc2"]
    both = modules(model, op_names=["fc2", "bn1"], op_names_re=[r"conv\d"], op_types=["Conv2d", "Linear"])
    assert both == ["conv1", "conv2", "fc2"]


def test_expressions_match_whole_names():
    assert modules(Small(), op_names_re=[r"blocks\.1\..*"]) == ["blocks.1.0"]
    with pytest.raises(ConfigError, match=re.escape("some names begin with it: write 'bloc.*'")):
        modules(Small(), op_names_re=["bloc"])
    with pytest.raises(ConfigError, match=r"key 'op_names_re': '\(' is no regular expression"):
        modules(Small(), op_names_re=["("])


def test_an_expression_never_means_the_model_itself():
    found = resolve(Small(), [{"op_names_re": [".*"]}], "distillation")
    assert "" not in {target.module for target in found}
    found = resolve(Small(), [{"op_names": [""]}], "distillation")
    assert list(found) == [Target("", "_output_0")]
    assert modules(nn.Linear(2, 2), op_names_re=[".*"]) == [""]


@given(
    types=st.sets(st.sampled_from(["Conv2d", "Linear", "BatchNorm2d"]), min_size=1),
    excluded=st.sets(st.sampled_from(["fc1", "fc2", "conv1", "bn1"])),
    excluded_types=st.sets(st.sampled_from(["SubLinear", "Conv2d"])),
)
@settings(max_examples=40, deadline=None)
def test_excludes_are_set_difference(types, excluded, excluded_types):
    model = Small()
    classes = {
        "Conv2d": nn.Conv2d,
        "Linear": nn.Linear,
        "BatchNorm2d": nn.BatchNorm2d,
        "SubLinear": SubLinear,
    }
    expected = [
        name
        for name, module in model.named_modules()
        if isinstance(module, tuple(classes[name] for name in types))
        and name not in excluded
        and not isinstance(module, tuple(classes[name] for name in excluded_types))
    ]
    entry = {
        "op_types": sorted(types),
        "exclude_op_names": sorted(excluded),
        "exclude_op_types": sorted(excluded_types),
    }
    if expected:
        assert modules(model, **entry) == expected
    else:
        with pytest.raises(ConfigError, match="everything it selects is excluded"):
            modules(model, **entry)


def test_excluded_expressions():
    assert modules(Small(), op_types=["Linear"], exclude_op_names_re=[r"blocks\..*"]) == ["fc1", "fc2"]


def test_excluded_modules_are_those_nobody_selects():
    config = [
        {"op_types": ["Linear"], "exclude_op_names": ["fc1", "fc2"], "sparse_ratio": 0.5},
        {"op_names": ["fc2"], "sparse_ratio": 0.1},
    ]
    assert excluded_modules(Small(), config, "pruning") == {"fc1"}


def test_one_module_under_two_names_is_one():
    model = Shared()
    assert modules(model, op_types=["Linear"]) == ["first", "body.0"]
    assert modules(model, op_names=["body.1"]) == ["first"]
    assert modules(model, op_names=["first", "body.1"]) == ["first"]
    assert modules(model, op_types=["Linear"], exclude_op_names=["body.1"]) == ["body.0"]
    assert modules(model, op_names_re=[r"body\..*"]) == ["first", "body.0"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"op_names": ["cnv1"]}, "key 'op_names': the model has no module 'cnv1'; did you mean 'conv1'?"),
        (
            {"op_types": ["Conv2D"]},
            "key 'op_types': the model has no module of type 'Conv2D'; did you mean 'Conv2d'?",
        ),
        ({"op_types": ["Conv2d", "Linaer"]}, "type 'Linaer'; did you mean 'Linear'?"),
        (
            {"op_types": ["Conv3d"]},
            "no module has op_types ['Conv3d']; the model's types are BatchNorm2d, Conv2d",
        ),
        (
            {"op_types": ["Linear"], "exclude_op_names": ["fc3"]},
            "key 'exclude_op_names': the model has no module 'fc3'",
        ),
        ({"op_types": ["Linear"], "exclude_op_types": ["SubLiner"]}, "did you mean 'SubLinear'?"),
        (
            {"op_types": ["Linear"], "exclude_op_names_re": ["head.*"]},
            "key 'exclude_op_names_re': 'head.*' matches",
        ),
        (
            {"op_types": ["Linear"], "op_names": ["conv1"]},
            "no module has op_types ['Linear'] and op_names ['conv1']",
        ),
        (
            {"op_names": ["blocks"]},
            "module 'blocks' (ModuleList) has no parameters of its own; select what is",
        ),
        ({"op_names": ["conv1", "blocks.0.1"]}, "module 'blocks.0.1' (ReLU) has no parameters"),
        ({"op_names": "conv1"}, "key 'op_names' must be a list, got 'conv1'"),
        ({"op_names": [1]}, "key 'op_names' must hold texts, got 1"),
        ({}, "one of op_types, op_names, op_names_re is required"),
        ({"op_names": []}, "one of op_types, op_names, op_names_re is required"),
        ({"op_name": ["conv1"]}, "key 'op_name' is not known for pruning; did you mean 'op_names'?"),
    ],
)
def test_errors_name_the_entry_the_key_and_the_nearest_choice(entry, message):
    good = {"op_names": ["fc1"], "sparse_ratio": 0.5}
    with pytest.raises(ConfigError) as caught:
        resolve(Small(), [good, {"sparse_ratio": 0.5, **entry}], "pruning")
    assert message in str(caught.value)
    assert str(caught.value).startswith("config_list[1]: ")


@pytest.mark.parametrize("config", [[], {"op_names": ["fc1"]}, "fc1", ["fc1"], None, 3])
def test_what_is_no_list_of_dicts(config):
    with pytest.raises(ConfigError, match="config_list"):
        resolve(Small(), config, "pruning")


def test_a_type_of_torch_that_is_absent_is_fine_beside_others():
    assert modules(Small(), op_types=["Conv3d", "Conv1d", "BatchNorm2d"]) == ["bn1"]


def test_the_order_is_that_of_the_model():
    model = Small()
    found = resolve(
        model,
        [{"op_names": ["fc2"], "sparse_ratio": 0.1}, {"op_types": ["Conv2d"], "sparse_ratio": 0.1}],
        "pruning",
    )
    assert [target.path for target in found] == [
        "conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", "fc2.weight", "fc2.bias",
    ]  # fmt: skip


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


def test_parametrized_modules_are_seen_as_the_user_wrote_them():
    model = Small()
    before = resolve(model, [{"op_names_re": [".*"], "sparse_ratio": 0.5}], "pruning")
    parametrize.register_parametrization(model.conv1, "weight", Halved())
    parametrize.register_parametrization(model.fc1, "bias", Halved())
    assert resolve(model, [{"op_names_re": [".*"], "sparse_ratio": 0.5}], "pruning") == before
    assert modules(model, op_types=["Linear"]) == LINEARS
    assert not [
        t for t in resolve(model, [{"op_names_re": [".*"]}], "distillation") if "parametriz" in t.path
    ]
    root = nn.Linear(2, 2)
    parametrize.register_parametrization(root, "weight", Halved())
    assert list(resolve(root, [{"op_types": ["Linear"], "sparse_ratio": 0.5}], "pruning")) == [
        Target("", "weight"),
        Target("", "bias"),
    ]


def test_simulated_modules_are_seen_as_the_user_wrote_them():
    simulate = pytest.importorskip("dwindle.simulate")
    if not hasattr(simulate, "attach_mask"):
        pytest.skip("masks are not written yet")
    model = Small()
    config = [{"op_names_re": [".*"], "sparse_ratio": 0.5}]
    before = resolve(model, config, "pruning")
    simulate.attach_mask(model, Target("conv1", "weight"), torch.zeros_like(model.conv1.weight))
    assert resolve(model, config, "pruning") == before


def test_any_module_with_parameters_can_be_configured():
    model = nn.ModuleDict(
        {
            "norm": nn.LayerNorm(4),
            "attention": nn.MultiheadAttention(4, 2),
            "lstm": nn.LSTM(4, 4),
            "own": Scaled(),
            "embedding": nn.Embedding(5, 4),
        }
    )
    found = resolve(model, [{"op_names_re": [".*"], "sparse_ratio": 0.5}], "pruning")
    assert [target.path for target in found] == [
        name for name, _ in model.named_parameters()
    ]  # every parameter, in the model's order
    followers = {target.path: setting.align.target_name for target, setting in found.items() if setting.align}
    assert followers == {
        "norm.bias": "weight",
        "attention.in_proj_bias": "in_proj_weight",
        "attention.out_proj.bias": "weight",
        "lstm.bias_ih_l0": "weight_ih_l0",
        "lstm.bias_hh_l0": "weight_hh_l0",
    }


def test_lazy_modules_must_run_first():
    with pytest.raises(ConfigError, match="run one forward pass first"):
        modules(nn.Sequential(nn.LazyLinear(3)), op_names=["0"])
