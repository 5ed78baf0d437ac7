"""The range that holds nearly all values, so that a few outliers do not coarsen the rest."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.observers.base import Observer
from dwindle.quantization.observers.growing_histogram import GrowingHistogram


class PercentileObserver(Observer):
    """Cuts equal shares of values off both ends.

    Args:
        percentile: Share of values kept between the ends, in percent: 99.99 cuts 0.005% at each side.
        bins: Bins of the histogram; the range is exact to about two bins.
    """

    def __init__(self, percentile: float = 99.99, bins: int = 8192) -> None:
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile {percentile} is not in (50, 100]")
        self.percentile = percentile
        self.histogram = GrowingHistogram(bins)

    def update(self, value: Tensor) -> None:
        """Count the values."""
        self.histogram.add(value)

    def range(self, form: NumberFormat) -> tuple[float, float]:
        """Return the range between the two percentiles, widened to contain zero."""
        histogram = self.histogram
        if histogram.low > histogram.high:
            raise ValueError("nothing was observed")
        share = (1 - self.percentile / 100) / 2
        total = np.cumsum(histogram.counts)
        edges = histogram.edges()
        first = int(np.searchsorted(total, share * total[-1], side="right"))
        last = int(np.searchsorted(total, (1 - share) * total[-1], side="left"))
        low = max(histogram.low, float(edges[first]))
        high = min(histogram.high, float(edges[last + 1]))
        return min(low, 0.0), max(high, 0.0)
