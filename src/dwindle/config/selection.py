"""From a ``config_list`` to targets: which modules an entry selects, their targets, and the settings.

Rules where they need saying:

- ``op_types`` matches a module's class and all its base classes, so a subclass of ``nn.Linear`` is a
  ``Linear``.
- ``op_names`` and ``op_names_re`` add up; together with ``op_types`` the entry selects what is in both.
- ``op_names_re`` must match the whole name (``layer1`` is not ``layer10``).
- A module object that stands under several names is one module, known by its first name.
- A key at the top of an entry goes to every selected target that knows it; ``target_settings`` goes before
  it.
- When two entries speak about the same target, the first one holds, and a warning says so.
- Names, expressions and targets that match nothing are errors.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.config.granularity import weight_axes
from dwindle.config.legacy import is_legacy, translate
from dwindle.config.schema import Align, AnySetting, other_kind_of, setting_class, setting_keys, validate
from dwindle.config.targets import INPUT_PREFIX, Target, canonical_name, forward_arguments

SELECTION_KEYS = ("op_types", "op_names", "op_names_re")
EXCLUSION_KEYS = ("exclude_op_types", "exclude_op_names", "exclude_op_names_re")
ENTRY_KEYS = (*SELECTION_KEYS, *EXCLUSION_KEYS, "target_names", "target_settings")

#: What a bias knows of a pruning entry: it follows its weight.
_FOLLOWER_KEYS = ("align", "apply_method")


@dataclass(frozen=True)
class _Entry:
    """One dict of a config_list, with its lists checked and its settings still plain."""

    index: int
    lists: dict[str, list[str]]
    target_settings: dict[str, dict[str, Any]]
    shortcuts: dict[str, Any]

    def where(self, key: str | None = None) -> str:
        return f"config_list[{self.index}]" + (f": key {key!r}" if key else "")


class _Modules:
    """The model's modules under their first names, with every name that leads to each."""

    def __init__(self, model: nn.Module) -> None:
        self.by_name: dict[str, nn.Module] = {}
        self.first_name: dict[str, str] = {}
        seen: dict[nn.Module, str] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if "_dwindle" in name.split("."):
                continue  # simulators are no part of the user's model
            first = seen.setdefault(module, name)
            self.first_name[name] = first
            if first == name:
                self.by_name[name] = module
        self.types = {name: type_names(module) for name, module in self.by_name.items()}

    def all_types(self) -> set[str]:
        return {name for names in self.types.values() for name in names}


def type_names(module: nn.Module | type) -> set[str]:
    """Return the names of a module's class and of its base classes, short and with their Python module."""
    cls = module if isinstance(module, type) else type(module)
    bases = [base for base in cls.__mro__ if base is not object]
    return {base.__name__ for base in bases} | {f"{base.__module__}.{base.__qualname__}" for base in bases}


def resolve(
    model: nn.Module,
    config_list: Sequence[Mapping[str, Any]],
    kind: str,
    *,
    defaults: Mapping[str, Any] | None = None,
) -> dict[Target, Any]:
    """Return the setting of every target that a config_list selects.

    Args:
        model: The model; it is only read.
        config_list: Entries as dicts with NNI 3.0's keys; lists of NNI 2.x are translated, with a warning
            that shows the modern form.
        kind: ``pruning``, ``quantization`` or ``distillation``.
        defaults: Setting values for keys that an entry does not give, for targets that know them.

    Returns:
        Settings by target, in the order of ``model.named_modules()``.

    Raises:
        ConfigError: Naming the entry, the key and the nearest valid choice.
    """
    setting_class(kind)
    entries = _parse(config_list, kind)
    modules = _Modules(model)
    found: dict[Target, tuple[AnySetting, int]] = {}
    for entry in entries:
        count = 0
        selected = _selected(entry, modules)
        for target, setting in _settings(entry, selected, modules, kind, defaults or {}):
            count += 1
            if target in found:
                warnings.warn(
                    f"{target} is configured by config_list[{found[target][1]}] and config_list[{entry.index}]; "
                    f"the first one holds",
                    stacklevel=2,
                )
            else:
                found[target] = (setting, entry.index)
        if not count:
            raise ConfigError(f"{entry.where()}: {_why_nothing(selected, modules, kind)}")
    position = {name: number for number, name in enumerate(modules.by_name)}
    ordered = sorted(found, key=lambda target: position[target.module])
    return {target: found[target][0] for target in ordered}


