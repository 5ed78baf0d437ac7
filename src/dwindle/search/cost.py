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
from dwindle.realize.cost import CostModel
from dwindle.search.latency import LatencyModel

__all__ = ["COSTS", "Budget", "Cost", "CountedCost", "MeasuredLatency", "cost_of"]

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


class MeasuredLatency:
    """Milliseconds of one forward pass (the median) in a runtime, measured; predicted by a fitted model.

    Args:
        name: ``"latency"`` (torch) or ``"latency:RUNTIME"``, see :func:`dwindle.measure.runtimes.get_runtime`.
        predictor: Predicts the latency of counts.
        measure: Measures a model: returns milliseconds.
    """

    def __init__(self, name: str, predictor: LatencyModel, measure: Callable[[nn.Module], float]) -> None:
        self.name = name
        self.predictor = predictor
        self.measure = measure
        #: By how much trials were slower than predicted, on a moving average.
        self.correction = 1.0

    def predicted(self, counts: Counts) -> float:
        """Return the latency that the fitted model gives, corrected by the trials so far."""
        return self.correction * self.predictor.milliseconds(counts)

    def measured(self, counts: Counts, model: nn.Module) -> float:
        """Return the median latency of a model in milliseconds."""
        return self.measure(model)

    def observe(self, counts: Counts, cost: float) -> None:
        """Move the correction toward the ratio of measured to predicted."""
        ratio = cost / self.predictor.milliseconds(counts)
        self.correction += 0.2 * (ratio - self.correction)


def cost_of(name: str, analysis: Analysis) -> CountedCost:
    """Return a counted cost by name.

    Raises:
        ConfigError: It is not counted but measured.
    """
    if name not in COSTS or name == "latency":
        raise ConfigError(f"{name!r} is not counted from axes")
    return CountedCost(name, analysis)


def milliseconds(
    model: nn.Module,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    runtime: str,
    *,
    threads: int | None,
    repeats: int,
    batch: int | None = None,
) -> float:
    """Measure the median latency of one forward pass.

    Args:
        model: Any module.
        inputs: Positional example inputs.
        kwargs: Keyword inputs.
        runtime: Name of the runtime.
        threads: Threads of one pass; None: the runtime's own choice.
        repeats: Timed calls.
        batch: Samples in one pass; None: as the inputs are.
    """
    from dwindle.measure.measuring import measure

    found = measure(
        model, tuple(inputs), kwargs, runtimes=[runtime], threads=threads, repeats=repeats, batch=batch
    )
    return float(next(iter(found.latency.values())).p50)
