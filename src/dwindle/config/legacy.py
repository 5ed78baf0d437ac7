"""Lists of NNI 2.x in the words of 3.0.

=======================================  =============================================================
2.x                                      3.0
=======================================  =============================================================
``sparsity``, ``sparsity_per_layer``     ``sparse_ratio``
``total_sparsity``                       ``sparse_ratio`` and a ``global_group_id`` of the entry's own
``max_sparsity_per_layer``               ``max_sparse_ratio``
``op_partial_names: [x]``                ``op_names_re: [".*x.*"]``
``op_types: [default]``, or no ``op_*``  the types with weights that the model has
``exclude: True``                        ``exclude_op_names`` / ``_types`` / ``_names_re`` of the entries before
``quant_types``, ``quant_bits``,         ``target_names`` and ``quant_dtype``, ``quant_scheme``,
``quant_dtype``, ``quant_scheme``        ``granularity``, in ``target_settings`` where targets differ
=======================================  =============================================================

In 2.x an exclusion counts for the entries before it; a later entry may take the module in again.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dwindle.config.errors import ConfigError, did_you_mean

__all__ = ["LEGACY_KEYS", "is_legacy", "translate"]

logger = logging.getLogger(__name__)

_SHARED = ("op_partial_names", "exclude")
_RATIOS = {
    "sparsity": "sparse_ratio",
    "sparsity_per_layer": "sparse_ratio",
    "total_sparsity": "sparse_ratio",
    "max_sparsity_per_layer": "max_sparse_ratio",
}
_TARGETS = {"input": "_input_0", "weight": "weight", "output": "_output_0"}
# they were arguments of one algorithm; here they are arguments of the method, not of a target
_DROPPED = {
    "pruning": ("rho", "prune_iterations"),
    "quantization": ("quant_start_step",),
    "distillation": (),
}

LEGACY_KEYS: dict[str, tuple[str, ...]] = {
    "pruning": (*_SHARED, *_RATIOS, *_DROPPED["pruning"]),
    "quantization": (*_SHARED, "quant_types", "quant_bits", *_DROPPED["quantization"]),
    "distillation": _SHARED,
}
"""The keys that only 2.x has, by kind of method."""

DEFAULT_TYPES = (
    "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d",
    "Linear", "Bilinear", "PReLU", "Embedding", "EmbeddingBag",
)  # fmt: skip
"""What ``op_types: [default]`` meant."""


def is_legacy(entry: Mapping[str, Any], kind: str) -> bool:
    """Return whether an entry of a config_list has keys or values of 2.x."""
    if any(key in entry for key in LEGACY_KEYS[kind]) or "default" in (entry.get("op_types") or ()):
        return True
    if kind != "quantization":
        return False
    dtype, scheme = entry.get("quant_dtype"), entry.get("quant_scheme")
    return isinstance(dtype, dict) or dtype in ("int", "uint") or _legacy_scheme(scheme)


def translate(
    config_list: Sequence[Mapping[str, Any]], kind: str, model: nn.Module
) -> list[tuple[int, dict[str, Any]]]:
    """Return the entries in the words of 3.0, with a logged note for each that had to be translated.

    Args:
        config_list: Entries of 2.x or 3.0, also mixed. It is not changed.
        kind: ``pruning``, ``quantization`` or ``distillation``.
        model: The model that the names are about.

    Returns:
        Pairs of an entry's place in ``config_list`` and the entry. Exclusions are folded into the others.

    Raises:
        ConfigError: An entry of 2.x is not valid.
    """
    entries: list[tuple[int, dict[str, Any]]] = []
    for index, given in enumerate(config_list):
        if not is_legacy(given, kind):
            entries.append((index, dict(given)))
            continue
        where = f"config_list[{index}]"
        entry = _with_modern_selection(dict(given), model, where)
        if entry.pop("exclude", False):
            _exclude_from(entries, entry, model, where)
            continue
        for key in _DROPPED[kind]:
            if entry.pop(key, None) is not None:
                logger.warning("%s: key %r is an argument of the method now and is left out", where, key)
        if kind == "pruning":
            entry = _with_modern_ratios(entry, index, where)
        elif kind == "quantization":
            entry = _with_modern_numbers(entry, where)
        entries.append((index, entry))
    for index, entry in entries:
        if any(is_legacy(given, kind) for given in config_list) and entry != config_list[index]:
            logger.warning("config_list[%d] in keys of NNI 2.x; the modern form is %r", index, entry)
    return entries


def _with_modern_selection(entry: dict[str, Any], model: nn.Module, where: str) -> dict[str, Any]:
    partial = entry.pop("op_partial_names", None)
    if partial is not None:
        if isinstance(partial, str) or not all(isinstance(part, str) for part in partial):
            raise ConfigError(f"{where}: key 'op_partial_names' must be a list of texts, got {partial!r}")
        entry["op_names_re"] = [
            *entry.get("op_names_re", ()),
            *(f".*{re.escape(part)}.*" for part in partial),
        ]
    selects = any(entry.get(key) for key in ("op_types", "op_names", "op_names_re"))
    if entry.get("exclude") and not selects:
        raise ConfigError(f"{where}: 'exclude' needs op_types, op_names or op_partial_names beside it")
    if not selects or "default" in (entry.get("op_types") or ()):
        present = {base.__name__ for module in model.modules() for base in type(module).__mro__}
        named = [name for name in entry.get("op_types") or () if name != "default"]
        types = [*named, *(name for name in DEFAULT_TYPES if name in present and name not in named)]
        if not types:
            raise ConfigError(f"{where}: the model has no module of the default types of NNI 2.x")
        entry["op_types"] = types
    return entry


def _exclude_from(
    entries: list[tuple[int, dict[str, Any]]], exclusion: dict[str, Any], model: nn.Module, where: str
) -> None:
    """Subtract what an ``exclude: True`` entry selects from all entries before it."""
    unknown = set(exclusion) - {"op_types", "op_names", "op_names_re"}
    # 2.x lists often repeat the ratio on an exclusion; it never meant anything
    if unknown - {*_RATIOS, "quant_types", "quant_bits", "quant_dtype", "quant_scheme"}:
        raise ConfigError(f"{where}: an exclusion does not take {', '.join(sorted(unknown))}")
    if not entries:
        logger.warning("%s: the exclusion is the first entry, so it excludes nothing", where)
    names, patterns = exclusion.get("op_names"), exclusion.get("op_names_re")
    types = exclusion.get("op_types")
    if types and (names or patterns):  # both given means both must hold, which separate excludes cannot say
        names = [name for name, module in model.named_modules() if _selected(name, module, exclusion)]
        types = patterns = None
        if not names:
            raise ConfigError(f"{where}: the exclusion matches no module")
    found = {"exclude_op_types": types, "exclude_op_names": names, "exclude_op_names_re": patterns}
    for _, entry in entries:
        for key, values in found.items():
            if values:
                entry[key] = [*entry.get(key, ()), *values]


def _selected(name: str, module: nn.Module, exclusion: Mapping[str, Any]) -> bool:
    types = {base.__name__ for base in type(module).__mro__}
    return not types.isdisjoint(exclusion["op_types"]) and (
        name in (exclusion.get("op_names") or ())
        or any(re.fullmatch(pattern, name) for pattern in exclusion.get("op_names_re") or ())
    )


def _with_modern_ratios(entry: dict[str, Any], index: int, where: str) -> dict[str, Any]:
    given = [key for key in _RATIOS if key in entry and _RATIOS[key] == "sparse_ratio"]
    if len(given) + ("sparse_ratio" in entry) > 1:
        raise ConfigError(f"{where}: keys {', '.join(map(repr, given))} say the same thing; give one ratio")
    if "total_sparsity" in entry:
        entry.setdefault("global_group_id", f"total_sparsity_{index}")
    for old, new in _RATIOS.items():
        if old in entry:
            entry[new] = entry.pop(old)
    return entry


def _with_modern_numbers(entry: dict[str, Any], where: str) -> dict[str, Any]:
    bits, dtype, scheme = (entry.pop(key, None) for key in ("quant_bits", "quant_dtype", "quant_scheme"))
    types = entry.pop("quant_types", None)
    if types is None:
        types = list(bits) if isinstance(bits, Mapping) else ["weight"]
    if isinstance(types, str):
        raise ConfigError(f"{where}: key 'quant_types' must be a list, got {types!r}")
    for name in types:
        if name not in _TARGETS:
            raise ConfigError(
                f"{where}: key 'quant_types': {name!r} is not known{did_you_mean(name, _TARGETS)}"
            )
    settings = {
        _TARGETS[name]: _number_setting(
            name,
            _of(bits, name, "quant_bits", where),
            _of(dtype, name, "quant_dtype", where),
            _of(scheme, name, "quant_scheme", where),
            where,
        )
        for name in types
    }
    entry["target_names"] = list(settings)
    distinct = list(settings.values())
    if all(setting == distinct[0] for setting in distinct):
        entry.update(distinct[0] if distinct else {})
    else:
        entry["target_settings"] = settings
    return entry


def _of(value: Any, name: str, key: str, where: str) -> Any:
    """A 2.x value is one for all types, or a dict by type."""
    if not isinstance(value, Mapping):
        return value
    for given in value:
        if given not in _TARGETS:
            raise ConfigError(f"{where}: key {key!r}: {given!r} is not known{did_you_mean(given, _TARGETS)}")
    if name not in value:
        raise ConfigError(f"{where}: key {key!r} says nothing about {name!r}, which quant_types names")
    return value[name]


def _number_setting(name: str, bits: Any, dtype: Any, scheme: Any, where: str) -> dict[str, Any]:
    bits = 8 if bits is None else bits
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 32:
        raise ConfigError(f"{where}: key 'quant_bits' must be a whole number from 1 to 32, got {bits!r}")
    if dtype is None:
        dtype = "int" if name == "weight" else "uint"
    setting: dict[str, Any] = {"quant_dtype": f"{dtype}{bits}" if dtype in ("int", "uint") else dtype}
    if _legacy_scheme(scheme):
        granularity, _, rule = scheme.rpartition("_")
        setting["quant_scheme"] = rule
        if granularity == "per_channel":
            granularity = "out_channel" if name == "weight" else "per_channel"
        setting["granularity"] = granularity
    elif scheme is not None:
        setting["quant_scheme"] = scheme
    return setting


def _legacy_scheme(scheme: Any) -> bool:
    if isinstance(scheme, Mapping):
        return True
    return isinstance(scheme, str) and scheme.startswith(("per_tensor_", "per_channel_"))
