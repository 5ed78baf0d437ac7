"""Entries of a ``config_list``: their form is checked here, before any model is looked at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.config.legacy import is_legacy, translate
from dwindle.config.schema import other_kind_of, setting_keys, validate
from dwindle.config.targets import canonical_name

SELECTION_KEYS = ("op_types", "op_names", "op_names_re")
EXCLUSION_KEYS = ("exclude_op_types", "exclude_op_names", "exclude_op_names_re")
ENTRY_KEYS = (*SELECTION_KEYS, *EXCLUSION_KEYS, "target_names", "target_settings")


@dataclass(frozen=True)
class Entry:
    """One dict of a config_list, with its lists checked and its settings still plain.

    Attributes:
        index: Its place in the user's list.
        lists: Values of the keys that select modules and targets.
        target_settings: Settings by target name.
        shortcuts: Settings that go to every target that knows them.
    """

    index: int
    lists: dict[str, list[str]]
    target_settings: dict[str, dict[str, Any]]
    shortcuts: dict[str, Any]

    def where(self, key: str | None = None) -> str:
        """Return the place for a message, as in ``config_list[1]: key 'op_names'``."""
        return f"config_list[{self.index}]" + (f": key {key!r}" if key else "")


def parse_entries(
    config_list: Sequence[Mapping[str, Any]], kind: str, model: nn.Module, *, quiet: bool = False
) -> list[Entry]:
    """Check the form of a config_list.

    Args:
        config_list: Entries as dicts, in the form of NNI 3.0 or 2.x.
        kind: ``pruning``, ``quantization``, ``distillation`` or ``factorization``.
        model: The model; only lists of 2.x need it.
        quiet: Do not warn about the form of 2.x.

    Raises:
        ConfigError: Naming the entry, the key and the nearest valid key.
    """
    if isinstance(config_list, Mapping):
        raise ConfigError("config_list must be a list of dicts, got one dict; write [{...}]")
    if not isinstance(config_list, Sequence) or isinstance(config_list, str):
        raise ConfigError(f"config_list must be a list of dicts, got {type(config_list).__name__}")
    if not config_list:
        raise ConfigError("config_list is empty: it selects nothing")
    for index, item in enumerate(config_list):
        if not isinstance(item, Mapping):
            raise ConfigError(f"config_list[{index}] must be a dict, got {type(item).__name__}")
    if is_legacy(config_list) and kind != "factorization":  # NNI 2.x had no such kind
        numbered = translate(config_list, kind, model, quiet=quiet)
    else:
        numbered = list(enumerate(map(dict, config_list)))
    return [_parse(index, item, kind) for index, item in numbered]


def _parse(index: int, item: Mapping[str, Any], kind: str) -> Entry:
    where = f"config_list[{index}]"
    known = [*ENTRY_KEYS, *setting_keys(kind)]
    for key in item:
        if key not in known:
            other = other_kind_of(str(key), kind)
            hint = f" (it belongs to {other})" if other else did_you_mean(str(key), known)
            raise ConfigError(f"{where}: key {key!r} is not known for {kind}{hint}")
    lists = {
        key: _texts(item[key], f"{where}: key {key!r}")
        for key in (*SELECTION_KEYS, *EXCLUSION_KEYS, "target_names")
        if key in item and item[key] is not None
    }
    if not any(lists.get(key) for key in SELECTION_KEYS):
        raise ConfigError(f"{where}: one of {', '.join(SELECTION_KEYS)} is required")
    if "target_names" in lists:
        lists["target_names"] = [canonical_name(name) for name in lists["target_names"]]
    shortcuts = {key: value for key, value in item.items() if key not in ENTRY_KEYS}
    validate(kind, shortcuts, where)
    settings = _target_settings(item.get("target_settings"), lists.get("target_names"), kind, where)
    if kind == "quantization" and not any("quant_dtype" in own for own in (shortcuts, *settings.values())):
        raise ConfigError(f"{where}: key 'quant_dtype' is required (None leaves the targets in float)")
    return Entry(index, lists, settings, shortcuts)


def _target_settings(
    given: Any, target_names: list[str] | None, kind: str, where: str
) -> dict[str, dict[str, Any]]:
    given = {} if given is None else given
    if not isinstance(given, Mapping) or not all(isinstance(value, Mapping) for value in given.values()):
        raise ConfigError(f"{where}: key 'target_settings' must map target names to dicts of settings")
    settings = {canonical_name(str(name)): dict(value) for name, value in given.items()}
    for name, value in settings.items():
        validate(kind, value, f"{where}: target_settings[{name!r}]")
        if target_names is not None and name not in target_names:
            raise ConfigError(
                f"{where}: target_settings speaks of {name!r}, which target_names leaves out"
                f"{did_you_mean(name, target_names)}"
            )
    return settings


def _texts(value: Any, where: str) -> list[str]:
    if isinstance(value, str | type | Mapping) or not isinstance(value, Iterable):
        raise ConfigError(f"{where} must be a list, got {value!r}")
    names = [f"{item.__module__}.{item.__qualname__}" if isinstance(item, type) else item for item in value]
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(f"{where} must hold texts, got {name!r}")
    return names
