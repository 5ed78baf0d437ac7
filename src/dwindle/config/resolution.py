"""From a ``config_list`` to the setting of every target.

- A key at the top of an entry goes to every selected target that knows it: a bias that follows its weight
  does not know ratios. ``target_settings`` goes before it, ``defaults`` stand behind it.
- When two entries speak about the same target, the first one holds, as in NNI 3.0, and a warning says so.
- Targets that match nothing, and entries that say nothing, are errors.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from dwindle.config.entries import Entry, parse_entries
from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.config.schema import Align, AnySetting, PruningSetting, setting_class, setting_keys, validate
from dwindle.config.selection import ModuleIndex, excluded_by, selected_modules
from dwindle.config.target_rules import default_targets, follower_of, has_target, known_targets, shape_of
from dwindle.config.targets import Target, parameter_names

#: What a bias knows of a pruning entry: it follows its weight.
_FOLLOWER_KEYS = ("align", "apply_method")
_GOALS = ("sparse_ratio", "sparse_threshold")


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
        kind: ``pruning``, ``quantization``, ``distillation`` or ``factorization``.
        defaults: Setting values for keys that an entry does not give, for targets that know them.

    Returns:
        Settings by target, in the order of ``model.named_modules()``.

    Raises:
        ConfigError: Naming the entry, the key and the nearest valid choice.
    """
    setting_class(kind)
    validate(kind, defaults or {}, "defaults")
    entries = parse_entries(config_list, kind, model)
    modules = ModuleIndex(model)
    found: dict[Target, tuple[AnySetting, int]] = {}
    for entry in entries:
        selected = selected_modules(entry, modules)
        settings = dict(_settings(entry, selected, modules, kind, defaults or {}))
        _check_says_something(entry, settings, selected, modules, kind)
        for target, setting in settings.items():
            if target not in found:
                found[target] = (setting, entry.index)
            elif found[target][0] != setting:
                holds = f"config_list[{found[target][1]}]"
                warnings.warn(
                    f"{target} is configured by {holds} and config_list[{entry.index}]; {holds} holds",
                    stacklevel=2,
                )
    position = {name: number for number, name in enumerate(modules.by_name)}
    ordered = sorted(found, key=lambda target: position[target.module])
    return {target: found[target][0] for target in ordered}


def excluded_modules(model: nn.Module, config_list: Sequence[Mapping[str, Any]], kind: str) -> set[str]:
    """Return the first names of the modules that some entry excludes and no entry selects.

    Args:
        model: The model; it is only read.
        config_list: As :func:`resolve` takes it.
        kind: ``pruning``, ``quantization``, ``distillation`` or ``factorization``.
    """
    modules = ModuleIndex(model)
    excluded: set[str] = set()
    selected: set[str] = set()
    for entry in parse_entries(config_list, kind, model, quiet=True):
        selected |= set(selected_modules(entry, modules))
        excluded |= excluded_by(entry, modules)
    return excluded - selected


def _settings(
    entry: Entry, selected: list[str], modules: ModuleIndex, kind: str, defaults: Mapping[str, Any]
) -> Iterator[tuple[Target, AnySetting]]:
    """Yield the targets of an entry with their settings."""
    asked = entry.lists.get("target_names")
    unmatched = dict.fromkeys(entry.target_settings, "target_settings")
    unmatched |= dict.fromkeys(asked or [], "target_names")
    for name in selected:
        module = modules.by_name[name]
        try:
            names = asked if asked is not None else default_targets(module, kind)
            wanted = [
                own for own in dict.fromkeys([*names, *entry.target_settings]) if has_target(module, own)
            ]
        except ConfigError as error:
            raise ConfigError(f"{entry.where()}: module {name!r}: {error}") from error
        for target_name in wanted:
            unmatched.pop(target_name, None)
            target = Target(name, target_name)
            values = _values(entry, target, module, set(wanted), kind, defaults)
            if kind == "quantization" and "quant_dtype" not in values:
                if asked is None:
                    continue  # the entry speaks of other targets of this module
                raise ConfigError(f"{entry.where()}: target {target}: key 'quant_dtype' is required")
            where = f"{entry.where()}: target {target}"
            setting = validate(kind, values, where)
            _check_align(setting, target, modules, where)
            yield target, setting
    if unmatched:
        missing, key = next(iter(unmatched.items()))
        choices = {known for name in selected for known in known_targets(modules.by_name[name])}
        hint = did_you_mean(missing, sorted(choices))
        raise ConfigError(f"{entry.where(key)}: none of the selected modules has a target {missing!r}{hint}")
    _check_fused(entry, modules)


