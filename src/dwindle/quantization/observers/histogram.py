"""The range with the least mean squared error of rounding and clipping together."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.observers.base import Observer
from dwindle.quantization.observers.growing_histogram import GrowingHistogram

_SHRINKS = np.geomspace(1.0, 0.05, 48)
_FINE = np.linspace(0.88, 1.12, 13)


class HistogramObserver(Observer):
    """Searches the clipping range that loses least, on a histogram of what was seen.

    Both ends are first pulled in together, then each alone, then once more finely; every candidate's error is
    computed from the histogram with the real rounding of the number format.

    Args:
        bins: Bins of the histogram.
    """

    def __init__(self, bins: int = 4096) -> None:
        self.histogram = GrowingHistogram(bins)

    def update(self, value: Tensor) -> None:
        """Count the values."""
        self.histogram.add(value)

    def range(self, form: NumberFormat) -> tuple[float, float]:
        """Return the range of least mean squared error, containing zero."""
        histogram = self.histogram
        low, high = histogram.seen()
        if low == high:
            return low, high
        edges = histogram.edges()
        occupied = histogram.counts > 0
        centres = np.clip((edges[:-1] + edges[1:]) / 2, histogram.low, histogram.high)[occupied]
        weights = histogram.counts[occupied]
        best = (low, high)
        for factors in (_SHRINKS, _FINE):
            start = best
            both = [(start[0] * f, start[1] * f) for f in factors]
            best = _least(centres, weights, both, form, (low, high))
            best = _least(centres, weights, [(best[0] * f, best[1]) for f in factors], form, (low, high))
            best = _least(centres, weights, [(best[0], best[1] * f) for f in factors], form, (low, high))
        return best


def range_error(
    values: np.ndarray, weights: np.ndarray, low: float, high: float, form: NumberFormat
) -> float:
    """Return the weighted mean squared error of quantizing values over a range.

    Args:
        values: float64 values.
        weights: How often each occurs.
        low: Start of the range, at most zero.
        high: End of the range, at least zero.
        form: The levels.
    """
    if form.symmetric:
        zero_point = 0.0 if form.signed else (form.lowest + form.highest + 1) // 2
        scale = max(-low, high) / (form.highest - zero_point)
    else:
        scale = (high - low) / (form.highest - form.lowest)
        zero_point = np.clip(np.round(form.lowest - low / scale), form.lowest, form.highest) if scale else 0.0
    if scale <= 0:
        return float(np.average(values**2, weights=weights))
    levels = np.clip(np.round(values / scale) + zero_point, form.lowest, form.highest)
    return float(np.average(((levels - zero_point) * scale - values) ** 2, weights=weights))


def _least(
    values: np.ndarray,
    weights: np.ndarray,
    candidates: list[tuple[float, float]],
    form: NumberFormat,
    whole: tuple[float, float],
) -> tuple[float, float]:
    inside = [(max(low, whole[0]), min(high, whole[1])) for low, high in candidates]
    errors = [range_error(values, weights, low, high, form) for low, high in inside]
    return inside[int(np.argmin(errors))]
