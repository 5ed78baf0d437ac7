"""The widths at which layers are measured, and prediction between them.

Kernels work in blocks of 4, 8, 16 or 32 channels, so that time is a staircase over widths, with other kernels where a
width is no multiple of 4. Small widths are measured as they are; larger ones in cells of 16 (more the wider they are,
an eighth of the width at most). Within a cell, multiples of 4 are predicted from the first multiple of 4 and the end of
the cell, other widths from the first and the last one: exact for a staircase, and close to anything smooth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["interpolated", "knots", "neighbours"]

#: Up to here every width is measured as it is.
EXACT = 16
#: Widths that are multiples of this have kernels of their own.
ALIGNED = 4


def cell(width: float) -> int:
    """Return the length of the cell that a width lies in."""
    if width <= 8 * EXACT:
        return EXACT
    return int(2 ** (math.ceil(math.log2(width)) - 3))


def neighbours(width: float, size: int) -> tuple[int, int, float]:
    """Return the measured widths around a width, and how far it is from the first to the second, 0 to 1.

    Args:
        width: At most ``size``; a width that is no integer counts as a multiple of 4.
        size: The whole width; it is always measured.
    """
    width = min(max(width, 1), size)
    whole = width == int(width)
    step = cell(width)
    if whole and (size <= EXACT or width == size or width % step == 0):
        return int(width), int(width), 0.0
    start = int(width // step) * step
    end = start + step
    aligned = not whole or width % ALIGNED == 0
    low, high = (start + ALIGNED, end) if aligned else (start + 1, end - 1)
    if not whole:
        low = max(start, 1)
    if high > size:
        high = size if (size % ALIGNED == 0) == aligned else size - 1
        if aligned and high % ALIGNED:
            high -= high % ALIGNED
        high = max(high, low)
    low, high = min(low, size), min(high, size)
    if width <= low or high <= low:
        return low, low, 0.0
    if width >= high:
        return high, high, 0.0
    return low, high, (width - low) / (high - low)


def knots(size: int) -> list[int]:
    """Return the widths of an axis that are measured as they are."""
    return [width for width in range(1, size + 1) if neighbours(width, size)[:2] == (width, width)]


def interpolated(
    values: Sequence[float], sizes: Sequence[int], measured: Callable[[tuple[int, ...]], np.ndarray]
) -> np.ndarray:
    """Return times at any widths from those at measured ones.

    From the lowest corner of the cell that holds the point, one dimension after another goes to its own corner, the
    one that is farthest first: a measurement more than there are dimensions. Each step multiplies the time by what it
    costs of that step, so that products of widths are exact, and so are all corners.

    Args:
        values: Widths.
        sizes: Whole widths.
        measured: Gives the times at measured widths, an array.
    """
    places = [neighbours(value, size) for value, size in zip(values, sizes, strict=True)]
    corner = [low for low, _, _ in places]
    last = total = measured(tuple(corner))
    inner = (number for number, place in enumerate(places) if place[2] > 0)
    for number in sorted(inner, key=lambda number: -places[number][2]):
        corner[number] = places[number][1]
        here = measured(tuple(corner))
        share = places[number][2]
        ratio = np.divide(here, last, out=np.ones_like(here), where=last > 0)
        total = np.where(last > 0, total * (1 + share * (ratio - 1)), total + share * here)
        last = here
    return total