def _values(
    entry: Entry, target: Target, module: nn.Module, among: set[str], kind: str, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the plain setting of one target: defaults, then the entry's own keys, then target_settings."""
    own = entry.target_settings.get(target.name, {})
    follows = follower_of(module, target.name, among) if kind == "pruning" and target.is_parameter else None
    keys = _FOLLOWER_KEYS if follows else setting_keys(kind)
    values: dict[str, Any] = {}
    for layer in (defaults, entry.shortcuts):
        values = _override(values, {key: value for key, value in layer.items() if key in keys})
    if _is_itself(values.get("align"), target):
        del values["align"]
    if follows and not any(own.get(key) is not None for key in _GOALS):
        values.setdefault("align", follows)
    return _override(values, own)


def _override(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` with ``over`` on top; a ratio takes the place of a threshold, and the other way."""
    merged = {**values, **over}
    goals = [key for key in _GOALS if over.get(key) is not None]
    if len(goals) == 1:
        for key in _GOALS:
            if key not in over:
                merged.pop(key, None)
    return merged


def _is_itself(align: Any, target: Target) -> bool:
    """Whether an alignment at the top of an entry would make its own source follow itself."""
    if align is None:
        return False
    checked = align if isinstance(align, Align) else Align.model_validate(align)
    return checked.target_name == target.name and checked.module_name in (None, target.module)


def _check_says_something(
    entry: Entry,
    settings: Mapping[Target, AnySetting],
    selected: list[str],
    modules: ModuleIndex,
    kind: str,
) -> None:
    explicit = [modules.first_name[name] for name in entry.lists.get("op_names", [])]
    covered = {target.module for target in settings}
    empty = [name for name in selected if name not in covered]
    for name in empty if not settings else [name for name in empty if name in explicit]:
        own = type(modules.by_name[name]).__name__
        if "target_names" in entry.lists:
            missing = f"none of the targets {entry.lists['target_names']}"
            raise ConfigError(f"{entry.where('op_names')}: module {name!r} ({own}) has {missing}")
        hint = ""
        if any(modules.by_name[name].children()):
            inside = f"op_names_re {re.escape(name) + '[.].*'!r}" if name else "op_types"
            hint = f"; select what is inside with {inside}"
        raise ConfigError(f"{entry.where()}: module {name!r} ({own}) has no parameters of its own{hint}")
    pruned = [setting for setting in settings.values() if isinstance(setting, PruningSetting)]
    follows = any("align" in values for values in (entry.shortcuts, *entry.target_settings.values()))
    if pruned and not follows and not any(setting.has_goal for setting in pruned):
        raise ConfigError(f"{entry.where()}: sparse_ratio or sparse_threshold is required")


def _check_fused(entry: Entry, modules: ModuleIndex) -> None:
    for group in entry.shortcuts.get("fuse_names") or ():
        for name in group:
            if name not in modules.first_name:
                hint = did_you_mean(name, modules.first_name)
                raise ConfigError(f"{entry.where('fuse_names')}: the model has no module {name!r}{hint}")


def _check_align(setting: AnySetting, target: Target, modules: ModuleIndex, where: str) -> None:
    align = getattr(setting, "align", None)
    if align is None:
        return
    where = f"{where}: key 'align'"
    source = target.module if align.module_name is None else align.module_name
    if source not in modules.first_name:
        hint = did_you_mean(source, modules.first_name)
        raise ConfigError(f"{where}: the model has no module {source!r}{hint}")
    module = modules.by_name[modules.first_name[source]]
    if not Target(source, align.target_name).is_parameter:
        return
    shape = shape_of(module, align.target_name)
    if shape is None:
        hint = did_you_mean(align.target_name, parameter_names(module))
        raise ConfigError(f"{where}: module {source!r} has no parameter {align.target_name!r}{hint}")
    if any(not -len(shape) <= dim < len(shape) for dim in align.dims):
        raise ConfigError(f"{where}: dims {list(align.dims)} do not fit shape {list(shape)}")
