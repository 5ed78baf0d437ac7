"""Lists in the form of NNI 2.x mean what they meant there."""

from __future__ import annotations

import copy
import warnings

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from dwindle.config import PruningSetting, QuantizationSetting, Target, resolve
from dwindle.config.errors import ConfigError

from .models import Small


def legacy(config, kind: str = "pruning", model: nn.Module | None = None):
    """Resolve without the note that every such list gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return resolve(model or Small(), config, kind)


def ratios(config) -> dict[str, float]:
    return {t.module: s.sparse_ratio for t, s in legacy(config).items() if s.sparse_ratio is not None}


@pytest.mark.parametrize("key", ["sparsity", "sparsity_per_layer"])
def test_sparsity(key):
    assert ratios([{"op_types": ["Conv2d"], key: 0.8}]) == {"conv1": 0.8, "conv2": 0.8}


def test_a_note_shows_the_modern_form():
    config = [{"op_types": ["Conv2d"], "sparsity": 0.8}]
    before = copy.deepcopy(config)
    with pytest.warns(UserWarning, match="NNI 2.x; the modern form is") as caught:
        found = resolve(Small(), config, "pruning")
    shown = "[{'op_types': ['Conv2d'], 'sparse_ratio': 0.8}]"
    assert shown in str(caught[0].message)
    assert config == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(Small(), [{"op_types": ["Conv2d"], "sparse_ratio": 0.8}], "pruning") == found


def test_total_sparsity_ranks_the_entry_together():
    found = legacy([
        {"op_types": ["Conv2d"], "total_sparsity": 0.8, "max_sparsity_per_layer": 0.9},
        {"op_types": ["Linear"], "total_sparsity": 0.5},
    ])  # fmt: skip
    convolutions = [found[Target(name, "weight")] for name in ("conv1", "conv2")]
    assert convolutions[0] == convolutions[1]
    assert (convolutions[0].sparse_ratio, convolutions[0].max_sparse_ratio) == (0.8, 0.9)
    assert convolutions[0].global_group_id is not None
    linear = found[Target("fc2", "weight")]
    assert linear.global_group_id not in (None, convolutions[0].global_group_id)
    assert found[Target("conv1", "bias")].global_group_id is None


def test_maximum_by_module():
    found = legacy([
        {"op_types": ["Conv2d", "Linear"], "total_sparsity": 0.5, "max_sparsity_per_layer": {"conv1": 0.6, "fc1": 0.7}}
    ])  # fmt: skip
    largest = {t.module: s.max_sparse_ratio for t, s in found.items() if t.name == "weight"}
    assert (largest["conv1"], largest["fc1"], largest["conv2"]) == (0.6, 0.7, None)
    assert len({s.global_group_id for t, s in found.items() if t.name == "weight"}) == 1


def test_partial_names_are_no_expressions():
    assert set(ratios([{"op_partial_names": ["conv"], "sparsity": 0.5}])) == {"conv1", "conv2"}
    assert set(ratios([{"op_partial_names": ["s.1."], "op_types": ["Linear"], "sparsity": 0.5}])) == {
        "blocks.1.0"
    }


def test_default_types():
    found = set(ratios([{"op_types": ["default"], "sparsity": 0.5}]))
    assert found == {"conv1", "conv2", "up", "fc1", "fc2", *(f"blocks.{index}.0" for index in range(12))}


def test_exclusions_count_for_the_entries_before():
    everything = {"op_types": ["Conv2d", "Linear"], "sparsity": 0.5}
    excluded = {"op_names": ["fc1"], "exclude": True}
    assert "fc1" not in ratios([everything, excluded])
    assert ratios([everything, excluded, {"op_names": ["fc1"], "sparsity": 0.2}])["fc1"] == 0.2
    assert "fc1" in ratios([excluded, everything])
    assert set(ratios([everything, {"op_types": ["Linear"], "exclude": True}])) == {"conv1", "conv2"}


NAMES = ["conv1", "conv2", "up", "fc1", "fc2"]
TYPES = ["Conv2d", "ConvTranspose2d", "Linear"]
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "op_types": st.lists(st.sampled_from(TYPES), min_size=1, unique=True),
        "op_names": st.lists(st.sampled_from(NAMES), min_size=1, unique=True),
        "exclude": st.booleans(),
    },
).filter(lambda entry: "op_types" in entry or "op_names" in entry)


@given(st.lists(ENTRY, min_size=1, max_size=4))
@settings(max_examples=120, deadline=None)
def test_selection_is_that_of_2x(entries):
    config = [{**entry, "sparsity": (index + 1) / 10} for index, entry in enumerate(entries)]
    model = Small()
    expected: dict[str, float] = {}
    for name, module in model.named_modules():  # as the 2.x compressor did: the last entry that matches
        matching = [
            entry
            for entry in config
            if name in entry.get("op_names", [name])
            and (
                "op_types" not in entry or any(isinstance(module, getattr(nn, t)) for t in entry["op_types"])
            )
        ]
        if matching and not matching[-1].get("exclude"):
            expected[name] = matching[-1]["sparsity"]
    try:
        assert ratios(config) == expected
    except ConfigError as error:  # an entry that selects nothing is an error here
        assume("config_list only excludes" not in str(error))
        assume("is excluded" not in str(error))
        assume("no module has" not in str(error))
        assume("matches no module" not in str(error))
        raise


def test_quantization_of_2x():
    found = legacy(
        [
            {
                "quant_types": ["weight", "input", "output"],
                "quant_bits": {"weight": 8, "input": 4, "output": 8},
                "quant_dtype": {"weight": "int", "input": "uint", "output": "uint"},
                "quant_scheme": {
                    "weight": "per_channel_symmetric",
                    "input": "per_tensor_affine",
                    "output": "per_channel_affine",
                },
                "op_types": ["SubLinear"],
            }
        ],
        "quantization",
    )
    assert found == {
        Target("fc1", "weight"): QuantizationSetting(
            quant_dtype="int8", quant_scheme="symmetric", granularity="out_channel"
        ),
        Target("fc1", "_input_0"): QuantizationSetting(
            quant_dtype="uint4", quant_scheme="affine", granularity="per_tensor"
        ),
        Target("fc1", "_output_0"): QuantizationSetting(
            quant_dtype="uint8", quant_scheme="affine", granularity="per_channel"
        ),
    }


def test_quantization_defaults_of_2x():
    config = [{"quant_types": ["weight", "input"], "quant_bits": 8, "op_names": ["fc1"]}]
    found = legacy(config, "quantization")
    assert {target.name: setting.quant_dtype for target, setting in found.items()} == {
        "weight": "int8",
        "_input_0": "uint8",
    }


def test_arguments_of_the_method_are_left_out_with_a_note():
    config = [{"quant_types": ["weight"], "quant_bits": 8, "quant_start_step": 100, "op_names": ["fc1"]}]
    with pytest.warns(UserWarning, match="'quant_start_step' is an argument of the quantizer"):
        found = resolve(Small(), config, "quantization")
    assert list(found) == [Target("fc1", "weight")]


@pytest.mark.parametrize(
    ("kind", "entry", "message"),
    [
        ("pruning", {"sparsity": 1.5}, "key 'sparse_ratio': Input should be less than or equal to 1"),
        (
            "pruning",
            {"sparsity": 0.5, "total_sparsity": 0.5},
            "'sparsity', 'total_sparsity': give one of them",
        ),
        ("pruning", {"sparsity": 0.5, "quant_bits": 8}, "key 'quant_bits' belongs to quantization"),
        ("pruning", {"sparsity": 0.5, "op_nams": ["fc1"]}, "did you mean 'op_names'?"),
        (
            "quantization",
            {"quant_types": ["wieght"], "quant_bits": 8},
            "key 'quant_types': 'wieght' is not one of",
        ),
        ("quantization", {"quant_types": ["weight"], "quant_bits": 0}, "'int0' is no number format"),
        (
            "quantization",
            {"quant_types": ["weight"], "quant_bits": 8, "quant_dtype": "float"},
            "key 'quant_dtype'",
        ),
        (
            "quantization",
            {"quant_bits": 8, "quant_scheme": "per_tensor"},
            "key 'quant_scheme': 'per_tensor' is not one",
        ),
    ],
)
def test_errors_name_the_entry_as_the_user_wrote_it(kind, entry, message):
    good = {
        "pruning": {"op_names": ["fc1"], "sparsity": 0.5},
        "quantization": {"op_names": ["fc1"], "quant_types": ["weight"], "quant_bits": 8},
    }[kind]
    with pytest.raises(ConfigError) as caught:
        legacy([good, good, {"op_names": ["fc2"], **entry}, good], kind)
    assert message in str(caught.value)
    assert str(caught.value).startswith("config_list[2]")


def test_exclusions_must_select():
    with pytest.raises(ConfigError, match=r"config_list\[1\]: key 'exclude' needs op_types or op_names"):
        legacy([{"op_names": ["fc1"], "sparsity": 0.5}, {"exclude": True}])
    with pytest.raises(ConfigError, match="only excludes"):
        legacy([{"op_names": ["fc1"], "exclude": True}])


def test_modern_entries_may_stand_beside():
    found = legacy([{"op_names": ["fc1"], "sparse_ratio": 0.3}, {"op_names": ["fc2"], "sparsity": 0.4}])
    assert found[Target("fc1", "weight")] == PruningSetting(sparse_ratio=0.3)
    assert found[Target("fc2", "weight")] == PruningSetting(sparse_ratio=0.4)
