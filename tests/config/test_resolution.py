"""Settings of targets: shortcuts, target_settings, followers, values and their errors."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from dwindle.config import (
    Align,
    DistillationSetting,
    PruningSetting,
    QuantizationSetting,
    Target,
    resolve,
)
from dwindle.config.errors import ConfigError

from .models import Small, SubLinear

WEIGHT, BIAS = Target("fc1", "weight"), Target("fc1", "bias")


def one(kind: str = "pruning", **entry):
    return resolve(Small(), [{"op_names": ["fc1"], **entry}], kind)


# NNI's test_setting, by class name and by class
@pytest.mark.parametrize("types", [["Linear"], [nn.Linear], ["SubLinear"], [SubLinear]])
def test_pruning_shortcut_reaches_the_weight_and_target_settings_the_bias(types):
    entry = {"op_types": types, "sparse_ratio": 0.5, "target_settings": {"bias": {"sparse_ratio": 0.6}}}
    found = resolve(Small(), [entry], "pruning")
    assert found[WEIGHT] == PruningSetting(sparse_ratio=0.5)
    assert found[BIAS] == PruningSetting(sparse_ratio=0.6)  # its own ratio, so it follows nobody


def test_quantization_shortcuts_and_target_settings():
    found = one(
        "quantization",
        quant_dtype="uint6",
        quant_scheme="affine",
        target_names=["_input_", "weight", "_output_"],
        target_settings={"_input_": {"quant_dtype": "int4", "granularity": "per_channel"}},
    )
    assert found[WEIGHT] == QuantizationSetting(quant_dtype="uint6", quant_scheme="affine")
    assert found[Target("fc1", "_input_0")] == QuantizationSetting(
        quant_dtype="int4", quant_scheme="affine", granularity="per_channel"
    )
    assert found[Target("fc1", "_output_0")].quant_dtype == "uint6"


def test_distillation_knows_every_module():
    for name, kind in (("fc1", "SubLinear"), ("scaled", "Scaled"), ("blocks.3", "Sequential")):
        found = resolve(
            Small(), [{"op_types": [kind], "op_names": [name], "lambda": 0.5, "link": "auto"}], "distillation"
        )
        assert found == {
            Target(name, "_output_0"): DistillationSetting.model_validate({"lambda": 0.5, "link": "auto"})
        }
        assert found[Target(name, "_output_0")].lambda_ == 0.5


# NNI's test_wrapper::register: entries of a list add up
def test_entries_add_up():
    config = [
        {"op_names": ["conv1", "fc1"], "sparse_ratio": 0.5},
        {"op_names": ["conv2"], "sparse_ratio": 0.25},
        {"op_types": ["ConvTranspose2d"], "sparse_ratio": 0.125},
    ]
    ratios = {
        target.path: setting.sparse_ratio
        for target, setting in resolve(Small(), config, "pruning").items()
        if setting.sparse_ratio is not None
    }
    assert ratios == {"conv1.weight": 0.5, "conv2.weight": 0.25, "up.weight": 0.125, "fc1.weight": 0.5}


@pytest.mark.parametrize("ratio", [0, 1, 0.0, 1.0, 0.5])
def test_ratios_may_be_whole_numbers(ratio):
    assert one(sparse_ratio=ratio)[WEIGHT].sparse_ratio == ratio


@pytest.mark.parametrize(
    ("kind", "entry", "message"),
    [
        (
            "pruning",
            {"sparse_ratio": 1.5},
            "key 'sparse_ratio': Input should be less than or equal to 1 (got 1.5)",
        ),
        ("pruning", {"sparse_ratio": -1}, "key 'sparse_ratio': Input should be greater than or equal to 0"),
        ("pruning", {"sparse_ratio": float("nan")}, "key 'sparse_ratio'"),
        ("pruning", {"sparse_ratio": "0.5"}, "key 'sparse_ratio': '0.5' is not a number"),
        ("pruning", {"sparse_ratio": True}, "key 'sparse_ratio': True is not a number"),
        ("pruning", {"sparse_ratio": 0.5, "sparse_threshold": 0.1}, "exclude each other"),
        ("pruning", {"sparse_threshold": float("inf")}, "key 'sparse_threshold'"),
        ("pruning", {"sparse_ratio": 0.5, "max_sparse_ratio": 0}, "key 'max_sparse_ratio'"),
        ("pruning", {"sparse_ratio": 0.5, "min_sparse_ratio": 1}, "key 'min_sparse_ratio'"),
        (
            "pruning",
            {"sparse_ratio": 0.5, "min_sparse_ratio": 0.6, "max_sparse_ratio": 0.4},
            "is above max_sparse_ratio",
        ),
        ("pruning", {"sparse_ratio": 0.5, "global_group_id": 1.5}, "key 'global_group_id'"),
        ("pruning", {"sparse_ratio": 0.5, "internal_metric_block": 0}, "key 'internal_metric_block'"),
        ("pruning", {"sparse_ratio": 0.5, "granularity": "out_chanel"}, "did you mean 'out_channel'"),
        ("pruning", {"sparse_ratio": 0.4, "granularity": "2:4"}, "means sparse_ratio 0.5, not 0.4"),
        (
            "pruning",
            {"sparse_ratio": 0.5, "apply_method": "multiply"},
            "key 'apply_method': Input should be 'mul'",
        ),
        (
            "pruning",
            {"sparse_ratio": 0.5, "align": {"target": "weight"}},
            "'target' is not known; did you mean 'target_name'?",
        ),
        (
            "pruning",
            {"sparse_rate": 0.5},
            "key 'sparse_rate' is not known for pruning; did you mean 'sparse_ratio'?",
        ),
        (
            "pruning",
            {"quant_dtype": "int8"},
            "key 'quant_dtype' is not known for pruning (it belongs to quantization)",
        ),
        ("pruning", {}, "sparse_ratio or sparse_threshold is required"),
        (
            "pruning",
            {"sparse_ratio": 0.5, "target_settings": {"weight": {"sparsity_ratio": 1}}},
            "target_settings['weight']: key 'sparsity_ratio' is not known",
        ),
        (
            "pruning",
            {"sparse_ratio": 0.5, "target_settings": {"weight": 0.5}},
            "must map target names to dicts",
        ),
        (
            "pruning",
            {"sparse_ratio": 0.5, "target_settings": {"wieght": {"sparse_ratio": 1}}},
            "key 'target_settings': none of the selected modules has a target 'wieght'; did you mean 'weight'?",
        ),
        (
            "pruning",
            {"sparse_ratio": 0.5, "target_names": ["bais"]},
            "key 'target_names': none of the selected modules has a target 'bais'; did you mean 'bias'?",
        ),
        (
            "pruning",
            {"sparse_ratio": 0.5, "op_names": ["fc1", "blocks.5.0"], "target_names": ["bias"]},
            "key 'op_names': module 'blocks.5.0' (Linear) has none of the targets ['bias']",
        ),
        (
            "pruning",
            {"sparse_ratio": 0.5, "target_names": ["weight", "bais"]},
            "key 'target_names': none of the selected modules has a target 'bais'; did you mean 'bias'?",
        ),
        (
            "pruning",
            {
                "sparse_ratio": 0.5,
                "target_names": ["weight"],
                "target_settings": {"bias": {"sparse_ratio": 1}},
            },
            "'bias', which target_names leaves out",
        ),
        ("quantization", {"quant_dtype": "int88"}, "key 'quant_dtype': 'int88' is no number format"),
        ("quantization", {"quant_dtype": "int 8"}, "did you mean 'int8'"),
        ("quantization", {"quant_dtype": 8}, "key 'quant_dtype'"),
        ("quantization", {"quant_dtype": "int8", "quant_scheme": "symetric"}, "did you mean 'symmetric'?"),
        ("quantization", {"quant_dtype": "int8", "granularity": "2:4"}, "pattern of pruning"),
        ("quantization", {"quant_scheme": "affine"}, "key 'quant_dtype' is required"),
        (
            "quantization",
            {"quant_dtype": "int8", "fuse_names": [("conv1", "bn")]},
            "key 'fuse_names': the model has no module 'bn'; did you mean 'bn1'?",
        ),
        ("distillation", {"lambda": "much"}, "key 'lambda': 'much' is not a number"),
        ("distillation", {"lambdas": 1}, "did you mean 'lambda'?"),
        ("distillation", {"link": 3}, "key 'link'"),
    ],
)
def test_errors_name_entry_and_key(kind, entry, message):
    with pytest.raises(ConfigError) as caught:
        one(kind, **entry)
    assert message in str(caught.value)
    assert str(caught.value).startswith("config_list[0]")
    assert "\n" not in str(caught.value)


def test_unknown_kind():
    with pytest.raises(ConfigError, match="did you mean 'pruning'"):
        resolve(Small(), [{"op_names": ["fc1"]}], "prunning")


def test_a_bias_follows_its_weight():
    found = resolve(
        Small(), [{"op_types": ["_ConvNd", "Linear", "BatchNorm2d"], "sparse_ratio": 0.5}], "pruning"
    )
    for target, setting in found.items():
        if target.name == "bias":
            dim = 1 if target.module == "up" else 0  # transposed convolutions hold [in, out, ...]
            assert setting == PruningSetting(align=Align(dims=(dim,)))
        else:
            assert setting == PruningSetting(sparse_ratio=0.5)
    assert Target("blocks.5.0", "bias") not in found  # it has none


def test_a_bias_of_several_dimensions_follows_in_all_of_them():
    model = nn.ModuleDict({"norm": nn.LayerNorm((2, 3))})
    found = resolve(model, [{"op_names": ["norm"], "sparse_ratio": 0.5}], "pruning")
    assert found[Target("norm", "bias")] == PruningSetting(align=Align(dims=(0, 1)))


def test_a_bias_alone_follows_nobody():
    assert one(target_names=["bias"], sparse_ratio=0.5) == {BIAS: PruningSetting(sparse_ratio=0.5)}


def test_alignment_to_another_module():
    align = {"module_name": "conv1", "target_name": "weight", "dims": [0]}
    found = resolve(
        Small(),
        [{"op_names": ["conv1"], "sparse_ratio": 0.5}, {"op_names": ["bn1"], "align": align}],
        "pruning",
    )
    for name in ("weight", "bias"):
        assert found[Target("bn1", name)].align == Align(module_name="conv1", dims=(0,))
    for wrong, message in (
        ({"module_name": "cnv1"}, "the model has no module 'cnv1'; did you mean 'conv1'?"),
        ({**align, "target_name": "wieght"}, "has no parameter 'wieght'; did you mean 'weight'?"),
        ({**align, "dims": [4]}, "dims [4] do not fit shape [4, 1, 3, 3]"),
    ):
        with pytest.raises(ConfigError) as caught:
            resolve(Small(), [{"op_names": ["bn1"], "align": wrong}], "pruning")
        assert message in str(caught.value)


def test_alignment_at_the_top_never_makes_a_target_follow_itself():
    found = one(sparse_ratio=0.5, align={"module_name": None, "target_name": "weight", "dims": [0]})
    assert found[WEIGHT].align is None
    assert found[BIAS].align == Align(target_name="weight", dims=(0,))


def test_parameters_of_own_names_and_buffers():
    found = resolve(Small(), [{"op_types": ["Scaled"], "sparse_ratio": 0.5}], "pruning")
    assert [target.name for target in found] == ["gain", "mixing"]
    named = resolve(
        Small(), [{"op_types": ["Scaled"], "sparse_ratio": 0.5, "target_names": ["offset"]}], "pruning"
    )
    assert list(named) == [Target("scaled", "offset")]


@pytest.mark.parametrize(
    "name", ["_input_", "_input_0", "_input_1", "_input_x", "_input_shift", "_output_", "_output_3"]
)
def test_inputs_and_outputs(name):
    found = resolve(Small(), [{"op_names": ["scaled"], "target_names": [name]}], "distillation")
    assert [target.name for target in found] == [
        {"_input_": "_input_0", "_output_": "_output_0"}.get(name, name)
    ]


@pytest.mark.parametrize("name", ["_input_2", "_input_shfit", "_output_x", "wait"])
def test_inputs_that_forward_does_not_have(name):
    config = [{"op_types": ["Scaled"], "target_names": [name], "lambda": 1}]
    with pytest.raises(ConfigError, match=f"none of the selected modules has a target '{name}'"):
        resolve(Small(), config, "distillation")


def test_quantization_targets_when_none_are_named():
    found = resolve(Small(), [{"op_names": ["fc1", "bn1"], "quant_dtype": "int8"}], "quantization")
    assert [target.path for target in found] == [
        f"{module}.{name}" for module in ("bn1", "fc1") for name in ("_input_0", "weight", "_output_0")
    ]


def test_quantization_of_single_targets_says_nothing_about_the_others():
    found = one("quantization", target_settings={"weight": {"quant_dtype": "int4"}})
    assert found == {WEIGHT: QuantizationSetting(quant_dtype="int4")}
    kept = one("quantization", quant_dtype=None)
    assert {setting.quant_dtype for setting in kept.values()} == {None}
    assert len(kept) == 3


def test_the_first_of_two_entries_holds_with_a_warning():
    config = [{"op_names": ["fc1"], "sparse_ratio": 0.2}, {"op_types": ["Linear"], "sparse_ratio": 0.5}]
    with pytest.warns(
        UserWarning,
        match=r"fc1.weight is configured by config_list\[0\] and config_list\[1\]; config_list\[0\] holds",
    ):
        found = resolve(Small(), config, "pruning")
    assert (found[WEIGHT].sparse_ratio, found[Target("fc2", "weight")].sparse_ratio) == (0.2, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve(Small(), [config[0], config[0]], "pruning")  # both say the same
        resolve(Small(), [config[0], {**config[1], "exclude_op_names": ["fc1"]}], "pruning")


def test_defaults_stand_behind_the_entry():
    defaults = {"granularity": "element", "sparse_ratio": 0.3}
    model = Small()
    found = resolve(model, [{"op_names": ["fc1"]}], "pruning", defaults=defaults)
    assert found[WEIGHT] == PruningSetting(sparse_ratio=0.3, granularity="element")
    assert found[BIAS] == PruningSetting(align=Align())
    found = resolve(
        model,
        [{"op_names": ["fc1"], "sparse_threshold": 0.1, "granularity": [5, 1]}],
        "pruning",
        defaults=defaults,
    )
    assert found[WEIGHT] == PruningSetting(sparse_threshold=0.1, granularity=(5, 1))
    with pytest.raises(ConfigError, match="defaults: key 'sparse_ration' is not known"):
        resolve(model, [{"op_names": ["fc1"]}], "pruning", defaults={"sparse_ration": 1})


def test_target_settings_may_replace_a_ratio_by_a_threshold():
    found = one(sparse_ratio=0.5, target_settings={"weight": {"sparse_threshold": 0.1}})
    assert found[WEIGHT] == PruningSetting(sparse_threshold=0.1)


def test_n_of_m_implies_its_ratio():
    setting = one(granularity="1:4")[WEIGHT]
    assert (setting.goal, setting.has_goal) == (0.75, True)


def test_settings_cannot_be_changed_and_hash_nothing_of_the_users():
    entry = {
        "op_names": ["fc1"],
        "sparse_ratio": 0.5,
        "granularity": [1, 2],
        "target_settings": {"bias": {"sparse_ratio": 0}},
    }
    before = copy.deepcopy(entry)
    model = Small()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = resolve(model, [entry], "pruning")
    assert entry == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="frozen"):
        found[WEIGHT].sparse_ratio = 0.1


def test_settings_round_trip_through_json():
    setting = one(sparse_ratio=0.5, granularity=[1, 2])[WEIGHT]
    assert PruningSetting.model_validate_json(setting.model_dump_json()) == setting
    aligned = one(sparse_ratio=0.5)[BIAS]
    assert PruningSetting.model_validate_json(aligned.model_dump_json()) == aligned
    taught = one("distillation", **{"lambda": 0.5})[Target("fc1", "_output_0")]
    assert DistillationSetting.model_validate_json(taught.model_dump_json(by_alias=True)) == taught


def test_targets():
    target = Target("a.b", "weight")
    assert (target.path, str(target), Target("", "bias").path) == ("a.b.weight", "a.b.weight", "bias")
    assert Target.parse("a.b.weight") == target
    assert Target.parse("a._input_") == Target("a", "_input_0")
    kinds = [
        (t.is_parameter, t.is_input, t.is_output)
        for t in (target, Target("a", "_input_x"), Target("a", "_output_0"))
    ]
    assert kinds == [(True, False, False), (False, True, False), (False, False, True)]
    assert sorted([Target("b", "a"), Target("a", "b")]) == [Target("a", "b"), Target("b", "a")]


def test_attention_reads_a_weight_without_calling_its_module():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    found = resolve(model, [{"op_types": ["Linear"], "quant_dtype": "int8"}], "quantization")
    assert list(found) == [Target("attention.out_proj", "weight")]
