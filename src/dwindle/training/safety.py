"""Keeps training on a CPU away from a convolution kernel that writes beyond its memory.

oneDNN's backward pass of a strided 1x1 convolution in channels-last memory is wrong when there are fewer
input channels than one vector block (8 with AVX2, 16 with AVX-512): it corrupts the heap or gives wrong
gradients (https://github.com/uxlfoundation/oneDNN/issues/6035). Images with one channel count as
channels-last, so nobody needs to have asked for it; and models that were shrunk have such narrow layers.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["safe_convolutions", "unsafe_convolutions"]

_BLOCK = 16
"""The widest vector block, in float32 channels."""

_told: set[str] = set()
"""What was said already in this process: a search trains one small model after another."""


def unsafe_convolutions(model: nn.Module) -> list[str]:
    """Return the names of convolutions whose backward pass may corrupt memory on a CPU."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and all(size == 1 for size in module.kernel_size)
        and any(stride > 1 for stride in module.stride)
        and module.in_channels // module.groups < _BLOCK
    ]


@contextlib.contextmanager
def safe_convolutions(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Train without oneDNN when the model holds such a convolution, and say so once; otherwise change nothing.

    Args:
        model: The model that is trained in the block.
        device: Where it is trained; only the CPU is concerned.
    """
    concerned = device.type == "cpu" and torch._C._get_mkldnn_enabled()
    names = unsafe_convolutions(model) if concerned else []
    if not names:
        yield
        return
    text = (
        f"training without oneDNN, which is slower: its backward pass corrupts memory for strided 1x1 "
        f"convolutions of fewer than {_BLOCK} input channels ({', '.join(names[:3])}"
        f"{', ...' if len(names) > 3 else ''}); see https://github.com/uxlfoundation/oneDNN/issues/6035"
    )
    if text not in _told:
        _told.add(text)
        warnings.warn(text, stacklevel=3)
    # Not torch.backends.mkldnn.flags(): that one sets more flags and warns about hardware nobody has.
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(True)
