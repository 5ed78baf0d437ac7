"""The errors that dwindle raises, and the lazy import of optional libraries.

Every error a user can meet derives from :class:`DwindleError`. A message names the thing that is wrong (the
key, the module, the file) and, where there is one, the nearest valid choice.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class DwindleError(Exception):
    """Base class of every error that dwindle raises on purpose."""


class ConfigError(DwindleError, ValueError):
    """A ``config_list``, a recipe or an argument is not valid. Raised before any work is done."""


class CaptureError(DwindleError, RuntimeError):
    """The model could not be recorded with the given example inputs."""


class RealizeError(DwindleError, RuntimeError):
    """The small model could not be made, or was not proven equal. The model is left as it was."""


class ExportError(DwindleError, RuntimeError):
    """The model could not be written in the wanted format."""


class FileFormatError(DwindleError, ValueError):
    """A file is truncated, altered, or was not written by dwindle."""


class MissingDependencyError(DwindleError, ImportError):
    """An optional library is needed for what was asked; the message says what to install."""


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice closest in spelling to ``word``, or None when nothing is close.

    Args:
        word: What the user wrote.
        choices: What would have been valid.
    """
    candidates = list(choices)
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.5)
    if close:
        return close[0]
    lowered = {choice.lower(): choice for choice in candidates}
    close = difflib.get_close_matches(word.lower(), list(lowered), n=1, cutoff=0.5)
    return lowered[close[0]] if close else None


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the choice nearest to ``word``, or an empty string."""
    close = nearest(word, choices)
    return f"; did you mean {close!r}?" if close is not None else ""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional library, or say what to install.

    Args:
        module: The module to import, such as ``"onnxruntime"``.
        extra: The extra of dwindle that brings it, such as ``"onnx"``.

    Raises:
        MissingDependencyError: The library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"this needs the library {module.split('.')[0]!r}, which could not be imported ({error}). "
            f'Install it with: pip install "dwindle[{extra}]"'
        ) from error
