"""Predictors of latencies for the variants of one model: the cost model where the runtime has one, else a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dwindle.config.errors import DwindleError
from dwindle.realize.cost import CostModel
from dwindle.search.auto.limits import runtime_of
from dwindle.search.auto.predicting import Predictor
from dwindle.search.auto.variant import Variant, Workpiece
from dwindle.search.auto.workbench import Workbench
from dwindle.search.latency_prediction import LatencyPredictor, latency_predictor

__all__ = ["Latencies"]

#: Of the time of a whole model, what does not shrink with its multiply-accumulates, where nothing better is known.
_FIXED = 0.3


class Latencies:
    """Makes predictors, each once.

    Args:
        workpiece: The original.
        bench: Has measured it.
        threads: Threads of one pass.
    """

    def __init__(self, workpiece: Workpiece, bench: Workbench, threads: int | None) -> None:
        self.workpiece, self.bench, self.threads = workpiece, bench, threads
        self._predictors: dict[tuple[int, str, bool], LatencyPredictor | None] = {}

    def predictor(
        self, variant: Variant, cost: str, integers: bool, float_layers: Sequence[str]
    ) -> Predictor:
        """Return what predicts milliseconds from counts.

        Args:
            variant: Whose counts.
            cost: ``"latency:RUNTIME"``.
            integers: Whether it will run in int8.
            float_layers: Layers that will not; what they change is learned from measurements.
        """
        found = self._predictor(variant, cost, integers)
        whole = self.bench.whole[cost]
        if found is not None:
            return lambda counts: found.share(counts) * whole
        macs = CostModel.of(variant.problem.analysis)
        full = max(macs.macs({}), 1.0)
        return lambda counts: whole * (_FIXED + (1 - _FIXED) * macs.macs(counts) / full)

    def widths(self, variant: Variant) -> Mapping[str, Sequence[int]] | None:
        """Return the counts that the runtimes like, by variable; None where there is no cost model."""
        known = [
            own for (key, _, _), own in self._predictors.items() if key == id(variant) and own is not None
        ]
        if not known:
            return None
        found: dict[str, set[int]] = {}
        for predictor in known:
            for variable in variant.space.variables:
                found.setdefault(variable.name, set()).update(predictor.widths(variable))
        return {name: sorted(widths) for name, widths in found.items()}

    def _predictor(self, variant: Variant, cost: str, integers: bool) -> LatencyPredictor | None:
        key = (id(variant), cost, integers)
        if key not in self._predictors:
            self._predictors[key] = self._made(variant, cost, integers)
        return self._predictors[key]

    def _made(self, variant: Variant, cost: str, integers: bool) -> LatencyPredictor | None:
        runtime = runtime_of(cost)
        if runtime is None or runtime.startswith("torch"):
            return None
        try:
            return latency_predictor(
                variant.model,
                self.workpiece.inputs,
                self.workpiece.kwargs or None,
                runtime=runtime,
                precision="int8" if integers else "float32",
                analysis=variant.problem.analysis,
                space=variant.space,
                calibration_data=self.workpiece.batches[:1] if integers else None,
                threads=self.threads,
                measurements=3,
            )
        except DwindleError:
            return None  # what has no such model is fitted by measurements alone
