"""Where the windows of a convolution lie in its image: source positions, and the pixels whose windows hold padding."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from dwindle.config.errors import ConfigError

__all__ = ["Geometry", "Window", "geometry"]


@dataclass(frozen=True)
class Window:
    """How the windows of a 2-d convolution lie.

    Attributes:
        kernel: Height and width.
        stride: Of the rows and columns.
        dilation: Of the rows and columns.
        padding: Top, bottom, left, right.
        mode: Torch's ``padding_mode``.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    mode: str = "zeros"


@dataclass(frozen=True)
class Geometry:
    """A window on images of one size.

    Attributes:
        rows: ``[kernel height, out height]``, the row of the image that each tap reads; -1 is padding with zeros.
        columns: The same for the width.
        edges: Output pixels, ascending, whose windows hold zeros.
        edge_kinds: For each of them its kind.
        absent: ``[kinds, taps]``, which taps fall on zeros.
    """

    rows: np.ndarray
    columns: np.ndarray
    edges: np.ndarray
    edge_kinds: np.ndarray
    absent: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the output."""
        return self.rows.shape[1], self.columns.shape[1]


@functools.lru_cache(maxsize=256)
def geometry(height: int, width: int, window: Window) -> Geometry:
    """Return where a window lies in an image.

    Raises:
        ConfigError: The image is smaller than the window.
    """
    top, bottom, left, right = window.padding
    rows = _source(height, 0, window, (top, bottom))
    columns = _source(width, 1, window, (left, right))
    row_kinds, row_kind = np.unique((rows < 0).T, axis=0, return_inverse=True)
    column_kinds, column_kind = np.unique((columns < 0).T, axis=0, return_inverse=True)
    absent = (row_kinds[:, None, :, None] | column_kinds[None, :, None, :]).reshape(
        len(row_kinds) * len(column_kinds), -1
    )
    kinds = (row_kind.reshape(-1, 1) * len(column_kinds) + column_kind.reshape(1, -1)).reshape(-1)
    edges = np.flatnonzero(np.any(absent, axis=1)[kinds])
    return Geometry(rows, columns, edges, kinds[edges], absent)


def _source(size: int, dimension: int, window: Window, padding: tuple[int, int]) -> np.ndarray:
    """Return the position that each tap of each output position reads."""
    kernel, stride, dilation = window.kernel[dimension], window.stride[dimension], window.dilation[dimension]
    room = size + sum(padding) - dilation * (kernel - 1) - 1
    if room < 0:
        raise ConfigError(f"an image of {size} is too small for a window of {kernel} (dilation {dilation})")
    outputs = np.arange(room // stride + 1) * stride
    padded = np.arange(kernel)[:, None] * dilation + outputs - padding[0]
    if window.mode == "circular":
        return np.ascontiguousarray(padded % size)
    if window.mode == "replicate":
        return np.ascontiguousarray(padded.clip(0, size - 1))
    if window.mode == "reflect":
        mirrored = np.abs(padded)
        return np.ascontiguousarray(np.where(mirrored >= size, 2 * (size - 1) - mirrored, mirrored))
    return np.ascontiguousarray(np.where((padded < 0) | (padded >= size), -1, padded))
