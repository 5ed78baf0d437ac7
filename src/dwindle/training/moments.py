"""Count, mean and variance of values that come in parts: exact in float64, whatever the parts are.

Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1982).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moments", "moments_of"]


@dataclass
class Moments:
    """What is known of the values of each channel.

    Attributes:
        count: Values of one channel; 0-d, float64 like the others.
        mean: Shape ``(channels,)``.
        squares: Sum of squared distances from the mean, shape ``(channels,)``.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    @classmethod
    def nothing(cls, channels: int, device: torch.device | str = "cpu") -> Moments:
        """Return the moments of no value."""
        zeros = torch.zeros(channels, dtype=torch.float64, device=device)
        return cls(zeros.new_zeros(()), zeros, zeros.clone())

    @property
    def variance(self) -> Tensor:
        """Unbiased variance, as running statistics hold it; 0 for a single value."""
        return self.squares / (self.count - 1).clamp(min=1)

    def with_others(self, other: Moments) -> Moments:
        """Return the moments of these values and other ones together."""
        count = self.count + other.count
        share = other.count / count.clamp(min=1)
        distance = other.mean - self.mean
        mean = self.mean + distance * share
        return Moments(count, mean, self.squares + other.squares + distance.square() * (self.count * share))


def moments_of(value: Tensor) -> Moments:
    """Return the moments of a batch.

    Args:
        value: Shape ``(batch, channels, ...)`` or ``(batch, channels)``, floating. Half precision is widened.
    """
    wide = value if value.dtype in (torch.float32, torch.float64) else value.float()
    dims = [dim for dim in range(value.dim()) if dim != 1]
    variance, mean = torch.var_mean(wide.detach(), dims, correction=0)
    count = torch.tensor(value.numel() // value.shape[1], dtype=torch.float64, device=value.device)
    return Moments(count, mean.double(), variance.double() * count)
