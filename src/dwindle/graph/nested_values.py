"""Takes nested values apart into tensors and puts them together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["Rebuild", "flatten", "open_level"]

Rebuild = Callable[[Sequence[Any]], Any]


def flatten(value: Any, path: str = "") -> tuple[list[tuple[str, Tensor]], Rebuild]:
    """Take a nested value apart.

    Dicts, lists, tuples, named tuples and dataclasses are opened; tensors are the leaves; anything else
    (numbers, strings, None) is a constant that stands in the rebuilt value as it was.

    Args:
        value: The nested value.
        path: Name of the value itself; the leaves' names are built on it with ``_``.

    Returns:
        The ``(name, tensor)`` leaves in order, and a function that rebuilds the value from as many other
        leaves.
    """
    if isinstance(value, Tensor):
        return [(path, value)], lambda leaves: leaves[0]
    keys, children, rebuild = open_level(value)
    if not keys:
        return [], lambda leaves: value
    leaves: list[tuple[str, Tensor]] = []
    parts: list[tuple[int, Rebuild]] = []
    for key, child in zip(keys, children, strict=True):
        found, rebuild_child = flatten(child, f"{path}_{key}" if path else str(key))
        leaves.extend(found)
        parts.append((len(found), rebuild_child))

    def build(new_leaves: Sequence[Any]) -> Any:
        position, built = 0, []
        for count, rebuild_child in parts:
            built.append(rebuild_child(new_leaves[position : position + count]))
            position += count
        return rebuild(built)

    return leaves, build


def open_level(value: Any) -> tuple[list[Any], list[Any], Callable[[list[Any]], Any]]:
    """Return keys, children and the constructor of one level of a nested value."""
    if isinstance(value, Mapping):
        kind, keys = type(value), list(value.keys())
        if dataclasses.is_dataclass(value):  # Hugging Face's ModelOutput is a dict and a dataclass at once
            return keys, list(value.values()), lambda parts: kind(**dict(zip(keys, parts, strict=True)))
        if kind is dict:
            return keys, list(value.values()), lambda parts: dict(zip(keys, parts, strict=True))
        return (
            keys,
            list(value.values()),
            lambda parts: _same_mapping(value, dict(zip(keys, parts, strict=True))),
        )
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        named_tuple: Any = type(value)
        return list(value._fields), list(value), lambda parts: named_tuple(*parts)
    if isinstance(value, (list, tuple)):
        container: Any = list if isinstance(value, list) else tuple
        return list(range(len(value))), list(value), lambda parts: container(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        instance = value
        return (
            names,
            [getattr(value, name) for name in names],
            lambda parts: dataclasses.replace(instance, **dict(zip(names, parts, strict=True))),
        )
    return [], [], lambda parts: value


def _same_mapping(original: Mapping[Any, Any], content: dict[Any, Any]) -> Any:
    """Rebuild a mapping in its own type where the type takes a dict (OrderedDict), else as a plain dict."""
    try:
        return type(original)(content)  # type: ignore[call-arg]
    except TypeError:
        return content
