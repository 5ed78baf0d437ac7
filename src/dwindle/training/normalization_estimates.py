"""Three ways to make running statistics of the batches that come to a normalization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dwindle.training.moments import Moments, moments_of
from dwindle.training.processes import sum_over_processes

__all__ = ["Estimate", "MeanOfBatches", "MovingAverage", "OfAllValues"]


class Estimate:
    """Mean and variance of what a normalization is given.

    Attributes:
        calls: How many batches came.
    """

    def __init__(self) -> None:
        self.calls = 0

    def add(self, value: Tensor) -> None:
        """Take in a batch, shape ``(batch, channels, ...)``."""

    def share(self) -> None:
        """Take in what the other processes saw; all must call it."""

    def result(self) -> tuple[Tensor, Tensor]:
        """Return mean and unbiased variance, float64, shape ``(channels,)``."""
        raise NotImplementedError

    def _all_calls(self, device: torch.device) -> Tensor:
        calls = torch.tensor(float(self.calls), dtype=torch.float64, device=device)
        sum_over_processes([calls])
        self.calls = int(calls)
        return calls


class OfAllValues(Estimate):
    """Mean and variance of all values, however they were cut into batches."""

    def __init__(self, channels: int, device: torch.device) -> None:
        super().__init__()
        self.moments = Moments.nothing(channels, device)

    def add(self, value: Tensor) -> None:
        """Take in a batch."""
        self.moments = self.moments.with_others(moments_of(value))

    def share(self) -> None:
        """Add up the moments of all processes."""
        own = self.moments
        self._all_calls(own.mean.device)
        count, total = own.count.clone(), own.mean * own.count
        sum_over_processes([count, total])
        mean = total / count.clamp(min=1)
        squares = own.squares + own.count * (own.mean - mean).square()
        sum_over_processes([squares])
        self.moments = Moments(count, mean, squares)

    def result(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance."""
        return self.moments.mean, self.moments.variance


class MeanOfBatches(Estimate):
    """The mean of each batch's mean and variance."""

    def __init__(self, channels: int, device: torch.device) -> None:
        super().__init__()
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self.variance = self.mean.clone()

    def add(self, value: Tensor) -> None:
        """Take in a batch."""
        own = moments_of(value)
        self.mean += own.mean
        self.variance += own.variance

    def share(self) -> None:
        """Take the mean over the batches of all processes."""
        calls = self._all_calls(self.mean.device).clamp(min=1)
        sum_over_processes([self.mean, self.variance])
        self.mean /= calls
        self.variance /= calls

    def result(self) -> tuple[Tensor, Tensor]:
        """Return the means, once all are shared."""
        return self.mean, self.variance


class MovingAverage(Estimate):
    """A moving average that begins with the old statistics; over processes, the mean of theirs."""

    def __init__(self, norm: nn.Module, weight: float) -> None:
        super().__init__()
        self.mean = norm.get_buffer("running_mean").double().clone()
        self.variance = norm.get_buffer("running_var").double().clone()
        self.weight = weight

    def add(self, value: Tensor) -> None:
        """Take in a batch."""
        own = moments_of(value)
        self.mean += self.weight * (own.mean - self.mean)
        self.variance += self.weight * (own.variance - self.variance)

    def share(self) -> None:
        """Take the mean over the processes to which a batch came."""
        came = torch.tensor(float(self.calls > 0), dtype=torch.float64, device=self.mean.device)
        self.mean *= came
        self.variance *= came
        sum_over_processes([came, self.mean, self.variance])
        self.mean /= came.clamp(min=1)
        self.variance /= came.clamp(min=1)
        self._all_calls(self.mean.device)

    def result(self) -> tuple[Tensor, Tensor]:
        """Return the averages."""
        return self.mean, self.variance
