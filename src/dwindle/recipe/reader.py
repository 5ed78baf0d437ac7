"""Checks plain data against the parts of a recipe; findings name file, line and key, and the nearest choice."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dwindle.config.errors import ConfigError, did_you_mean

__all__ = ["Location", "Reader", "read_text"]

Location = tuple[str | int, ...]


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a recipe file.

    Raises:
        ConfigError: There is no such file (the message names the nearest), or it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no recipe {str(path)!r}{_similar_file(Path(path))}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the recipe {str(path)!r}: {error}") from error


class Reader:
    """Turns plain data into checked values and knows the line of every key.

    Args:
        source: Name of the file, for messages.
        node: The file as YAML nodes; None where the data did not come from a file.
    """

    def __init__(self, source: str, node: yaml.Node | None = None):
        self.source, self.node = source, node

    @classmethod
    def of_text(cls, text: str, source: str) -> tuple[Reader, Any]:
        """Read YAML; return a reader for it, and its plain data.

        Raises:
            ConfigError: It is not YAML.
        """
        try:
            return cls(source, yaml.compose(text, Loader=yaml.SafeLoader)), yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error

    def entry(
        self, entry: Any, location: Location, kinds: Mapping[str, type[BaseModel]], noun: str
    ) -> tuple[str, dict[Any, Any]]:
        """Split an entry of a list, ``kind: {...}`` or a bare ``kind``, into its kind and its settings.

        Args:
            entry: What stands in the list.
            location: Where.
            kinds: What the entry may be.
            noun: What such an entry is called, for messages.

        Raises:
            ConfigError: It is something else.
        """
        kind: Any
        body: Any
        known = ", ".join(kinds)
        article = "an" if noun[0] in "aeiou" else "a"
        if isinstance(entry, str):
            kind, body = entry, {}
        elif isinstance(entry, Mapping) and len(entry) == 1:
            kind, body = next(iter(entry.items()))
        else:
            found = f"the keys {', '.join(map(str, entry))}" if isinstance(entry, Mapping) else repr(entry)
            self.fail(
                location, f"{article} {noun} is one of {known} with its settings below it; found {found}"
            )
        if kind not in kinds:
            hint = did_you_mean(str(kind), kinds)
            self.fail((*location, kind), f"there is no {noun} {kind!r}; known are {known}", hint)
        body = {} if body is None else body
        if not isinstance(body, Mapping):
            self.fail((*location, kind), f"the settings of {kind!r} must be a mapping, not {body!r}")
        return kind, dict(body)

    def check(self, kind: type[Any], data: dict[Any, Any], prefix: Location) -> Any:
        """Return ``data`` as a ``kind``.

        Raises:
            ConfigError: With one line for each finding.
        """
        try:
            return kind.model_validate(data)
        except ValidationError as error:
            details = error.errors(include_url=False)
            messages = [self._describe(kind, detail, prefix) for detail in details]
            raise ConfigError("\n".join(messages)) from None

    def _describe(self, kind: type[BaseModel], detail: ErrorDetails, prefix: Location) -> str:
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
        """Raise a ConfigError that says where."""
        raise ConfigError(self.text(location, message, hint))

    def text(self, location: Location, message: str, hint: str = "") -> str:
        """Return a message with the file, the line and the path of the key before it."""
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
