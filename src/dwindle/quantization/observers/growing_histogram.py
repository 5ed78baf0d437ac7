"""A histogram of a stream whose range is not known beforehand."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


class GrowingHistogram:
    """Equal bins over ``[-reach, reach]``.

    When a value lies outside, ``reach`` doubles and bins merge in pairs.

    Merging is exact (a bin is the sum of two old ones), so the counts do not depend on the order of batches
    except through the bin width.

    Args:
        bins: Number of bins, a multiple of four.
    """

    def __init__(self, bins: int = 4096) -> None:
        if bins < 4 or bins % 4:
            raise ValueError(f"bins {bins} is not a multiple of four")
        self.bins = bins
        self.reach = 0.0
        self.counts = np.zeros(bins, dtype=np.float64)
        self.low = math.inf
        self.high = -math.inf

    def add(self, value: Tensor) -> None:
        """Count a tensor's values. Values that are not finite are left out."""
        value = value.detach().float().reshape(-1)
        if not value.numel():
            return
        low, high = (float(edge) for edge in value.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            value = value[torch.isfinite(value)]
            if not value.numel():
                return
            low, high = (float(edge) for edge in value.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        wanted = max(-low, high)
        if self.reach == 0.0:
            self.counts[self.bins // 2] += self.counts.sum() - self.counts[self.bins // 2]
            self.reach = wanted
        while self.reach < wanted:
            self._double()
        if self.reach == 0.0:  # only zeros so far
            self.counts[self.bins // 2] += value.numel()
            return
        counted = torch.histc(value, self.bins, min=-self.reach, max=self.reach)
        self.counts += counted.double().cpu().numpy()

    def seen(self) -> tuple[float, float]:
        """Return the smallest and largest value, widened to contain zero.

        Raises:
            ValueError: Nothing was counted.
        """
        if self.low > self.high:
            raise ValueError("nothing was observed")
        return min(self.low, 0.0), max(self.high, 0.0)

    def edges(self) -> np.ndarray:
        """Return the ``bins + 1`` borders of the bins, float64."""
        return np.linspace(-self.reach, self.reach, self.bins + 1)

    def _double(self) -> None:
        quarter = self.bins // 4
        merged = self.counts.reshape(-1, 2).sum(axis=1)
        self.counts = np.zeros(self.bins, dtype=np.float64)
        self.counts[quarter : 3 * quarter] = merged
        self.reach *= 2.0
