"""Binary convolutions of few channels (depthwise ones, first of all) as an operator of torch.

Of 64 packed places most would stay empty where few channels meet, so here pixels are added and subtracted as small
integers, many at a time; only the weight is packed. Sums are integers as well, so nothing is rounded before the scale.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dwindle.realize.binary_geometry import Window, geometry
from dwindle.realize.binary_operators import array, kernels, library, output_size, share, window_of

__all__ = ["adds_directly", "binary_conv2d_direct"]

_FEW = 8
"""Channels that meet at an output up to which they are added one by one instead of 64 at a time."""

_LARGEST_SUM = 2**14 - 1
"""Terms that two bytes can hold the sum of: each is at most 2."""


def adds_directly(channels: int, taps: int) -> bool:
    """Say whether so many channels at each output are added one by one.

    Args:
        channels: Input channels of a group.
        taps: Places of the window.
    """
    return channels <= _FEW and channels * taps <= _LARGEST_SUM


library.define(
    "binary_conv2d_direct(Tensor x, Tensor bits, Tensor scale, Tensor bias, Tensor threshold, bool reaches, "
    "bool steps, int groups, int[] kernel, int[] stride, int[] dilation, int[] padding, str mode) -> Tensor"
)


def _conv2d(
    x: Tensor,
    bits: Tensor,
    scale: Tensor,
    bias: Tensor,
    threshold: Tensor,
    reaches: bool,
    steps: bool,
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
        bits: Packed signs, int64 ``[O, words]``: the taps of an output, the channels of each tap together.
        scale: ``[O]`` in the dtype of ``x``; for steps half of what one input counts.
        bias: ``[O]``, the same.
        threshold: ``[C]`` in the dtype of ``x``; the input is high from there on.
        reaches: Whether a value equal to the threshold is high.
        steps: Whether the input's values are 0 and 1 (else -1 and 1).
        groups: Of the channels.
        kernel: Height and width.
        stride: Of rows and columns.
        dilation: Of rows and columns.
        padding: Top, bottom, left, right.
        mode: Torch's ``padding_mode``.
    """
    own, window = kernels(), window_of(kernel, stride, dilation, padding, mode)
    count, channels, height, width = x.shape
    lies = _lies(height, width, window)
    images, limits, weights = array(x), array(threshold), array(bits).view(np.uint64)
    factors, shifts = array(scale), array(bias)
    low, high = (np.int16(0), np.int16(2)) if steps else (np.int16(-1), np.int16(1))
    each, group_outputs = channels // groups, bits.shape[0] // groups
    out = torch.empty((count, bits.shape[0], *lies.size), dtype=x.dtype)
    target = out.numpy()
    for image in range(count):

        def part(begin: int, end: int, image: int = image) -> None:
            ins = slice(begin * each, end * each)
            outs = slice(begin * group_outputs, end * group_outputs)
            own.conv_direct(
                images[image, ins],
                limits[ins],
                reaches,
                low,
                high,
                lies.maps,
                padding[2],
                weights[outs],
                lies.shifts,
                window.stride,
                group_outputs,
                factors[outs],
                shifts[outs],
                target[image, outs],
            )

        share(part, groups, out.numel() // count * each * len(lies.shifts) // 16)
    return out


@dataclass(frozen=True)
class _Layout:
    """A window on padded images of one size.

    Attributes:
        size: Height and width of the output.
        maps: The row and the column of the image behind each row and column of the padded one; -1 is a zero.
        shifts: Where each tap reads in the padded image, counted from where the first one does.
    """

    size: tuple[int, int]
    maps: tuple[np.ndarray, np.ndarray]
    shifts: np.ndarray


@functools.lru_cache(maxsize=256)
def _lies(height: int, width: int, window: Window) -> _Layout:
    """Return where a window lies.

    Raises:
        ConfigError: The image is smaller than the window.
    """
    size = geometry(height, width, window).size
    padded = geometry(height, width, Window((1, 1), padding=window.padding, mode=window.mode))
    maps = (padded.rows[0].copy(), padded.columns[0].copy())
    down = np.arange(window.kernel[0]) * window.dilation[0] * len(maps[1])
    across = np.arange(window.kernel[1]) * window.dilation[1]
    return _Layout(size, maps, np.add.outer(down, across).reshape(-1))


def _conv2d_shape(
    x: Tensor,
    bits: Tensor,
    scale: Tensor,
    bias: Tensor,
    threshold: Tensor,
    reaches: bool,
    steps: bool,
    groups: int,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    padding: list[int],
    mode: str,
) -> Tensor:
    window = window_of(kernel, stride, dilation, padding, mode)
    return x.new_empty((x.shape[0], bits.shape[0], *output_size(x.shape[2], x.shape[3], window)))


library.impl("binary_conv2d_direct", _conv2d, "CPU")
torch.library.register_fake("dwindle::binary_conv2d_direct", _conv2d_shape, lib=library)

#: See ``_conv2d`` for the arguments.
binary_conv2d_direct = torch.ops.dwindle.binary_conv2d_direct.default
