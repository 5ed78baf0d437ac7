"""What an accuracy-aware training is told, and what it found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from dwindle.config.errors import ConfigError, did_you_mean

__all__ = ["AccuracyAware", "AccuracyOptions", "RateTrial"]


@dataclass(frozen=True)
class AccuracyOptions:
    """How :func:`accuracy_aware` searches.

    Attributes:
        maximum_drop: By how much the metric may be worse than that of the uncompressed model.
        relative: The drop is a share of the uncompressed model's metric.
        mode: Whether ``"max"`` or ``"min"`` of the metric is better.
        step: First distance between two rates, see :class:`dwindle.training.RateSearch`.
        minimum_step: Last distance between two rates.
        first_rate: The first rate; None begins with ``step``.
        largest_rate: No rate is above.
        epochs: Epochs at a rate, at most: training at it ends as soon as the metric is within the bound. 0 only
            evaluates.
        maximum_epochs: Epochs of the whole search, at most.
        go_back: Where a rate does not satisfy, the next one begins from the best state so far. False lets training go
            on from where it is, which spares what was learned there; the best state is kept all the same, and the
            model ends in it.
        progress: Show what is done; None means only when the error output is a terminal.
    """

    maximum_drop: float
    relative: bool = False
    mode: Literal["max", "min"] = "max"
    step: float = 0.1
    minimum_step: float = 0.025
    first_rate: float | None = None
    largest_rate: float = 1.0
    epochs: int = 3
    maximum_epochs: int | None = None
    go_back: bool = True
    progress: bool | None = None

    def __post_init__(self) -> None:
        if not self.maximum_drop >= 0 or not math.isfinite(self.maximum_drop):
            raise ConfigError(f"maximum_drop must not be negative, got {self.maximum_drop!r}")
        if self.mode not in ("max", "min"):
            raise ConfigError(
                f"mode {self.mode!r} is not 'max' or 'min'{did_you_mean(self.mode, ('max', 'min'))}"
            )
        for name in ("epochs", "maximum_epochs"):
            value = getattr(self, name)
            if value is None and name == "maximum_epochs":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name} must be a number of epochs, 0 or more; got {value!r}")

    def bound(self, baseline: float) -> float:
        """Return the worst metric that is good enough."""
        drop = self.maximum_drop * abs(baseline) if self.relative else self.maximum_drop
        return baseline - drop if self.mode == "max" else baseline + drop

    def satisfies(self, metric: float, bound: float) -> bool:
        """Whether a metric is good enough; NaN never is."""
        return metric >= bound if self.mode == "max" else metric <= bound


@dataclass(frozen=True)
class RateTrial:
    """One rate that was tried.

    Attributes:
        rate: The compression rate.
        metric: What the model reached at it, at its last evaluation.
        epochs: Epochs that were trained at it.
        satisfied: Whether that is within the bound.
        seconds: How long it took, in the process that ended it.
    """

    rate: float
    metric: float
    epochs: int
    satisfied: bool
    seconds: float


@dataclass
class AccuracyAware:
    """What :func:`accuracy_aware` found.

    Attributes:
        model: The model at the best rate. Where no rate satisfied, it is as it was before the search (None where
            each rate has a model of its own).
        rate: The largest rate that satisfied; 0.0 where none did.
        metric: What the model reached at it; the baseline where no rate satisfied.
        satisfied: Whether any rate above 0 did.
        baseline: The metric of the uncompressed model.
        bound: The worst metric that is good enough.
        trials: All that was tried, in order.
        ended: Why the search ended.
    """

    model: nn.Module | None
    rate: float
    metric: float
    satisfied: bool
    baseline: float
    bound: float
    trials: tuple[RateTrial, ...]
    ended: str

    def summary(self) -> str:
        """Return the search in a few lines."""
        head = (
            f"rate {self.rate:.4g}, metric {self.metric:.6g}"
            if self.satisfied
            else "no rate is within the bound; the model is not compressed"
        )
        lines = [f"{head} (baseline {self.baseline:.6g}, bound {self.bound:.6g}); {self.ended}"]
        for own in self.trials:
            verdict = "within the bound" if own.satisfied else "not within"
            lines.append(
                f"  rate {own.rate:.4g}: metric {own.metric:.6g} after {own.epochs} epochs, {verdict}"
            )
        return "\n".join(lines)
