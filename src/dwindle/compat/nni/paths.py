"""Packages of NNI that are written out, ``nni.algorithms.compression.pytorch...``, and never imported by name."""

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

__all__ = ["imported_on_use"]


def imported_on_use(package: str) -> Callable[[str], ModuleType]:
    """Return the ``__getattr__`` of a package: modules in it are imported when they are first asked for.

    Args:
        package: Its name.
    """

    def find(name: str) -> ModuleType:
        path = f"{package}.{name}"
        if name.startswith("_") or importlib.util.find_spec(path) is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(path)

    return find
