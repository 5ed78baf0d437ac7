"""What of a recipe is searched: values by their paths, values where they stand, and the order of stages."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.recipe.parsing import check_recipe
from dwindle.recipe.reader import Location, Reader
from dwindle.recipe.schema import SearchPart
from dwindle.recipe.searching.choices import Choice, Order, read_choice
from dwindle.recipe.searching.paths import entry_name, replace_at

__all__ = ["ORDER", "RecipeSpace", "read_space"]

ORDER = "order"
_MARK = "search"
_MOST_ORDERED = 4


@dataclass(frozen=True)
class RecipeSpace:
    """A recipe with open places.

    Attributes:
        base: The recipe without its ``search`` part; open places that were marked where they stand still hold marks.
        marked: Those by their path, each the way to it.
        choices: What may stand in each open place, by path.
        source: Name of the file, for messages.
    """

    base: Mapping[str, Any]
    marked: Mapping[str, Location]
    choices: Mapping[str, Choice]
    source: str

    def suggest(self, trial: Any) -> dict[str, Any]:
        """Ask an Optuna trial for a value for each place."""
        return {path: choice.suggest(trial, path) for path, choice in self.choices.items()}

    def parameters(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters of a trial that gives values by path.

        Raises:
            ConfigError: A path is not searched, or a value is none of its choices.
        """
        found = {}
        for path, value in values.items():
            if path not in self.choices:
                raise ConfigError(
                    f"{self.source}: search.enqueue: {path!r} is not searched{did_you_mean(path, self.choices)}"
                )
            try:
                found[path] = self.choices[path].parameter(value)
            except ValueError as error:
                raise ConfigError(f"{self.source}: search.enqueue: {path}: {error}") from None
        return found

    def recipe(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the whole recipe with values in its open places.

        Args:
            values: A value for every path.

        Raises:
            ConfigError: A place is not there any more.
        """
        data: Any = copy.deepcopy(dict(self.base))
        # By path first: the ways to marks count entries, and so do not change before marked entries are left out.
        for path in self.marked:
            data = _placed(data, self.marked[path], values[path])
        for path, value in values.items():
            if path not in self.marked and path != ORDER:
                data = replace_at(data, path, value)
        data["stages"] = [stage for stage in data["stages"] if stage is not None]
        if ORDER in values:
            data["stages"] = _ordered(data["stages"], values[ORDER])
        return data

    def first(self) -> dict[str, Any]:
        """The first example of every place."""
        return {path: next(choice.examples()) for path, choice in self.choices.items()}

    def shared_stages(self) -> int:
        """Return how many stages at the beginning are the same in all candidates."""
        values = self.first()
        plain = self.recipe(values)
        others = [self.recipe({**values, path: value}) for path, value in self._others(values)]
        if any({**other, "stages": 0} != {**plain, "stages": 0} for other in others):
            return 0
        count = len(plain["stages"])
        for other in others:
            same = 0
            for first, second in zip(plain["stages"], other["stages"], strict=False):
                if first != second:
                    break
                same += 1
            count = min(count, same)
        return count

    def _others(self, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for path, choice in self.choices.items():
            for value in choice.examples():
                if value != values[path]:
                    yield path, value


def read_space(reader: Reader, data: Mapping[str, Any], part: SearchPart) -> RecipeSpace:
    """Find the open places of a recipe, and check that every choice gives a recipe that can be run.

    Args:
        reader: Knows the lines.
        data: The recipe as plain data.
        part: Its ``search`` part.

    Raises:
        ConfigError: A place is not there, a choice means nothing, or nothing is searched.
    """
    base = {key: value for key, value in data.items() if key != _MARK}
    if not isinstance(base.get("stages"), list):
        reader.fail(("stages",), "a recipe needs a list of stages")
    choices: dict[str, Choice] = {}
    marked: dict[str, Location] = {}
    for location, said in _marks(base, ()):
        path = _path_of(base, location)
        marked[path] = location
        choices[path] = _read(reader, said, (*location, _MARK))
    for path, said in part.space.items():
        if path in choices:
            reader.fail((_MARK, "space", path), f"{path!r} is searched where it stands, too; say it once")
        choices[path] = _read(reader, said, (_MARK, "space", path))
    space = RecipeSpace(base, marked, choices, reader.source)
    _check_paths(reader, space, part)
    if part.order:
        space = _with_order(reader, space, part.order)
    if not space.choices:
        reader.fail(
            (_MARK,), "nothing is searched: give 'space', or mark values where they stand: {search: [...]}"
        )
    _check_examples(reader, space)
    return space


def _read(reader: Reader, said: Any, location: Location) -> Choice:
    try:
        return read_choice(said)
    except ValueError as error:
        reader.fail(location, str(error))


def _marks(value: Any, location: Location) -> Iterator[tuple[Location, Any]]:
    """Yield the places that hold ``{search: ...}``."""
    if isinstance(value, Mapping):
        if set(value) == {_MARK}:
            yield location, value[_MARK]
            return
        for key, own in value.items():
            yield from _marks(own, (*location, key))
    elif isinstance(value, list):
        for position, own in enumerate(value):
            yield from _marks(own, (*location, position))


def _path_of(data: Any, location: Location) -> str:
    """The path of a place; entries of lists by their names where they have one that no other entry has."""
    parts: list[str] = []
    skip = False
    for depth, part in enumerate(location):
        if isinstance(data, list):
            names = [entry_name(entry) for entry in data]
            name = names[int(part)]
            inside = depth + 1 < len(location)
            if inside and name is not None and names.count(name) == 1:
                parts.append(name)
                skip = True
            else:
                parts.append(str(part))
        elif skip:
            skip = False  # the kind of an entry, which its name stands for
        else:
            parts.append(str(part))
        data = data[part]
    return ".".join(parts)


def _placed(data: Any, location: Location, value: Any) -> Any:
    if not location:
        return value
    if isinstance(data, list):
        found = list(data)
        found[int(location[0])] = _placed(data[int(location[0])], location[1:], value)
        return found
    return {**data, location[0]: _placed(data[location[0]], location[1:], value)}


def _ordered(stages: Sequence[Any], order: Sequence[str]) -> list[Any]:
    """Put the named stages into another order, in the places that they have."""
    by_name = {entry_name(stage): stage for stage in stages}
    coming = iter(by_name[name] for name in order if name in by_name)
    return [next(coming) if entry_name(stage) in order else stage for stage in stages]


def _check_paths(reader: Reader, space: RecipeSpace, part: SearchPart) -> None:
    data: Any = copy.deepcopy(dict(space.base))
    values = space.first()
    for path in space.marked:
        data = _placed(data, space.marked[path], values[path])
    for path in part.space:
        try:
            replace_at(data, path, values[path])
        except ValueError as error:
            reader.fail((_MARK, "space", path), str(error))


def _with_order(reader: Reader, space: RecipeSpace, names: Sequence[str]) -> RecipeSpace:
    """Add the orders that give a recipe which can be run."""
    there = [name for name in map(entry_name, space.base["stages"]) if name is not None]
    for name in names:
        if name not in there:
            reader.fail((_MARK, ORDER), f"there is no stage {name!r}", did_you_mean(name, there))
    if len(set(names)) != len(names) or not 2 <= len(names) <= _MOST_ORDERED:
        reader.fail((_MARK, ORDER), f"give 2 to {_MOST_ORDERED} stages, each once")
    possible = []
    values = space.first()
    for order in Order.of(names).orders:
        try:
            check_recipe(space.recipe({**values, ORDER: list(order)}))
        except ConfigError:
            continue  # such as a pruning of an int8 model
        possible.append(order)
    if len(possible) < 2:
        reader.fail((_MARK, ORDER), f"only one order of {', '.join(names)} gives a recipe that can be run")
    return replace(space, choices={**space.choices, ORDER: Order(tuple(possible))})


def _check_examples(reader: Reader, space: RecipeSpace) -> None:
    """Check every choice, one at a time beside the first ones."""
    first = space.first()
    try:
        check_recipe(space.recipe(first), reader.source)
    except ConfigError as error:
        raise ConfigError(f"with the first of all choices: {error}") from None
    for path, choice in space.choices.items():
        for value in choice.examples():
            try:
                check_recipe(space.recipe({**first, path: value}), reader.source)
            except ConfigError as error:
                raise ConfigError(f"with {path} = {value!r}: {error}") from None
