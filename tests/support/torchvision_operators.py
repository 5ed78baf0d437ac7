"""torchvision's two operators that detectors need, in plain torch, where its compiled ones do not load."""

from __future__ import annotations

import sys
from typing import Any

import torch

from support import torchvision_shim

_library: Any = None


def install() -> None:
    """Define ``torchvision::nms`` and ``torchvision::roi_align`` for the CPU. Does nothing when they work already."""
    global _library
    torchvision_shim.install()
    import torchvision.ops
    from torchvision import extension

    if extension._has_ops() or _library is not None:
        return
    roi_align_module: Any = sys.modules[torchvision.ops.RoIAlign.__module__]  # its name is also a function's
    _library = torch.library.Library("torchvision", "FRAGMENT")
    _library.define(
        "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
        "int sampling_ratio, bool aligned) -> Tensor"
    )
    _library.impl("nms", _nms, "CPU")
    python_version = roi_align_module._roi_align
    while hasattr(python_version, "__wrapped__"):
        python_version = python_version.__wrapped__  # without torch.compile around it
    _library.impl("roi_align", python_version, "CompositeImplicitAutograd")
    for module in (extension, roi_align_module):
        module._has_ops = lambda: True


def _nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Greedy non-maximum suppression; indices of the boxes that stay, best score first."""
    order = scores.argsort(descending=True, stable=True)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = []
    while order.numel():
        best, order = order[0], order[1:]
        kept.append(best)
        corner = torch.maximum(boxes[best, :2], boxes[order, :2])
        opposite = torch.minimum(boxes[best, 2:], boxes[order, 2:])
        overlap = (opposite - corner).clamp(min=0).prod(1)
        order = order[overlap / (areas[best] + areas[order] - overlap) <= threshold]
    return torch.stack(kept) if kept else torch.empty(0, dtype=torch.int64)
