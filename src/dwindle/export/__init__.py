"""Files: models written for runtimes, and compressed models saved to be loaded again.

The package is callable: ``dwindle.export(model, "model.onnx", example_inputs=(x,))`` is
:func:`dwindle.export.exporting.export`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwindle.export.exporting import ExportResult, export
    from dwindle.export.loading import load
    from dwindle.export.replay import register_replay
    from dwindle.export.saving import save
    from dwindle.export.source import register_source

_HOMES = {
    "ExportResult": "exporting",
    "export": "exporting",
    "load": "loading",
    "register_replay": "replay",
    "register_source": "source",
    "save": "saving",
}

__all__ = ["ExportResult", "export", "load", "register_replay", "register_source", "save"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used; the writers and the runtimes need each other's files."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Callable(ModuleType):
    """Lets ``dwindle.export(...)`` be the function although ``dwindle.export`` is this package."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.export(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
