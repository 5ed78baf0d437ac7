"""Lets ``import torchvision`` (and with it timm) work when its compiled operators do not load.

The registry's torchvision is a CUDA build; beside a CPU build of torch its ``_C`` extension cannot be loaded
and the import then fails on operators that were never declared. Declaring their schemas first is enough for
everything the tests use. This belongs to the tests' support code and never to the library.

``make`` also copies this file into its environment's site-packages with a ``.pth`` line that imports it, so that the
schemas are declared when a command line run (``dwindle inspect timm/...``) first imports torchvision.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

_library: Any = None


def install() -> None:
    """Declare the schemas that torchvision expects. Does nothing when they exist already."""
    global _library
    import torch

    if _library is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    _library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


class _BeforeTorchvision(MetaPathFinder):
    """Declares the schemas when torchvision is first looked for; finds nothing itself."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        """Called by the import system for every module that is not loaded yet."""
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            install()


def install_on_import() -> None:
    """Declare the schemas as soon as somebody imports torchvision, and not before."""
    sys.meta_path.insert(0, _BeforeTorchvision())


if __name__ == "torchvision_shim":  # imported from site-packages by the .pth line
    install_on_import()
