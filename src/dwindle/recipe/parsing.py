"""Reads a recipe file: YAML in, a checked :class:`~dwindle.recipe.schema.Recipe` out, or an error that points.

Every message names the file, the line, the path of the key inside the file and, where there is one, the
nearest valid choice.
"""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.recipe.schema import STAGES, Recipe, Stage

__all__ = ["load_recipe", "parse_recipe"]

Location = tuple[str | int, ...]


def load_recipe(path: str | os.PathLike[str]) -> tuple[Recipe, str]:
    """Read and check a recipe file.

    Returns:
        The recipe, and the text of the file.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or says something a recipe cannot say.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no recipe {str(path)!r}{_similar_file(Path(path))}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the recipe {str(path)!r}: {error}") from error
    return parse_recipe(text, str(path)), text


def parse_recipe(text: str, source: str = "recipe") -> Recipe:
    """Check the text of a recipe.

    Args:
        text: YAML.
        source: Name of the file, for messages.

    Raises:
        ConfigError: See :func:`load_recipe`.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error
    reader = _Reader(source, node)
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source}: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    return reader.recipe(dict(data))


class _Reader:
    """Turns plain data into a recipe and knows the line of every key."""

    def __init__(self, source: str, node: yaml.Node | None):
        self.source, self.node = source, node

    def recipe(self, data: dict[Any, Any]) -> Recipe:
        for key in ("model", "data"):
            if isinstance(data.get(key), str):
                data[key] = {"name": data[key]}
        if "seed" in data:
            if "seeds" in data:
                self.fail(("seed",), "give either 'seed' or 'seeds', not both")
            data["seeds"] = [data.pop("seed")]
        stages = self.stages(data.get("stages"))
        recipe = self.check(Recipe, {**data, "stages": ()}, ())
        for position, stage in enumerate(stages):
            taught = getattr(stage, "distillation", None)
            if taught is not None and taught.cache and recipe.data.augment is not None:
                self.fail(
                    ("stages", position, stage.kind, "distillation", "cache"),
                    "data.augment makes new inputs in each epoch, so there is nothing to keep; leave one of them out",
                )
        return recipe.model_copy(update={"stages": stages})

    def stages(self, entries: Any) -> tuple[Stage, ...]:
        if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
            self.fail(("stages",), f"a recipe needs a list of stages, of the kinds {', '.join(STAGES)}")
        stages = tuple(self.stage(entry, position) for position, entry in enumerate(entries))
        self.check_order(stages)
        return stages

    def stage(self, entry: Any, position: int) -> Stage:
        """Read ``train: {...}``, or a bare ``report``."""
        location: Location = ("stages", position)
        kind: Any
        body: Any
        if isinstance(entry, str):
            kind, body = entry, {}
        elif isinstance(entry, Mapping) and len(entry) == 1:
            kind, body = next(iter(entry.items()))
        else:
            found = f"the keys {', '.join(map(str, entry))}" if isinstance(entry, Mapping) else repr(entry)
            self.fail(
                location, f"a stage is one of {', '.join(STAGES)} with its settings below it; found {found}"
            )
        if kind not in STAGES:
            known = ", ".join(STAGES)
            self.fail(
                (*location, kind),
                f"there is no stage {kind!r}; known are {known}",
                did_you_mean(str(kind), STAGES),
            )
        if body is None:
            body = {}
        if not isinstance(body, Mapping):
            self.fail((*location, kind), f"the settings of {kind!r} must be a mapping, not {body!r}")
        return self.check(STAGES[kind], dict(body), (*location, kind))

    def check_order(self, stages: Sequence[Stage]) -> None:
        """Raise where the stages cannot follow one another as they do."""
        seen: dict[str, int] = {}
        quantized = False
        for position, stage in enumerate(stages):
            location: Location = ("stages", position, stage.kind)
            if stage.label in seen:
                first = seen[stage.label]
                self.fail(
                    location, f"stages[{first}] is called {stage.label!r} too; give each a 'name' of its own"
                )
            seen[stage.label] = position
            if stage.kind == "report" and position != len(stages) - 1:
                self.fail(location, "the report must be the last stage, so that it shows all of them")
            if quantized and stage.makes_model:
                self.fail(location, f"{stage.kind!r} cannot follow 'quantize'; put it before")
            quantized = quantized or stage.kind == "quantize"
            for name in getattr(stage, "compare", None) or ():
                models = [other.label for other in stages[:position] if other.makes_model]
                if name not in ("original", *models):
                    self.fail(
                        (*location, "compare"),
                        f"no stage {name!r} before this one makes a model",
                        did_you_mean(name, models),
                    )

    def check(self, kind: type[Any], data: dict[Any, Any], prefix: Location) -> Any:
        try:
            return kind.model_validate(data)
        except ValidationError as error:
            details = error.errors(include_url=False)
            messages = [self.describe(kind, detail, prefix) for detail in details]
            raise ConfigError("\n".join(messages)) from None

    def describe(self, kind: type[BaseModel], detail: ErrorDetails, prefix: Location) -> str:
        """One message for one finding of pydantic."""
        location = detail["loc"]
        last = str(location[-1]) if location else ""
        hint = ""
        if detail["type"] == "extra_forbidden":
            known = _fields_at(kind, location[:-1])
            message = f"unknown key {last!r}; known are {', '.join(known)}"
            hint = did_you_mean(last, known)
        elif detail["type"] == "missing":
            message = f"the key {last!r} is missing"
        elif detail["type"] == "literal_error":
            choices = [
                choice.strip("' ") for choice in detail["ctx"]["expected"].replace(" or ", ", ").split(", ")
            ]
            message = f"{detail['input']!r} is not one of {', '.join(choices)}"
            hint = did_you_mean(str(detail["input"]), choices)
        else:
            message = detail["msg"].removeprefix("Value error, ")
            if detail["type"] != "value_error":
                message = f"{message} (found {detail['input']!r})"
        return self.text((*prefix, *location), message, hint)

    def fail(self, location: Location, message: str, hint: str = "") -> typing.NoReturn:
        raise ConfigError(self.text(location, message, hint))

    def text(self, location: Location, message: str, hint: str = "") -> str:
        line = _line_of(self.node, location)
        place = f"{self.source}:{line}" if line is not None else self.source
        path = _path_text(location)
        return f"{place}: {path + ': ' if path else ''}{message}{hint}"