def excluded_modules(model: nn.Module, config_list: Sequence[Mapping[str, Any]], kind: str) -> set[str]:
    """Return the first names of the modules that some entry excludes and no entry selects."""
    modules = _Modules(model)
    excluded: set[str] = set()
    selected: set[str] = set()
    for entry in _parse(config_list, kind, quiet=True):
        selected |= set(_selected(entry, modules))
        excluded |= _excluded(entry, modules)
    return excluded - selected


def _parse(config_list: Sequence[Mapping[str, Any]], kind: str, *, quiet: bool = False) -> list[_Entry]:
    if not isinstance(config_list, Sequence) or isinstance(config_list, str):
        raise ConfigError(f"config_list must be a list of dicts, got {type(config_list).__name__}")
    if not config_list:
        raise ConfigError("config_list is empty: it selects nothing")
    for index, item in enumerate(config_list):
        if not isinstance(item, Mapping):
            raise ConfigError(f"config_list[{index}] must be a dict, got {type(item).__name__}")
    if is_legacy(config_list):
        config_list = translate(config_list, kind, quiet=quiet)
    return [_parse_entry(index, item, kind) for index, item in enumerate(config_list)]


def _parse_entry(index: int, item: Mapping[str, Any], kind: str) -> _Entry:
    where = f"config_list[{index}]"
    known = [*ENTRY_KEYS, *setting_keys(kind)]
    for key in item:
        if key not in known:
            other = other_kind_of(str(key), kind)
            hint = f" (it belongs to {other})" if other else did_you_mean(str(key), known)
            raise ConfigError(f"{where}: key {key!r} is not known for {kind}{hint}")
    lists = {
        key: _names(item[key], f"{where}: key {key!r}")
        for key in (*SELECTION_KEYS, *EXCLUSION_KEYS, "target_names")
        if key in item and item[key] is not None
    }
    if not any(key in lists for key in SELECTION_KEYS):
        raise ConfigError(f"{where}: one of {', '.join(SELECTION_KEYS)} is required")
    if "target_names" in lists:
        lists["target_names"] = [canonical_name(name) for name in lists["target_names"]]
    target_settings = item.get("target_settings") or {}
    if not isinstance(target_settings, Mapping) or not all(
        isinstance(v, Mapping) for v in target_settings.values()
    ):
        raise ConfigError(f"{where}: key 'target_settings' must map target names to dicts of settings")
    shortcuts = {key: value for key, value in item.items() if key not in ENTRY_KEYS}
    settings = {canonical_name(str(name)): dict(value) for name, value in target_settings.items()}
    validate(kind, shortcuts, where)
    for name, value in settings.items():
        validate(kind, value, f"{where}: target_settings[{name!r}]")
        if "target_names" in lists and name not in lists["target_names"]:
            raise ConfigError(
                f"{where}: target_settings speaks of {name!r}, which target_names leaves out"
                f"{did_you_mean(name, lists['target_names'])}"
            )
    if kind == "quantization" and not any("quant_dtype" in own for own in (shortcuts, *settings.values())):
        raise ConfigError(f"{where}: key 'quant_dtype' is required (None leaves the targets in float)")
    return _Entry(index, lists, settings, shortcuts)


def _names(value: Any, where: str) -> list[str]:
    if isinstance(value, str | type) or not isinstance(value, Iterable):
        raise ConfigError(f"{where} must be a list, got {value!r}")
    names = [f"{item.__module__}.{item.__qualname__}" if isinstance(item, type) else item for item in value]
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(f"{where} must hold texts, got {name!r}")
    return names


def _selected(entry: _Entry, modules: _Modules) -> list[str]:
    """Return the first names of the modules an entry selects, in the model's order."""
    chosen = set(modules.by_name)
    if "op_types" in entry.lists:
        chosen &= _by_types(entry, "op_types", modules)
    if "op_names" in entry.lists or "op_names_re" in entry.lists:
        chosen &= _by_names(entry, "op_names", modules) | _by_expressions(entry, "op_names_re", modules)
    chosen -= _excluded(entry, modules)
    return [name for name in modules.by_name if name in chosen]


