"""From a wish (which blocks go, how axes share the loss) to a candidate that was measured to be within the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dwindle.config.errors import DwindleError
from dwindle.graph.counts import Counts
from dwindle.search.auto.allocation import uniform_counts
from dwindle.search.auto.candidate import Candidate
from dwindle.search.auto.latencies import Latencies
from dwindle.search.auto.limits import Limit
from dwindle.search.auto.making import built, integer_model
from dwindle.search.auto.predicting import PredictedCosts
from dwindle.search.auto.variant import Variant, Workpiece
from dwindle.search.auto.workbench import Workbench
from dwindle.search.space import Space

__all__ = ["Fitted", "Fitter", "Share"]

#: Measured latencies may lie this far above their limit: two measurements of one model differ by about as much.
TOLERANCE = 0.01

#: Where the first predictions aim, below the limit.
_AIM = 0.97

#: So many small models are built and measured for one candidate.
_ROUNDS = 5

#: By so much the budget is widened, one after the other, until something is predicted to be within it.
_SLACKS = (1.0, 1.1, 1.25, 1.5, 2.0)

Share = Callable[[Variant, PredictedCosts], "Counts | None"]
"""How the axes of a variant share what must go: from predictions to counts; None where the budget is out of reach."""


@dataclass(frozen=True)
class Fitted:
    """A candidate with what it was measured to cost.

    Attributes:
        candidate: The candidate.
        costs: In the units of the costs, by name.
        over: The largest cost over what is allowed; at most 1, and a tolerance for times, is within the budget.
    """

    candidate: Candidate
    costs: dict[str, float]
    over: float

    @property
    def fits(self) -> bool:
        """Whether it is within the budget."""
        return self.over <= 1 + TOLERANCE


class Fitter:
    """Makes candidates that fit a budget.

    Args:
        workpiece: The original and its variants.
        bench: Measures.
        limits: The budget.
        backend: Where candidates will run.
        latencies: Predicts and measures times for counts.
    """

    def __init__(
        self,
        workpiece: Workpiece,
        bench: Workbench,
        limits: Sequence[Limit],
        backend: str,
        latencies: Latencies,
    ) -> None:
        self.workpiece, self.bench, self.limits, self.backend = workpiece, bench, tuple(limits), backend
        self.allowed = {limit.cost: limit.allowed(bench.whole[limit.cost]) for limit in limits}
        self.latencies = latencies
        self._measured: dict[str, dict[str, float]] = {}

    def measure(self, candidate: Candidate) -> Fitted:
        """Measure a candidate without training it; kept. Where only times count its file is made from a template."""
        if candidate.key not in self._measured:
            self._measured[candidate.key] = self._costs_of(candidate)
        costs = self._measured[candidate.key]
        return Fitted(candidate, costs, max(costs[name] / most for name, most in self.allowed.items()))

    def confirmed(self, candidate: Candidate) -> Fitted:
        """Measure a candidate once more and return the mean: what was chosen for being fast was lucky, too."""
        first, second = self.measure(candidate).costs, self._costs_of(candidate)
        self._measured[candidate.key] = {name: (value + second[name]) / 2 for name, value in first.items()}
        return self.measure(candidate)

    def _costs_of(self, candidate: Candidate) -> dict[str, float]:
        """Measure a candidate now."""
        if (quick := self._timed(candidate)) is not None:
            return quick
        small = built(self.workpiece, candidate)
        integers = candidate.numbers == "int8"
        model = small
        if integers:
            few = self.workpiece.batches[:1]
            model = integer_model(self.workpiece, candidate, small, self.backend, few)
        return self.bench.measure(model, small, integers=integers, float_layers=candidate.float_layers)

    def _timed(self, candidate: Candidate) -> dict[str, float] | None:
        """Return the times of a candidate by its template; None where that is not enough or not possible."""
        late = candidate.ranks and not candidate.factorize_first
        if late or not all(cost.startswith("latency:") for cost in self.allowed):
            return None
        variant = self.workpiece.variant(candidate.blocks, candidate.ranks)
        if not variant.can_shrink:
            return None
        counts = variant.space.from_names(candidate.counts)
        return self.latencies.measured(variant, counts, candidate.numbers == "int8", candidate.float_layers)

    def fit(self, base: Candidate, share: Share) -> Fitted | None:
        """Choose counts for a candidate that has none, so that what is measured is just within the budget.

        Predictions are corrected by each measurement and counts chosen anew, until a model is within the limits and
        uses most of what is allowed.

        Args:
            base: Its blocks, ranks, numbers and layers in float.
            share: How the axes share what must go.

        Returns:
            The largest that fits; else what came nearest; None where the budget is out of reach.
        """
        variant = self.workpiece.variant(base.blocks, base.ranks if base.factorize_first else {})
        whole = self._measured_or_none(base)
        if whole is not None and whole.fits:
            return whole
        if not variant.can_shrink:
            return whole
        costs = self._costs(variant, base)
        if whole is not None:
            costs.observe(variant.space.full(), whole.costs)
        best: Fitted | None = None
        seen: set[str] = set()
        for _ in range(_ROUNDS):
            counts = share(variant, costs) if best is not None else _first_counts(share, variant, costs)
            if counts is None:
                break
            candidate = base.but(counts=cut_counts(variant.space, counts))
            if candidate.key in seen:
                break
            seen.add(candidate.key)
            now = self._measured_or_none(candidate)
            if now is None:
                break
            if best is None or _rank(now) > _rank(best):
                best = now
            if now.fits and now.over >= _AIM - 0.04:
                break
            costs.observe(counts, {name: value / _AIM for name, value in now.costs.items()})
        return best

    def _measured_or_none(self, candidate: Candidate) -> Fitted | None:
        try:
            return self.measure(candidate)
        except DwindleError:
            return (
                None  # a cut that cannot be proven, a layer that has no int8 form: another candidate's turn
            )

    def _costs(self, variant: Variant, base: Candidate) -> PredictedCosts:
        integers = base.numbers == "int8"
        latencies = {
            limit.cost: self.latencies.predictor(variant, limit.cost, integers, base.float_layers)
            for limit in self.limits
            if limit.cost.startswith("latency:")
        }
        return PredictedCosts(
            variant.problem.analysis,
            self.limits,
            self.allowed,
            integers=integers,
            float_layers=base.float_layers,
            latencies=latencies,
        )


def _first_counts(share: Share, variant: Variant, costs: PredictedCosts) -> Counts | None:
    """Return the first counts to measure: somewhat above the budget where none is predicted to be within it.

    What was learned from the whole model may be far off for small ones; what is learned from a small one is not.
    """
    for slack in _SLACKS:
        counts = share(variant, costs.widened(slack))
        if counts is not None:
            return counts
    return None


def _rank(fitted: Fitted) -> tuple[bool, float]:
    """Within the budget and the largest, else the nearest above."""
    return fitted.fits, fitted.over if fitted.fits else -fitted.over


def cut_counts(space: Space, counts: Counts) -> dict[str, int]:
    """Return the counts of the axes that lose something, by name."""
    named = space.named(counts)
    return {v.name: named[v.name] for v in space.variables if named[v.name] < v.size}


def uniform_share() -> Share:
    """Return the share by which every axis loses the same part."""
    return lambda variant, costs: uniform_counts(variant.space, costs.over)
