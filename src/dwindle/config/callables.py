"""Callables by their names: ``package.module:callable``, imported and called with errors that point."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dwindle.config.errors import ConfigError, MissingDependencyError, did_you_mean

__all__ = ["call_checked", "import_callable"]


def import_callable(name: str, what: str) -> Callable[..., Any]:
    """Import ``package.module:attribute``.

    Args:
        name: The name; attributes may be nested with dots.
        what: What it is for, for messages.

    Raises:
        ConfigError: The module or the attribute does not exist, or is not callable.
        MissingDependencyError: The module needs a library that is not installed.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"the {what} {name!r} must be written as package.module:callable")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise ConfigError(f"the {what} {name!r}: there is no module {error.name!r}") from error
        raise MissingDependencyError(f"the {what} {name!r} could not be imported: {error}") from error
    except (ImportError, RuntimeError) as error:
        raise MissingDependencyError(f"the {what} {name!r} could not be imported: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [entry for entry in dir(found) if not entry.startswith("_")]
            raise ConfigError(
                f"the {what} {name!r}: {module_name!r} has no {part!r}{did_you_mean(part, public)}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"the {what} {name!r} is a {type(found).__name__}, which cannot be called")
    return found


def call_checked(function: Callable[..., Any], arguments: Mapping[str, Any], name: str) -> Any:
    """Call ``function``; unknown and missing arguments, and what is not installed, become clear errors.

    Raises:
        ConfigError: An argument does not fit, or the data are not on this machine.
        MissingDependencyError: A library is not installed.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        signature = None
    if signature is not None:
        named = [
            p.name for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        for key in arguments:
            if key not in named and not open_ended:
                takes = f"it takes {', '.join(named)}" if named else "it takes none"
                raise ConfigError(f"{name!r} has no argument {key!r}; {takes}{did_you_mean(key, named)}")
        try:
            signature.bind(**arguments)
        except TypeError as error:
            raise ConfigError(f"{name!r}: {error}") from error
    try:
        return function(**arguments)
    except ImportError as error:
        raise MissingDependencyError(f"{name!r}: {error}") from error
    except FileNotFoundError as error:
        raise ConfigError(f"{name!r}: {error}") from error
