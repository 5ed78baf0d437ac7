"""What counts of axes will cost, before anything is built: counted from the axes, or predicted for a runtime."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence

from dwindle.graph.analysis import Analysis
from dwindle.graph.counts import Counts
from dwindle.realize.cost import CostModel
from dwindle.search.auto.energy import energy_of
from dwindle.search.auto.limits import Limit

__all__ = ["PredictedCosts"]

Predictor = Callable[[Counts], float]


class PredictedCosts:
    """Predicts what a limit is about, and learns from measurements by how much it was wrong.

    Args:
        analysis: The axes of the model.
        limits: What is limited.
        allowed: The limits in the units of their costs, by name.
        integers: Whether the model will run in int8.
        float_layers: Paths of layers that will not.
        latencies: Predictors of the latencies among the costs, in milliseconds.
    """

    def __init__(
        self,
        analysis: Analysis,
        limits: Sequence[Limit],
        allowed: Mapping[str, float],
        *,
        integers: bool,
        float_layers: Sequence[str],
        latencies: Mapping[str, Predictor],
    ) -> None:
        self.costs = [limit.cost for limit in limits]
        self.allowed = dict(allowed)
        self._observed: dict[str, list[tuple[float, float]]] = {cost: [] for cost in self.costs}
        self._model = CostModel.of(analysis)
        self._modules = CostModel.by_module(analysis)
        self._float = frozenset(float_layers)
        self._integers, self._latencies = integers, dict(latencies)
        self._narrow = [
            integers and _layer_of(name) in self._modules and _layer_of(name) not in self._float
            for name in analysis.trace.parameters
        ]

    def predicted(self, cost: str, counts: Counts) -> float:
        """Return what counts will cost, in the unit of the cost, corrected by what was measured."""
        return _corrected(self._predicted(cost, counts), self._observed[cost])

    def over(self, counts: Counts) -> list[float]:
        """Return for each limit the predicted cost over what is allowed; all at most 1 is within the budget."""
        return [self.predicted(cost, counts) / self.allowed[cost] for cost in self.costs]

    def widened(self, factor: float) -> PredictedCosts:
        """Return the same predictions beside limits that are wider by a factor."""
        wide = copy.copy(self)
        wide.allowed = {cost: factor * most for cost, most in self.allowed.items()}
        return wide

    def observe(self, counts: Counts, measured: Mapping[str, float]) -> None:
        """Learn from what counts did cost: from now on they are predicted as they were measured."""
        for cost in self.costs:
            plain = self._predicted(cost, counts)
            others = [own for own in self._observed[cost] if own[0] != plain]
            self._observed[cost] = sorted([*others, (plain, measured[cost])])

    def _predicted(self, cost: str, counts: Counts) -> float:
        if cost in self._latencies:
            return self._latencies[cost](counts)
        if cost == "params":
            return float(self._model.elements(counts))
        if cost == "macs":
            return self._model.macs(counts)
        if cost in (
            "bytes",
            "peak_memory",
        ):  # activations shrink much as weights do; measuring tells the rest
            return self._bytes(counts)
        whole, in_float = self._macs(counts)
        if cost == "bit_operations":
            return (whole - in_float) * 8 * 8 + in_float * 32 * 32
        return energy_of(whole - in_float, in_float, self._bytes(counts))

    def _macs(self, counts: Counts) -> tuple[float, float]:
        """Multiply-accumulates, and how many of them are in float."""
        whole = self._model.macs(counts)
        if not self._integers:
            return whole, whole
        return whole, sum(self._modules[path].macs(counts) for path in self._float if path in self._modules)

    def _bytes(self, counts: Counts) -> float:
        total = 0.0
        for narrow, (trained, axes, size) in zip(self._narrow, self._model.parameters, strict=True):
            own = CostModel([(trained, axes, size)], []).bytes(counts)
            total += own / 4 if narrow else own
        return total


def _corrected(plain: float, observed: Sequence[tuple[float, float]]) -> float:
    """Return a prediction, corrected by what others were measured to be.

    Args:
        plain: The prediction.
        observed: Other predictions, rising, and what was measured. Between two of them the logarithm of the measured
            cost is on a straight line over that of the predicted one; outside the nearest gives the factor.
    """
    if not observed:
        return plain
    below = [own for own in observed if own[0] <= plain]
    above = [own for own in observed if own[0] > plain]
    if not below or not above:
        predicted, measured = below[-1] if below else above[0]
        return measured * plain / predicted
    (low, cheap), (high, dear) = below[-1], above[0]
    part = math.log(plain / low) / math.log(high / low)
    return cheap * (dear / cheap) ** part


def _layer_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]
