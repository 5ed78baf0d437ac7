"""Reads a recipe with a ``search`` part."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dwindle.config.errors import ConfigError
from dwindle.recipe.parsing import check_recipe
from dwindle.recipe.reader import Reader, read_text
from dwindle.recipe.schema import Recipe, SearchPart
from dwindle.recipe.searching.space import RecipeSpace, read_space
from dwindle.search.auto.limits import Limit, parse_limits

__all__ = ["RecipeSearch", "load_search", "parse_search"]


@dataclass(frozen=True)
class RecipeSearch:
    """A recipe that is searched.

    Attributes:
        text: The file.
        source: Its name.
        part: The ``search`` part.
        space: What is searched.
        limits: The budget.
        example: The recipe with the first choices.
    """

    text: str
    source: str
    part: SearchPart
    space: RecipeSpace
    limits: tuple[Limit, ...]
    example: Recipe

    def recipe(self, values: Mapping[str, Any], *, tested: bool = False) -> dict[str, Any]:
        """Return the whole recipe of a candidate, with the data that it is scored on.

        Args:
            values: A value for every path.
            tested: Score on the test data, though the search does not.
        """
        data = self.space.recipe(values)
        if self.part.evaluation == "validation":
            given = data["data"] if isinstance(data["data"], dict) else {"name": data["data"]}
            share = {"validation": self.part.validation}
            data["data"] = {**share, **given, "evaluation": "test" if tested else "validation"}
        return data


def load_search(path: str | os.PathLike[str]) -> RecipeSearch:
    """Read and check a recipe with a ``search`` part.

    Raises:
        ConfigError: The file cannot be read, has no such part, or says something it cannot say.
    """
    return parse_search(read_text(path), str(path))


def parse_search(text: str, source: str = "recipe") -> RecipeSearch:
    """Check the text of a recipe with a ``search`` part.

    Args:
        text: YAML.
        source: Name of the file, for messages.

    Raises:
        ConfigError: See :func:`load_search`.
    """
    reader, data = Reader.of_text(text, source)
    if not isinstance(data, Mapping) or "search" not in data:
        raise ConfigError(
            f"{source}: there is no 'search' part: what of the recipe is searched, and for what"
        )
    said = data["search"]
    if not isinstance(said, Mapping):
        reader.fail(("search",), f"the part 'search' must be a mapping, not {said!r}")
    part: SearchPart = reader.check(SearchPart, dict(said), ("search",))
    try:
        limits = parse_limits(part.budget) if part.budget else ()
    except ConfigError as error:
        reader.fail(("search", "budget"), str(error).removeprefix("budget: "))
    if part.drop is None and not part.budget and len(part.objective) == 1 and part.metric is None:
        reader.fail(
            ("search",), f"{part.objective[0]} alone would be least for nothing at all; give a 'drop'"
        )
    space = read_space(reader, data, part)
    example = check_recipe(space.recipe(space.first()), source)
    return RecipeSearch(text, source, part, space, limits, example)
