"""Puts tags on the integers of a model for the length of a recording, and takes them off again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dwindle.graph import expressions
from dwindle.graph.expressions import Attribute, TaggedFloat, TaggedInt

#: Attributes of modules that hold integers but never a size.
_NEVER_SIZES = frozenset(
    {
        "stride",
        "padding",
        "dilation",
        "output_padding",
        "kernel_size",
        "_reversed_padding_repeated_twice",
        "training",
    }
)


def config_objects(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield ``(attribute name, object)`` for plain objects on a module that hold settings as attributes."""
    for name, held in vars(module).items():
        kind = type(held)
        if kind.__name__.endswith(("Config", "Args", "Arguments", "Params")) or name in (
            "config",
            "cfg",
            "args",
        ):
            try:
                vars(held)
            except TypeError:
                continue
            if not isinstance(held, nn.Module | torch.Tensor | type):
                yield name, held


def _tagged(held: Any, owner: int, key: str, label: str) -> Any:
    """Return a tagged copy of a number or of a tuple or list of integers; None when it holds none."""
    if type(held) is int:
        return TaggedInt(held, Attribute(owner, key, None, label, held)) if held > 1 else None
    if type(held) is float:
        plain = held in (0.0, 1.0) or not math.isfinite(held)
        return None if plain else TaggedFloat(held, Attribute(owner, key, None, label, held))
    if type(held) in (tuple, list) and held and len(held) <= 16 and all(type(item) is int for item in held):
        items = [
            TaggedInt(item, Attribute(owner, key, index, f"{label}[{index}]", item)) if item > 1 else item
            for index, item in enumerate(held)
        ]
        return type(held)(items)
    if type(held) is torch.Size:
        return tuple(_tagged(tuple(held), owner, key, label))
    return None


@contextmanager
def tagged_integers(model: nn.Module) -> Iterator[dict[int, tuple[str, Any]]]:
    """Tag the integers of every module and config of ``model``, and the floats of modules.

    On exit everything is as it was.

    Yields:
        For each owner's identity, its path and the object itself.
    """
    owners: dict[int, tuple[str, Any]] = {}
    restore: list[tuple[dict[str, Any], str, Any]] = []
    pairs: list[tuple[str, Any]] = []
    for path, module in model.named_modules():
        pairs.append((path, module))
        pairs += [(f"{path}.{name}" if path else name, held) for name, held in config_objects(module)]
    try:
        for path, owner in pairs:
            if id(owner) in owners:
                continue
            owners[id(owner)] = (path, owner)
            fields = vars(owner)
            prefix = f"{path}." if path else ""
            for key, held in fields.items():
                if key in _NEVER_SIZES or (type(held) is float and not isinstance(owner, nn.Module)):
                    continue
                copy = _tagged(held, id(owner), key, prefix + key)
                if copy is not None:
                    restore.append((fields, key, held))
            for key in [entry[1] for entry in restore if entry[0] is fields]:
                fields[key] = _tagged(fields[key], id(owner), key, prefix + key)
        original_sqrt = math.sqrt
        math.sqrt = expressions.tagged_sqrt
        try:
            yield owners
        finally:
            math.sqrt = original_sqrt
    finally:
        for fields, key, held in restore:
            fields[key] = held
