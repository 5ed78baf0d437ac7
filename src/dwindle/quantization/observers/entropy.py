"""The range whose quantized distribution loses the least information (Migacz 2017, "8-bit inference with TensorRT")."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.observers.base import Observer
from dwindle.quantization.observers.growing_histogram import GrowingHistogram

_LEAST = 1e-12
"""Stands for a probability of zero where a value does occur."""


class EntropyObserver(Observer):
    """Clips where the Kullback-Leibler divergence between the values and their quantized selves is least.

    Thresholds ``t`` are tried from a few bins up to the largest magnitude; the range of each is the part of
    ``[-t, t]`` in which values lie.

    Args:
        bins: Bins of the histogram, over both signs.
        candidates: How many thresholds are tried.
    """

    def __init__(self, bins: int = 4096, candidates: int = 200) -> None:
        if candidates < 1:
            raise ValueError(f"candidates {candidates} is below 1")
        self.histogram = GrowingHistogram(bins)
        self.candidates = candidates

    def update(self, value: Tensor) -> None:
        """Count the values."""
        self.histogram.add(value)

    def range(self, form: NumberFormat) -> tuple[float, float]:
        """Return the range of least divergence, containing zero."""
        histogram = self.histogram
        low, high = histogram.seen()
        if low == high:
            return low, high
        middle, width = histogram.bins // 2, histogram.reach / (histogram.bins // 2)
        first = middle - min(middle, int(np.ceil(-low / width)))
        last = middle + min(middle, int(np.ceil(high / width)))
        levels = form.highest - form.lowest + 1
        sides = 1 if low == 0.0 or high == 0.0 else 2
        shortest = min(-(-levels // sides), max(middle - first, last - middle))
        best, least = (low, high), np.inf
        for half in np.unique(
            np.linspace(shortest, max(middle - first, last - middle), self.candidates).astype(int)
        ):
            start, stop = max(first, middle - half), min(last, middle + half)
            divergence = clipped_divergence(histogram.counts, start, stop, levels)
            if divergence < least:
                least, best = (
                    divergence,
                    (max(low, (start - middle) * width), min(high, (stop - middle) * width)),
                )
        return best


def clipped_divergence(counts: np.ndarray, start: int, stop: int, levels: int) -> float:
    """Return the divergence between a distribution that is clipped and the same one quantized, in nats.

    Args:
        counts: How many values lie in each bin.
        start: First bin of the range.
        stop: Bin behind the last one of the range; values outside count in the bins at the ends.
        levels: Levels that are spread evenly over the range. The values of a level are spread evenly over those of its
            bins that hold any.
    """
    inside = counts[start:stop]
    reference = inside.astype(np.float64)
    reference[0] += counts[:start].sum()
    reference[-1] += counts[stop:].sum()
    level = np.arange(len(inside)) * levels // len(inside)
    occupied = inside > 0
    total = np.bincount(level, weights=inside, minlength=levels)
    share = np.bincount(level, weights=occupied, minlength=levels)
    quantized = np.where(occupied, (total / np.maximum(share, 1))[level], 0.0)
    if not reference.sum() or not quantized.sum():
        return float(np.inf)
    wanted, given = reference / reference.sum(), quantized / quantized.sum()
    occurs = wanted > 0
    return float((wanted[occurs] * np.log(wanted[occurs] / np.maximum(given[occurs], _LEAST))).sum())