def _excluded(entry: _Entry, modules: _Modules) -> set[str]:
    return (
        _by_types(entry, "exclude_op_types", modules)
        | _by_names(entry, "exclude_op_names", modules)
        | _by_expressions(entry, "exclude_op_names_re", modules)
    )


def _by_types(entry: _Entry, key: str, modules: _Modules) -> set[str]:
    wanted = entry.lists.get(key, [])
    present = modules.all_types()
    for name in wanted:
        # A type of torch that this model happens not to have is fine in a list that serves many models.
        if name not in present and not hasattr(nn, name.rpartition(".")[2]):
            short = sorted(known for known in present if "." not in known)
            raise ConfigError(
                f"{entry.where(key)}: the model has no module of type {name!r}{did_you_mean(name, short)}"
            )
    return {name for name, types in modules.types.items() if types & set(wanted)}


def _by_names(entry: _Entry, key: str, modules: _Modules) -> set[str]:
    found = set()
    for name in entry.lists.get(key, []):
        if name not in modules.first_name:
            raise ConfigError(
                f"{entry.where(key)}: the model has no module {name!r}{did_you_mean(name, modules.first_name)}"
            )
        found.add(modules.first_name[name])
    return found


def _by_expressions(entry: _Entry, key: str, modules: _Modules) -> set[str]:
    found = set()
    for expression in entry.lists.get(key, []):
        try:
            pattern = re.compile(expression)
        except re.error as error:
            raise ConfigError(
                f"{entry.where(key)}: {expression!r} is no regular expression: {error}"
            ) from error
        matched = {first for name, first in modules.first_name.items() if pattern.fullmatch(name)}
        if not matched:
            hint = ""
            if any(pattern.match(name) for name in modules.first_name if name):
                hint = f"; some names begin with it: write {expression + '.*'!r} to match them"
            raise ConfigError(f"{entry.where(key)}: {expression!r} matches the whole name of no module{hint}")
        found |= matched
    return found


def _settings(
    entry: _Entry, selected: list[str], modules: _Modules, kind: str, defaults: Mapping[str, Any]
) -> Iterable[tuple[Target, AnySetting]]:
    """Yield the targets of an entry with their settings."""
    asked = entry.lists.get("target_names")
    unmatched = {name: "target_names" for name in asked or []}
    unmatched |= {name: "target_settings" for name in entry.target_settings}
    known_targets: set[str] = set()
    for name in selected:
        module = modules.by_name[name]
        available = _parameter_names(module, name, entry)
        names = asked if asked is not None else default_targets(module, kind)
        wanted = dict.fromkeys([*names, *entry.target_settings])
        known_targets |= set(available)
        for target_name in wanted:
            target = Target(name, target_name)
            if not _has(module, target, available):
                continue
            unmatched.pop(target_name, None)
            own = entry.target_settings.get(target_name, {})
            follows = (
                kind == "pruning" and target.is_parameter and follower_of(module, target_name, set(wanted))
            )
            keys = _FOLLOWER_KEYS if follows else setting_keys(kind)
            values = {key: value for key, value in {**defaults, **entry.shortcuts}.items() if key in keys}
            if follows and not any(key.startswith("sparse_") for key in own):
                values.setdefault("align", follows)
            where = f"{entry.where()}: target {target}"
            _check_align(validated := validate(kind, {**values, **own}, where), target, modules, where)
            yield target, validated
    if selected and unmatched:
        name, key = next(iter(unmatched.items()))
        hint = did_you_mean(name, {*known_targets, "_input_0", "_output_0"})
        raise ConfigError(f"{entry.where(key)}: none of the selected modules has a target {name!r}{hint}")
    _check_fused(entry, modules)


def _check_fused(entry: _Entry, modules: _Modules) -> None:
    for group in entry.shortcuts.get("fuse_names") or ():
        for name in group:
            if name not in modules.first_name:
                hint = did_you_mean(name, modules.first_name)
                raise ConfigError(f"{entry.where('fuse_names')}: the model has no module {name!r}{hint}")


