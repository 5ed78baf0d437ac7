"""What a trial costs: MACs, parameters or bytes counted from the axes, or the latency measured in a runtime.

A cost is asked twice: *before* a model is built, for counts of axes (to plan, to bound actions), and *after*, for the
small model itself. Counted costs are the same both times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.graph.analysis import Analysis
from dwindle.graph.counts import Counts
from dwindle.measure.measuring import measure
from dwindle.realize.cost import CostModel

__all__ = ["COSTS", "Budget", "Cost", "CountedCost", "MeasuredLatency", "share_of_latency"]

#: Costs by name; ``"latency:RUNTIME"`` besides.
COSTS = ("macs", "params", "bytes", "latency")


class Cost(Protocol):
    """A cost that falls when counts fall."""

    name: str

    def predicted(self, counts: Counts) -> float:
        """Return what a model with these counts will cost."""

    def measured(self, counts: Counts, model: nn.Module) -> float:
        """Return what a built model costs."""

    def observe(self, counts: Counts, cost: float) -> None:
        """Learn from a finished trial."""


@dataclass(frozen=True)
class Budget:
    """A share of the whole model's cost.

    Attributes:
        cost: Name of the cost.
        share: What may stay of it, above 0 and at most 1.
    """

    cost: str
    share: float

    @classmethod
    def of(cls, given: Mapping[str, float]) -> Budget:
        """Return the budget that a mapping such as ``{"macs": 0.5}`` says.

        Raises:
            ConfigError: It does not hold exactly one known cost and a share.
        """
        if len(given) != 1:
            raise ConfigError(f"budget: give exactly one of {', '.join(COSTS)}, got {sorted(given)}")
        ((name, share),) = given.items()
        if name not in COSTS and not name.startswith("latency:"):
            raise ConfigError(f"budget: {name!r} is not one of {', '.join(COSTS)}{did_you_mean(name, COSTS)}")
        if not 0 < float(share) <= 1:
            raise ConfigError(f"budget: {name} = {share} is not a share above 0 and up to 1")
        return cls(name, float(share))


class CountedCost:
    """MACs, parameters or bytes, counted from the axes of the recording (:class:`dwindle.realize.cost.CostModel`)."""

    def __init__(self, name: str, analysis: Analysis) -> None:
        self.name = name
        self._model = CostModel.of(analysis)

    def predicted(self, counts: Counts) -> float:
        """Return the cost of counts."""
        return float(self._model.cost(self.name, counts))

    def measured(self, counts: Counts, model: nn.Module) -> float:
        """Return the same: nothing needs to be measured."""
        return self.predicted(counts)

    def observe(self, counts: Counts, cost: float) -> None:
        """Nothing is learned: the count is exact."""


class SharePredictor(Protocol):
    """Predicts latency: a :class:`~dwindle.search.latency_prediction.LatencyPredictor`, or a price for MACs."""

    def share(self, counts: Counts) -> float:
        """Return the predicted share of the whole model's latency."""


class MeasuredLatency:
    """The latency (the median of one forward pass) in a runtime, as a share of the whole model's; predicted by a fit.

    Args:
        name: ``"latency"`` (torch) or ``"latency:RUNTIME"``, see :func:`dwindle.measure.runtimes.get_runtime`.
        predictor: Predicts the share for counts.
        measure: Measures a model: returns its share.
    """

    def __init__(self, name: str, predictor: SharePredictor, measure: Callable[[nn.Module], float]) -> None:
        self.name = name
        self.predictor = predictor
        self.measure = measure
        #: By how much trials were slower than predicted, on a moving average.
        self.correction = 1.0

    def predicted(self, counts: Counts) -> float:
        """Return the share that the fitted model gives, corrected by the trials so far."""
        return self.correction * self.predictor.share(counts)

    def measured(self, counts: Counts, model: nn.Module) -> float:
        """Return the latency of a model as a share of the whole model's."""
        return self.measure(model)

    def observe(self, counts: Counts, cost: float) -> None:
        """Move the correction toward the ratio of measured to predicted."""
        ratio = cost / self.predictor.share(counts)
        self.correction += 0.2 * (ratio - self.correction)


def share_of_latency(
    model: nn.Module,
    whole: nn.Module,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    runtime: str,
    *,
    threads: int | None,
    repeats: int,
) -> float:
    """Time a model and the whole one in turn, and return the ratio of their medians.

    Args:
        model: The smaller model.
        whole: The model that the search began with.
        inputs: Positional example inputs.
        kwargs: Keyword inputs.
        runtime: Name of the runtime.
        threads: Threads of one pass; None: the runtime's own choice.
        repeats: Timed calls.
    """
    models = {"small": model, "whole": whole}
    found = measure(models, tuple(inputs), kwargs, runtimes=[runtime], threads=threads, repeats=repeats)
    small, all_of_it = (next(iter(found[name].latency.values())).p50 for name in models)
    return float(small / all_of_it)
