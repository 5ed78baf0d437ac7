"""Lists in the form of NNI 2.x, said in the modern form.

In 2.x a later entry overrides an earlier one, and an entry with ``exclude`` takes modules away from those
before it; here the first entry holds. A translated list is therefore in reverse order, with the exclusions
written into the entries that they apply to.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dwindle.config.errors import ConfigError, did_you_mean

#: Keys that only 2.x has.
LEGACY_KEYS = (
    "sparsity",
    "sparsity_per_layer",
    "total_sparsity",
    "max_sparsity_per_layer",
    "op_partial_names",
    "exclude",
    "quant_types",
    "quant_bits",
    "quant_start_step",
    "rho",
    "prune_iterations",
)

#: Keys of 2.x that are arguments of the method now.
_ARGUMENTS = {
    "quant_start_step": "quantizer",
    "rho": "ADMM pruner",
    "prune_iterations": "lottery ticket pruner",
}

_RATIO_KEYS = ("sparsity", "sparsity_per_layer", "total_sparsity", "sparse_ratio")

#: What ``op_types: ["default"]`` meant.
DEFAULT_TYPES = (
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Linear",
    "Bilinear",
    "PReLU",
    "Embedding",
    "EmbeddingBag",
)

_QUANT_TARGETS = {"weight": "weight", "bias": "bias", "input": "_input_0", "output": "_output_0"}


def is_legacy(config_list: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether any entry has a key that only NNI 2.x knows."""
    return any(key in entry for entry in config_list for key in LEGACY_KEYS)


def translate(
    config_list: Sequence[Mapping[str, Any]], kind: str, model: nn.Module, *, quiet: bool = False
) -> list[tuple[int, dict[str, Any]]]:
    """Return a 2.x list in the modern form; a warning shows it.

    Args:
        config_list: Entries with keys of 2.x.
        kind: ``pruning``, ``quantization`` or ``distillation``.
        model: The model, to find the modules of an exclusion by types and names together.
        quiet: Do not warn.

    Returns:
        Pairs of an entry's place in ``config_list`` and the modern entry.

    Raises:
        ConfigError: A key has a value that 2.x did not know either, or belongs to another kind.
    """
    modern: list[tuple[int, dict[str, Any]]] = []
    exclusions: dict[str, list[str]] = {}
    notes: list[str] = []
    for index in range(len(config_list) - 1, -1, -1):
        entry = dict(config_list[index])
        for key, owner in _ARGUMENTS.items():
            if key in entry:
                notes.append(f"{key!r} is an argument of the {owner} and was left out")
                del entry[key]
        _select(entry)
        if entry.pop("exclude", False):
            if not any(entry.get(key) for key in ("op_types", "op_names", "op_names_re")):
                raise ConfigError(f"config_list[{index}]: key 'exclude' needs op_types or op_names beside it")
            _collect_exclusion(entry, exclusions, model, f"config_list[{index}]")
            continue
        for key, names in exclusions.items():
            entry[key] = [*entry.get(key, []), *names]
        translated = _quantization(entry, index) if kind == "quantization" else _pruning(entry, index)
        modern.extend((index, item) for item in translated)
    if not modern:
        raise ConfigError("config_list only excludes: it selects nothing")
    if not quiet:
        note = "; ".join(["", *notes]) if notes else ""
        shown = [item for _, item in modern]
        warnings.warn(f"config_list has the form of NNI 2.x; the modern form is {shown}{note}", stacklevel=4)
    return modern


def _select(entry: dict[str, Any]) -> None:
    """Translate the keys that select modules, in place."""
    if "op_partial_names" in entry:
        parts = [f".*{re.escape(part)}.*" for part in entry.pop("op_partial_names")]
        entry["op_names_re"] = [*entry.get("op_names_re", []), *parts]
    if isinstance(entry.get("op_types"), str):  # the documents of 2.x write "op_types": "default"
        entry["op_types"] = [entry["op_types"]]
    if "default" in (entry.get("op_types") or ()):
        others = [name for name in entry["op_types"] if name != "default"]
        entry["op_types"] = [*others, *DEFAULT_TYPES]


def _collect_exclusion(
    entry: Mapping[str, Any], exclusions: dict[str, list[str]], model: nn.Module, where: str
) -> None:
    """Note what is excluded from all entries before this one."""
    found = {key: list(entry.get(key) or ()) for key in ("op_types", "op_names", "op_names_re")}
    if found["op_types"] and (found["op_names"] or found["op_names_re"]):
        # modules that match both: separate exclusions cannot say that, so the names are written out
        names = [
            name
            for name, module in model.named_modules()
            if {base.__name__ for base in type(module).__mro__} & set(found["op_types"])
            and (name in found["op_names"] or any(re.fullmatch(part, name) for part in found["op_names_re"]))
        ]
        if not names:
            raise ConfigError(f"{where}: the exclusion matches no module")
        found = {"op_names": names}
    for key, values in found.items():
        if values:
            exclusions.setdefault(f"exclude_{key}", []).extend(values)


