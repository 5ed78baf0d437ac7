"""Places in a recipe: ``stages.prune.ratio``, ``stages.finetune.compression.pruning.config_list.0.sparse_ratio``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dwindle.config.errors import did_you_mean

__all__ = ["entry_name", "replace_at"]


def replace_at(data: Any, path: str, value: Any) -> Any:
    """Return a recipe with another value at a place.

    A part of the path is a key, the number of an entry of a list (from 0), or the name of an entry such as
    ``prune: {...}``: its kind, or its own ``name``. The last key may be new; what is above it must be there.

    Args:
        data: The recipe as plain data; it is not changed.
        path: The place.
        value: What stands there now.

    Raises:
        ValueError: There is no such place; the message has the nearest.
    """
    return _replaced(data, path.split("."), 0, value)


def entry_name(entry: Any) -> str | None:
    """Return what an entry of a list is called: its ``name``, or its kind; None when it is no such entry."""
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, Mapping) or len(entry) != 1:
        return None
    kind, body = next(iter(entry.items()))
    own = body.get("name") if isinstance(body, Mapping) else None
    return str(own or kind)


def _replaced(data: Any, parts: list[str], at: int, value: Any) -> Any:
    if at == len(parts):
        return value
    part = parts[at]
    before = ".".join(parts[:at]) or "the recipe"
    if isinstance(data, list):
        position = _position(data, part, before)
        found = list(data)
        entry = data[position]
        if part.isdigit() and entry_name(entry) != part:
            found[position] = _replaced(entry, parts, at + 1, value)
        elif at + 1 == len(parts):
            raise ValueError(f"{'.'.join(parts)!r} is a whole entry; name a key of it")
        else:
            kind, body = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
            found[position] = {kind: _replaced(body if body is not None else {}, parts, at + 1, value)}
        return found
    if isinstance(data, Mapping):
        if part not in data and at + 1 < len(parts):
            raise ValueError(f"{before} has no {part!r}{did_you_mean(part, [str(key) for key in data])}")
        return {**data, part: _replaced(data.get(part), parts, at + 1, value)}
    raise ValueError(f"{before} is {data!r}, in which there is no {part!r}")


def _position(data: list[Any], part: str, before: str) -> int:
    names = [entry_name(entry) for entry in data]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(data):
        return int(part)
    known = [name for name in names if name is not None]
    raise ValueError(f"{before} has no entry {part!r}{did_you_mean(part, known)}")
