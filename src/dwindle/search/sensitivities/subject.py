"""The one form of all kinds of compression: targets, their levels, and a model with one target at one level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from dwindle.config.entries import parse_entries
from dwindle.config.errors import ConfigError
from dwindle.config.selection import ModuleIndex, selected_modules
from dwindle.search.sensitivities.points import Level, SensitivityTarget

__all__ = ["Selection", "Subject", "selection_of"]

Selection = frozenset[str] | None
"""Names of modules; None is every module."""


class Subject(Protocol):
    """One kind of compression of one model.

    Attributes:
        kind: One of :data:`~dwindle.search.sensitivities.points.KINDS`.
        options: What a point of this kind depends on besides its target and level, as plain data.
        targets: What can be compressed alone.
        notes: What the user should know.
    """

    kind: str
    options: dict[str, Any]
    targets: tuple[SensitivityTarget, ...]
    notes: list[str]

    def levels(self, target: str) -> Sequence[Level]:
        """Return the levels of a target, the mildest first."""

    def variant(self, target: str, level: Level) -> AbstractContextManager[nn.Module]:
        """Give, for the time of the block, a model with one target at one level; not the user's own."""


def selection_of(model: nn.Module, config_list: Sequence[Mapping[str, Any]] | None) -> Selection:
    """Return the modules that a config_list selects.

    Args:
        model: The model.
        config_list: Entries with keys that select or exclude modules, and no settings; None selects everything.

    Raises:
        ConfigError: An entry is not valid, or says settings.
    """
    if config_list is None:
        return None
    modules = ModuleIndex(model)
    chosen: set[str] = set()
    for entry in parse_entries(config_list, "factorization", model):
        said = [
            *entry.shortcuts,
            *entry.target_settings,
            *(["target_names"] * ("target_names" in entry.lists)),
        ]
        if said:
            raise ConfigError(
                f"{entry.where(said[0])}: this config_list only selects modules; levels are arguments of their own"
            )
        first = set(selected_modules(entry, modules))
        chosen |= {name for name, own in modules.first_name.items() if own in first}
    return frozenset(chosen)
