"""Reads a list of compression algorithms, alone in a file or inside a stage."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from dwindle.recipe.reader import Location, Reader, read_text
from dwindle.recipe.schema.compression import ALGORITHMS, Algorithm, CompressionRecipe

__all__ = ["read_algorithms", "read_compression"]


def read_compression(recipe: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[CompressionRecipe, Reader]:
    """Read a file (or a mapping) that drives a training script.

    Returns:
        What it says, and the reader, for messages about what is found later.

    Raises:
        ConfigError: It cannot be read, or says something that it cannot say.
    """
    if isinstance(recipe, Mapping):
        reader, data = Reader("recipe"), dict(recipe)
    else:
        reader, data = Reader.of_text(read_text(recipe), str(recipe))
    known = ", ".join(CompressionRecipe.model_fields)
    if isinstance(data, Sequence) and not isinstance(data, str):
        reader.fail((), "a bare list; put it below the key 'compression'")
    if not isinstance(data, Mapping):
        reader.fail((), f"a recipe is a mapping with the keys {known}")
    if "stages" in data:
        reader.fail(
            ("stages",),
            "this is a recipe for `dwindle run`, which trains by itself; a training script is driven by a list of "
            "algorithms under the key 'compression'",
        )
    algorithms = read_algorithms(reader, data.get("compression"), ("compression",))
    checked: CompressionRecipe = reader.check(CompressionRecipe, {**data, "compression": algorithms}, ())
    return checked, reader


def read_algorithms(reader: Reader, entries: Any, location: Location) -> tuple[Algorithm, ...]:
    """Read the list itself.

    Raises:
        ConfigError: An entry is not valid; the message names it.
    """
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        reader.fail(location, f"a list of algorithms is needed, of the kinds {', '.join(ALGORITHMS)}")
    found = []
    for position, entry in enumerate(entries):
        kind, body = reader.entry(entry, (*location, position), ALGORITHMS, "algorithm")
        found.append(reader.check(ALGORITHMS[kind], body, (*location, position, kind)))
    return tuple(found)