def _pruning(entry: dict[str, Any], index: int) -> list[dict[str, Any]]:
    """Translate the keys of pruning."""
    for key in ("quant_types", "quant_bits"):
        if key in entry:
            raise ConfigError(f"config_list[{index}]: key {key!r} belongs to quantization")
    ratios = [key for key in _RATIO_KEYS if key in entry]
    if len(ratios) > 1:
        raise ConfigError(f"config_list[{index}]: keys {', '.join(map(repr, ratios))}: give one of them")
    total = entry.pop("total_sparsity", None)
    for key in ("sparsity_per_layer", "sparsity"):
        if key in entry:
            entry["sparse_ratio"] = entry.pop(key)
    if total is not None:
        entry["sparse_ratio"] = total
        entry["global_group_id"] = f"total_sparsity_{index}"
    largest = entry.pop("max_sparsity_per_layer", None)
    if not isinstance(largest, Mapping):
        if largest is not None:
            entry["max_sparse_ratio"] = largest
        return [entry]
    single = [{**entry, "op_names": [name], "max_sparse_ratio": ratio} for name, ratio in largest.items()]
    for item in single:
        item.pop("op_names_re", None)
    rest = {**entry, "exclude_op_names": [*entry.get("exclude_op_names", []), *largest]}
    listed = entry.get("op_names")
    covered = listed is not None and set(listed) <= set(largest) and "op_names_re" not in entry
    return single if covered else [*single, rest]


def _quantization(entry: dict[str, Any], index: int) -> list[dict[str, Any]]:
    """Translate the keys of quantization."""
    where = f"config_list[{index}]"
    if "quant_types" not in entry and "quant_bits" not in entry:
        return [entry]
    for key in ("sparsity", "sparsity_per_layer", "total_sparsity", "max_sparsity_per_layer"):
        if key in entry:
            raise ConfigError(f"{where}: key {key!r} belongs to pruning")
    bits, dtypes, schemes = (entry.pop(key, None) for key in ("quant_bits", "quant_dtype", "quant_scheme"))
    types = entry.pop("quant_types", None) or (list(bits) if isinstance(bits, Mapping) else ["weight"])
    settings = {}
    for name in types:
        if name not in _QUANT_TARGETS:
            hint = did_you_mean(str(name), _QUANT_TARGETS)
            raise ConfigError(
                f"{where}: key 'quant_types': {name!r} is not one of {', '.join(_QUANT_TARGETS)}{hint}"
            )
        settings[_QUANT_TARGETS[name]] = _quant_setting(name, bits, dtypes, schemes, where)
    return [{**entry, "target_names": list(settings), "target_settings": settings}]


def _quant_setting(name: str, bits: Any, dtypes: Any, schemes: Any, where: str) -> dict[str, Any]:
    """Return the modern setting of weight, input or output; a 2.x value is one for all, or a dict by name."""
    own_bits, dtype, scheme = (
        value.get(name) if isinstance(value, Mapping) else value for value in (bits, dtypes, schemes)
    )
    weight = name in ("weight", "bias")
    dtype = dtype or ("int" if weight else "uint")
    if dtype not in ("int", "uint"):
        raise ConfigError(f"{where}: key 'quant_dtype': {dtype!r} is not 'int' or 'uint'")
    setting = {"quant_dtype": f"{dtype}{8 if own_bits is None else own_bits}"}
    explicit = scheme is not None
    scheme = scheme or ("per_tensor_symmetric" if weight else "per_tensor_affine")
    match = re.fullmatch(r"per_(tensor|channel)_(affine|symmetric)", str(scheme))
    if not match:
        choices = [
            f"per_{block}_{rule}" for block in ("tensor", "channel") for rule in ("affine", "symmetric")
        ]
        raise ConfigError(
            f"{where}: key 'quant_scheme': {scheme!r} is not one of {', '.join(choices)}"
            f"{did_you_mean(str(scheme), choices)}"
        )
    setting["quant_scheme"] = match[2]
    if match[1] == "channel":
        setting["granularity"] = "out_channel" if weight else "per_channel"
    elif explicit:
        setting["granularity"] = "per_tensor"
    return setting
