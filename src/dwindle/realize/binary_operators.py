"""The packed binary products as operators of torch: they work in eager mode, under ``torch.compile`` and in exports.

The kernels are numba's (the extra ``dwindle[binary]``), which is imported when the first packed layer is made.
"""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from dwindle.config.errors import ConfigError
from dwindle.realize.binary_geometry import Window, geometry

__all__ = [
    "array",
    "binary_conv2d",
    "binary_linear",
    "kernels",
    "library",
    "output_size",
    "share",
    "window_of",
]

_WORTH_SHARING = 2_000_000
"""Packed words times rows from which on a product is shared between threads (about a millisecond)."""

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def kernels() -> ModuleType:
    """Return the module of the compiled kernels.

    Raises:
        ConfigError: numba is not installed.
    """
    try:
        return importlib.import_module("dwindle.realize.binary_kernels")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("numba", "llvmlite"):
            raise
        raise ConfigError("packed binary layers need numba: pip install 'dwindle[binary]'") from error


library = torch.library.Library("dwindle", "FRAGMENT")
library.define(
    "binary_linear(Tensor x, Tensor bits, Tensor offset, Tensor scale, Tensor bias, Tensor threshold, bool reaches) "
    "-> Tensor"
)
library.define(
    "binary_conv2d(Tensor x, Tensor bits, Tensor offset, Tensor tap_sums, Tensor scale, Tensor bias, Tensor threshold, "
    "bool reaches, int groups, int[] kernel, int[] stride, int[] dilation, int[] padding, str mode) -> Tensor"
)


def _linear(
    x: Tensor, bits: Tensor, offset: Tensor, scale: Tensor, bias: Tensor, threshold: Tensor, reaches: bool
) -> Tensor:
    """Return ``(offset - 2 popcount(x xor bits)) * scale + bias`` of two-valued inputs.

    Args:
        x: ``[M, features]``, float32 or float64, not yet binary.
        bits: Packed signs of the weight with the outputs last, int64 ``[words, O]``.
        offset: int32 ``[O]``.
        scale: ``[O]`` in the dtype of ``x``.
        bias: The same.
        threshold: ``[features]`` in the dtype of ``x``; the input is high from there on.
        reaches: Whether a value equal to the threshold is high.
    """
    own = kernels()
    rows = np.empty((x.shape[0], bits.shape[0]), np.uint64)
    own.pack_rows(array(x), array(threshold), reaches, rows)
    lanes = array(bits).view(np.uint64)
    out = torch.empty((x.shape[0], bits.shape[1]), dtype=x.dtype)
    rest = (array(offset), array(scale), array(bias))
    target = out.numpy()

    def part(begin: int, end: int) -> None:
        own.linear_product(rows[begin:end], lanes, *rest, target[begin:end])

    share(part, len(rows), rows.size * lanes.shape[1])
    return out


def _linear_shape(
    x: Tensor, bits: Tensor, offset: Tensor, scale: Tensor, bias: Tensor, threshold: Tensor, reaches: bool
) -> Tensor:
    return x.new_empty((x.shape[0], bits.shape[1]))


