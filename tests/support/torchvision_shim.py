"""Lets ``import torchvision`` (and with it timm) work when its compiled operators do not load.

The registry's torchvision is a CUDA build; beside a CPU build of torch its ``_C`` extension cannot be loaded
and the import then fails on operators that were never declared. Declaring their schemas first is enough for
everything the tests use. This belongs to the tests' support code and never to the library.
"""

from __future__ import annotations

import torch

_library: torch.library.Library | None = None


def install() -> None:
    """Declare the schemas that torchvision expects. Does nothing when they exist already."""
    global _library
    if _library is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    _library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