def _check_align(setting: AnySetting, target: Target, modules: _Modules, where: str) -> None:
    align = getattr(setting, "align", None)
    if align is None:
        return
    source = target.module if align.module_name is None else align.module_name
    if source not in modules.first_name:
        raise ConfigError(
            f"{where}: key 'align': the model has no module {source!r}{did_you_mean(source, modules.first_name)}"
        )
    module = modules.by_name[modules.first_name[source]]
    parameter = module._parameters.get(align.target_name)
    if parameter is None:
        own = [name for name, value in module._parameters.items() if value is not None]
        raise ConfigError(
            f"{where}: key 'align': module {source!r} has no parameter {align.target_name!r}"
            f"{did_you_mean(align.target_name, own)}"
        )
    if any(not -parameter.dim() <= dim < parameter.dim() for dim in align.dims):
        raise ConfigError(
            f"{where}: key 'align': dims {list(align.dims)} do not fit shape {list(parameter.shape)}"
        )


def _parameter_names(module: nn.Module, name: str, entry: _Entry) -> list[str]:
    """Return a module's own parameters.

    Raises:
        ConfigError: One of them has no shape yet.
    """
    names = []
    for own, parameter in module._parameters.items():
        if isinstance(parameter, UninitializedParameter):
            raise ConfigError(
                f"{entry.where()}: module {name!r} is not initialized; run one forward pass first"
            )
        if parameter is not None:
            names.append(own)
    return names


def _has(module: nn.Module, target: Target, parameters: list[str]) -> bool:
    if target.is_parameter:
        return target.name in parameters
    if target.is_output:
        return target.name.removeprefix("_output_").isdigit()
    wanted = target.name.removeprefix(INPUT_PREFIX)
    kinds = {parameter.kind for parameter in inspect.signature(module.forward).parameters.values()}
    arguments = forward_arguments(module)
    if wanted.isdigit():
        return int(wanted) < len(arguments) or inspect.Parameter.VAR_POSITIONAL in kinds
    return wanted in arguments or inspect.Parameter.VAR_KEYWORD in kinds


def default_targets(module: nn.Module, kind: str) -> list[str]:
    """Return the targets of a module that an entry without ``target_names`` means.

    Pruning: all parameters of the module's own. Quantization: the weights (parameters of two and more
    dimensions) with input and output; a bias is quantized with the product of their scales by every
    runtime, so it is a target only when it is named. Distillation: the output.
    """
    parameters = [name for name, value in module._parameters.items() if value is not None]
    if kind == "distillation":
        return ["_output_0"]
    if kind == "pruning":
        return [
            name for name in parameters if "bias" not in name or follower_of(module, name, set(parameters))
        ]
    if any(base.__name__ == "NonDynamicallyQuantizableLinear" for base in type(module).__mro__):
        return ["weight"]  # attention reads the weight of this module and never calls it
    weights = [name for name in parameters if "bias" not in name]
    return ["_input_0", *weights, "_output_0"]


def follower_of(module: nn.Module, name: str, among: set[str]) -> Align | None:
    """Return how a bias follows its weight; None for anything else.

    The weight must be ``among`` the targets. The partner of ``bias`` is ``weight``, of ``bias_ih_l0``
    ``weight_ih_l0``, of ``in_proj_bias`` ``in_proj_weight``; it must have as many output channels as the bias has entries.
    """
    partner = name.replace("bias", "weight")
    bias, weight = module._parameters.get(name), module._parameters.get(partner)
    if partner == name or partner not in among or bias is None or weight is None or bias.dim() != 1:
        return None
    out_axis = weight_axes(type(module), weight.dim())[0]
    channels = weight.shape[out_axis] * (
        getattr(module, "groups", 1) if out_axis == 1 and weight.dim() > 2 else 1
    )
    return (
        Align(module_name=None, target_name=partner, dims=(out_axis,)) if channels == bias.shape[0] else None
    )


def _why_nothing(selected: list[str], modules: _Modules, kind: str) -> str:
    if not selected:
        return "it selects no module"
    name = selected[0]
    own = type(modules.by_name[name]).__name__
    if kind == "pruning":
        return (
            f"none of the {len(selected)} selected modules has parameters of its own ({name!r} is a {own}); "
            f"select what is inside with op_names_re {re.escape(name) + '[.].*'!r}"
        )
    return f"none of the selected modules has such a target (the first is {name!r}, a {own})"
