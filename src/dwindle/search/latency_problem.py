"""What predicts the latency of a search's models: the cost model of the runtime, or else a price for MACs.

The cost model takes a runtime whose layers can be timed one by one, and a model whose export does not change but in its
sizes. For all others (torch itself among them) a few cut models are measured, and a price for the multiply-accumulates
of each module is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dwindle.config.errors import ConfigError, ExportError
from dwindle.graph.analysis import Analysis
from dwindle.graph.counts import Counts
from dwindle.measure.runtimes import get_runtime
from dwindle.realize.cost import CostModel
from dwindle.search.latency import LatencyModel
from dwindle.search.latency_prediction.kernel_times import has_kernel_timer
from dwindle.search.latency_prediction.predictor import LatencyPredictor
from dwindle.search.latency_prediction.preparing import latency_predictor
from dwindle.search.latency_prediction.whole_models import ModelTimer, WholeModelTimer
from dwindle.search.space import Space
from dwindle.search.storage import TrialStore
from dwindle.search.trial import key_of

if TYPE_CHECKING:
    from dwindle.search.problem import Problem

__all__ = ["bound_to", "prepared_prices"]


def prepared_prices(problem: Problem, store: TrialStore) -> LatencyModel | LatencyPredictor:
    """Return what predicts the latency of a problem's models.

    Args:
        problem: Whose budget is a latency.
        store: Holds measurements of an earlier run, and gets those of this one.
    """
    runtime = get_runtime(problem.runtime, threads=problem.threads)
    if has_kernel_timer(runtime):
        timer = StoredTimer(WholeModelTimer(runtime), store, f"{problem.budget.cost} seconds {problem.base}")
        try:
            return latency_predictor(
                problem.model,
                problem.inputs,
                problem.kwargs or None,
                runtime=runtime,
                analysis=problem.analysis,
                space=problem.space,
                model_timer=timer,
            )
        except (ConfigError, ExportError):  # an export that changes with the counts: whole models tell
            pass
    samples = _samples(problem.space)
    times = []
    for counts in samples:
        name = f"{problem.budget.cost} {key_of(problem.space.named(counts), problem.base)}"
        if name not in store.figures:
            store.add_figure(name, problem.measured_share(counts))
        times.append(store.figures[name])
    return LatencyModel.fitted(CostModel.by_module(problem.analysis), samples, times)


def bound_to(
    prices: LatencyModel | LatencyPredictor, analysis: Analysis, space: Space
) -> LatencyModel | LatencyPredictor:
    """Return the same predictions for the model as it is now, after a cut."""
    if isinstance(prices, LatencyPredictor):
        return prices.bound_to(analysis, space)
    return replace(prices, modules=CostModel.by_module(analysis))


class StoredTimer:
    """Times whole models once, and takes the times from a store afterwards.

    Args:
        timer: Measures.
        store: Keeps the times.
        name: Of the measurements in it.
    """

    def __init__(self, timer: ModelTimer, store: TrialStore, name: str) -> None:
        self.timer, self.store, self.name = timer, store, name

    def __call__(self, models: Sequence[Any], feeds: Sequence[Mapping[str, np.ndarray]]) -> Sequence[float]:
        """Return the seconds of each model."""
        names = [f"{self.name} {number}" for number in range(len(models))]
        if any(name not in self.store.figures for name in names):
            for name, seconds in zip(names, self.timer(models, feeds), strict=True):
                self.store.add_figure(name, seconds)
        return [self.store.figures[name] for name in names]


def _samples(space: Space) -> list[Counts]:
    """Counts to measure: the whole model, even cuts, and each variable cut alone."""
    even = [{v.name: share * v.largest_ratio for v in space.variables} for share in (1 / 3, 2 / 3, 1.0)]
    alone = [{variable.name: variable.largest_ratio} for variable in space.variables]
    return [space.full(), *(space.counts(ratios) for ratios in (*even, *alone))]