def _path_text(location: Location) -> str:
    """``("stages", 1, "prune", "ratio")`` as ``stages[1].prune.ratio``."""
    text = ""
    for entry in location:
        if isinstance(entry, int):
            text += f"[{entry}]"
        else:
            text += f".{entry}" if text else entry
    return text


def _line_of(node: yaml.Node | None, location: Location) -> int | None:
    """The line (from 1) of the deepest part of ``location`` that stands in the file."""
    line = None
    for entry in location:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(entry):
                    line, node = key.start_mark.line + 1, value
                    break
            else:
                return line
        elif isinstance(node, yaml.SequenceNode) and isinstance(entry, int) and entry < len(node.value):
            node = node.value[entry]
            line = node.start_mark.line + 1
        else:
            return line
    return line


def _fields_at(kind: type[BaseModel], location: Location) -> list[str]:
    """Names of the fields of the model that stands at ``location`` below ``kind``."""
    for entry in location:
        field = kind.model_fields.get(str(entry))
        inner = _model_in(field.annotation) if field is not None else None
        if inner is None:
            break
        kind = inner
    return list(kind.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for option in typing.get_args(annotation):
            found = _model_in(option)
            if found is not None:
                return found
    return None


def _similar_file(path: Path) -> str:
    directory = path.parent
    if not directory.is_dir():
        return ""
    return did_you_mean(
        path.name, [entry.name for entry in directory.iterdir() if entry.suffix in (".yaml", ".yml")]
    )
