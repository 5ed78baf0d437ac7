"""Which modules of a model an entry of a ``config_list`` selects.

- ``op_types`` matches a module's class and all its base classes, so a subclass of ``nn.Linear`` is a
  ``Linear``. A type of torch that the model does not have is no error as long as the entry selects something.
- ``op_names`` and ``op_names_re`` add up; together with ``op_types`` the entry selects what is in both.
- ``op_names_re`` must match the whole name (``layer1`` is not ``layer10``), and never means the model itself.
- A module object that stands under several names is one module, known by its first name.
- What ``exclude_...`` matches is taken away at the end.
"""

from __future__ import annotations

import re

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from dwindle.config.entries import SELECTION_KEYS, Entry
from dwindle.config.errors import ConfigError, did_you_mean


class ModuleIndex:
    """The model's own modules under their first names, with every name that leads to each.

    Attributes:
        by_name: Module by first name, in the order of ``named_modules()``.
        first_name: First name by any name.
        types: Names of the classes of each module, by first name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.by_name: dict[str, nn.Module] = {}
        self.first_name: dict[str, str] = {}
        seen: dict[int, str] = {}
        hidden: tuple[str, ...] = ()
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, ParametrizationList):
                # what dwindle (or anyone) put on a parameter is no part of the user's model
                hidden = (*hidden, name.rpartition(".")[0] + ".")
                continue
            if any(name.startswith(prefix) for prefix in hidden) or "_dwindle" in name.split("."):
                continue
            first = seen.setdefault(id(module), name)
            self.first_name[name] = first
            if first == name:
                self.by_name[name] = module
        for prefix in hidden:  # the ModuleDict that holds the lists comes before them
            self.by_name.pop(prefix.removesuffix("."), None)
            self.first_name.pop(prefix.removesuffix("."), None)
        self.types = {name: type_names(module) for name, module in self.by_name.items()}

    def all_types(self) -> set[str]:
        """Return the names of all classes that occur."""
        return {name for names in self.types.values() for name in names}

    def own_types(self) -> list[str]:
        """Return the short names of the modules' own classes."""
        return sorted({type(module).__name__ for module in self.by_name.values()})


def type_names(module: nn.Module | type) -> set[str]:
    """Return the names of a module's class and of its base classes, short and with their Python module."""
    cls = module if isinstance(module, type) else type(module)
    bases = [base for base in cls.__mro__ if base is not object]
    return {base.__name__ for base in bases} | {f"{base.__module__}.{base.__qualname__}" for base in bases}


def selected_modules(entry: Entry, modules: ModuleIndex) -> list[str]:
    """Return the first names of the modules an entry selects, in the model's order.

    Raises:
        ConfigError: A name, type or expression matches nothing, or all together select no module.
    """
    chosen = set(modules.by_name)
    if "op_types" in entry.lists:
        chosen &= _by_types(entry, "op_types", modules)
    if "op_names" in entry.lists or "op_names_re" in entry.lists:
        chosen &= _by_names(entry, "op_names", modules) | _by_expressions(entry, "op_names_re", modules)
    excluded = excluded_by(entry, modules)
    if not chosen - excluded:
        given = " and ".join(f"{key} {entry.lists[key]}" for key in SELECTION_KEYS if key in entry.lists)
        reason = "everything it selects is excluded" if chosen else f"no module has {given}"
        raise ConfigError(f"{entry.where()}: {reason}{_present(entry, chosen, modules)}")
    return [name for name in modules.by_name if name in chosen - excluded]


def excluded_by(entry: Entry, modules: ModuleIndex) -> set[str]:
    """Return the first names of the modules an entry excludes.

    Raises:
        ConfigError: A name, type or expression matches nothing.
    """
    return (
        _by_types(entry, "exclude_op_types", modules)
        | _by_names(entry, "exclude_op_names", modules)
        | _by_expressions(entry, "exclude_op_names_re", modules)
    )


def _present(entry: Entry, chosen: set[str], modules: ModuleIndex) -> str:
    if chosen or "op_types" not in entry.lists:
        return ""
    return f"; the model's types are {', '.join(modules.own_types())}"


def _by_types(entry: Entry, key: str, modules: ModuleIndex) -> set[str]:
    wanted = entry.lists.get(key, [])
    present = modules.all_types()
    for name in wanted:
        # a type of torch that this model happens not to have is fine in a list that serves many models
        short = name.rpartition(".")[2]
        if name not in present and not isinstance(getattr(nn, short, None), type):
            known = sorted(known for known in present if "." not in known)
            raise ConfigError(
                f"{entry.where(key)}: the model has no module of type {name!r}{did_you_mean(short, known)}"
            )
    return {name for name, types in modules.types.items() if types & set(wanted)}


def _by_names(entry: Entry, key: str, modules: ModuleIndex) -> set[str]:
    found = set()
    for name in entry.lists.get(key, []):
        if name not in modules.first_name:
            hint = did_you_mean(name, modules.first_name)
            raise ConfigError(f"{entry.where(key)}: the model has no module {name!r}{hint}")
        found.add(modules.first_name[name])
    return found


def _by_expressions(entry: Entry, key: str, modules: ModuleIndex) -> set[str]:
    found = set()
    names = {name: first for name, first in modules.first_name.items() if name or len(modules.by_name) == 1}
    for expression in entry.lists.get(key, []):
        try:
            pattern = re.compile(expression)
        except re.error as error:
            raise ConfigError(
                f"{entry.where(key)}: {expression!r} is no regular expression: {error}"
            ) from error
        matched = {first for name, first in names.items() if pattern.fullmatch(name)}
        if not matched:
            hint = did_you_mean(expression, names)
            if any(pattern.match(name) for name in names):
                hint = f"; some names begin with it: write {expression + '.*'!r} to match them"
            raise ConfigError(f"{entry.where(key)}: {expression!r} matches the whole name of no module{hint}")
        found |= matched
    return found