def _conv2d(
    x: Tensor,
    bits: Tensor,
    offset: Tensor,
    tap_sums: Tensor,
    scale: Tensor,
    bias: Tensor,
    threshold: Tensor,
    reaches: bool,
    groups: int,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    padding: list[int],
    mode: str,
) -> Tensor:
    """Return the convolution of two-valued inputs with packed signs.

    Args:
        x: ``[N, C, H, W]``, float32 or float64, not yet binary.
        bits: Packed signs, int64 ``[O, kernel height * kernel width * words]``, taps before words.
        offset: int32 ``[O]``.
        tap_sums: int32 ``[O, taps]``: what is added where a tap falls on zeros.
        scale: ``[O]`` in the dtype of ``x``.
        bias: The same.
        threshold: ``[C]`` in the dtype of ``x``; the input is high from there on.
        reaches: Whether a value equal to the threshold is high.
        groups: Of the channels.
        kernel: Height and width.
        stride: Of rows and columns.
        dilation: Of rows and columns.
        padding: Top, bottom, left, right.
        mode: Torch's ``padding_mode``.
    """
    own = kernels()
    count, channels, height, width = x.shape
    lies = geometry(height, width, window_of(kernel, stride, dilation, padding, mode))
    tall, wide = lies.size
    taps, outputs = kernel[0] * kernel[1], bits.shape[0]
    words = bits.shape[1] // taps
    edge_sums = array(tap_sums) @ lies.absent.T.astype(np.int32)
    rest = (array(offset), array(scale), array(bias))
    images, limits, weights = (
        array(x).reshape(count, channels, height * width),
        array(threshold),
        array(bits).view(np.uint64),
    )
    planes = np.empty((groups * words, height * width), np.uint64)
    lanes = np.empty((taps * words, tall * wide), np.uint64)
    out = torch.empty((count, outputs, tall, wide), dtype=x.dtype)
    target = out.numpy().reshape(count, outputs, tall * wide)
    each = outputs // groups
    for image in range(count):
        own.pack_planes(images[image], limits, reaches, channels // groups, words, planes)
        for group in range(groups):
            seen = planes[group * words : (group + 1) * words].reshape(words, height, width)
            own.unfold(seen, lies.rows, lies.columns, lanes)

            def part(begin: int, end: int, first: int = group * each, image: int = image) -> None:
                own_rows = slice(first + begin, first + end)
                own.conv_product(
                    weights[own_rows],
                    lanes,
                    *(array[own_rows] for array in rest),
                    lies.edges,
                    lies.edge_kinds,
                    edge_sums[own_rows],
                    target[image, own_rows],
                )

            share(part, each, lanes.size * each)
    return out


def _conv2d_shape(
    x: Tensor,
    bits: Tensor,
    offset: Tensor,
    tap_sums: Tensor,
    scale: Tensor,
    bias: Tensor,
    threshold: Tensor,
    reaches: bool,
    groups: int,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    padding: list[int],
    mode: str,
) -> Tensor:
    window = window_of(kernel, stride, dilation, padding, mode)
    return x.new_empty((x.shape[0], bits.shape[0], *output_size(x.shape[2], x.shape[3], window)))


library.impl("binary_linear", _linear, "CPU")
library.impl("binary_conv2d", _conv2d, "CPU")
torch.library.register_fake("dwindle::binary_linear", _linear_shape, lib=library)
torch.library.register_fake("dwindle::binary_conv2d", _conv2d_shape, lib=library)

#: See ``_linear`` for the arguments.
binary_linear = torch.ops.dwindle.binary_linear.default

#: See ``_conv2d`` for the arguments.
binary_conv2d = torch.ops.dwindle.binary_conv2d.default


def output_size(height: int, width: int, window: Window) -> tuple[int, int]:
    """Return height and width of what a window gives (also for symbolic sizes)."""
    top, bottom, left, right = window.padding
    return (
        (height + top + bottom - window.dilation[0] * (window.kernel[0] - 1) - 1) // window.stride[0] + 1,
        (width + left + right - window.dilation[1] * (window.kernel[1] - 1) - 1) // window.stride[1] + 1,
    )


def window_of(
    kernel: list[int], stride: list[int], dilation: list[int], padding: list[int], mode: str
) -> Window:
    """Return the window of an operator's arguments."""
    top, bottom, left, right = padding
    return Window(
        (kernel[0], kernel[1]),
        (stride[0], stride[1]),
        (dilation[0], dilation[1]),
        (top, bottom, left, right),
        mode,
    )


def array(tensor: Tensor) -> np.ndarray:
    """Return a tensor's numbers for the kernels, lying together."""
    own = tensor.detach() if tensor.requires_grad else tensor
    result: np.ndarray = own.contiguous().numpy()
    return result


def share(part: Callable[[int, int], None], rows: int, work: int) -> None:
    """Run ``part(begin, end)`` over all rows, in as many threads as torch uses when it is worth it."""
    threads = min(torch.get_num_threads(), rows)
    if threads < 2 or work < _WORTH_SHARING:
        part(0, rows)
        return
    key = (os.getpid(), threads)  # a forked process has no threads of its parent
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(threads, thread_name_prefix="dwindle-binary")
    bounds = [rows * number // threads for number in range(threads + 1)]
    for done in [_pools[key].submit(part, *pair) for pair in itertools.pairwise(bounds)]:
        done.result()
