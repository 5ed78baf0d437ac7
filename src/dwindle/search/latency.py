"""A model of relative latency: a constant and a price for the multiply-accumulates of each module, by measurements.

Whole small models are measured, and ``t = c + sum_m p_m * macs_m(counts)`` is fitted to the times by ridge regression
toward the price that all modules have in common, so that few measurements suffice: what they do not tell apart keeps
the common price. Prices stay at or above zero, so that a smaller model is never predicted to be slower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dwindle.config.errors import ConfigError
from dwindle.graph.counts import Counts
from dwindle.realize.cost import CostModel

__all__ = ["LatencyModel", "fit_prices"]


@dataclass(frozen=True)
class LatencyModel:
    """Predicts the share of the whole model's latency from counts.

    Attributes:
        modules: Cost model of each module, by path.
        constant: What stays whatever the counts.
        prices: What a multiply-accumulate takes, by module.
        error: Largest relative error over the measurements it was fitted to.
    """

    modules: Mapping[str, CostModel]
    constant: float
    prices: Mapping[str, float]
    error: float

    def share(self, counts: Counts) -> float:
        """Return the predicted share for counts."""
        return self.constant + sum(
            price * self.modules[path].macs(counts)
            for path, price in self.prices.items()
            if path in self.modules
        )

    @classmethod
    def fitted(
        cls, modules: Mapping[str, CostModel], samples: Sequence[Counts], times: Sequence[float]
    ) -> LatencyModel:
        """Fit prices to measured times.

        Args:
            modules: Cost model of each module.
            samples: Counts of the measured models.
            times: Their latency as a share of the whole model's.

        Raises:
            ConfigError: There are fewer than two samples, or a time is not a positive number.
        """
        if len(samples) < 2 or not all(math.isfinite(time) and time > 0 for time in times):
            raise ConfigError("latency: at least two measured times above zero are needed")
        paths = list(modules)
        macs = torch.tensor(
            [[modules[path].macs(counts) for path in paths] for counts in samples], dtype=torch.float64
        )
        measured = torch.tensor(list(times), dtype=torch.float64)
        constant, prices = fit_prices(macs, measured)
        predicted = constant + macs @ prices
        error = float(((predicted - measured).abs() / measured).max())
        return cls(modules, constant, dict(zip(paths, prices.tolist(), strict=True)), error)


def fit_prices(macs: torch.Tensor, times: torch.Tensor, ridge: float = 1e-2) -> tuple[float, torch.Tensor]:
    """Fit a constant and a price a module, by least squares of relative errors.

    First ``t = c + p * total`` (both at or above zero); then the prices of single modules move away from ``p`` where
    that explains the times better, at the cost of ``ridge`` times the squared relative move.

    Args:
        macs: ``[samples, modules]`` in float64.
        times: ``[samples]``, above zero.
        ridge: How strongly prices hold to the common one.

    Returns:
        The constant, and ``[modules]`` prices at or above zero.
    """
    constant, common = _line(macs.sum(1), times)
    # relative moves m: (t - c - p * total) / t = sum_m (p * macs_m / t) m
    design = common * macs / times[:, None]
    rest = 1 - (constant + common * macs.sum(1)) / times
    identity = torch.eye(macs.shape[1], dtype=macs.dtype)
    moves = torch.linalg.solve(design.T @ design + ridge * identity, design.T @ rest)
    return constant, common * (1 + moves).clamp(min=0.0)


def _line(total: torch.Tensor, times: torch.Tensor) -> tuple[float, float]:
    """Fit ``1 = c / t + p * total / t`` with ``c`` and ``p`` at or above zero."""
    columns = torch.stack([1 / times, total / times], 1)
    constant, price = torch.linalg.lstsq(columns, torch.ones_like(times)[:, None]).solution.flatten().tolist()
    if constant < 0 or price < 0:
        alone = [float(column.sum() / column.square().sum().clamp(min=1e-30)) for column in columns.T]
        errors = [
            float((1 - value * own).square().sum()) for value, own in zip(alone, columns.T, strict=True)
        ]
        return (alone[0], 0.0) if errors[0] < errors[1] else (0.0, alone[1])
    return constant, price
