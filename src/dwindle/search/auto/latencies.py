"""Latencies of the variants of one model, for any counts: predicted by the cost model, or measured without an export.

A template of a variant's file (:mod:`dwindle.search.latency_prediction`) gives the file for any counts in
milliseconds, so that a cut model can be timed in a runtime before it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from dwindle.config.errors import DwindleError
from dwindle.graph.counts import Counts
from dwindle.realize.cost import CostModel
from dwindle.search.auto.candidate import Candidate
from dwindle.search.auto.limits import runtime_of
from dwindle.search.auto.making import integer_model
from dwindle.search.auto.predicting import Predictor
from dwindle.search.auto.variant import Variant, Workpiece
from dwindle.search.auto.workbench import Workbench
from dwindle.search.latency_prediction import LatencyPredictor, latency_predictor
from dwindle.search.latency_prediction.preparing import template_of

__all__ = ["Latencies"]

#: Of the time of a whole model, what does not shrink with its multiply-accumulates, where nothing better is known.
_FIXED = 0.3


class Latencies:
    """Predicts and measures, each template and each predictor made once.

    Args:
        workpiece: The original.
        bench: Has measured it.
        backend: Where candidates will run.
        threads: Threads of one pass.
    """

    def __init__(self, workpiece: Workpiece, bench: Workbench, backend: str, threads: int | None) -> None:
        self.workpiece, self.bench, self.backend, self.threads = workpiece, bench, backend, threads
        self._templates: dict[Any, Any] = {}
        self._predictors: dict[Any, LatencyPredictor | None] = {}

    def predictor(
        self, variant: Variant, cost: str, integers: bool, float_layers: Sequence[str]
    ) -> Predictor:
        """Return what predicts milliseconds from counts.

        Args:
            variant: Whose counts.
            cost: ``"latency:RUNTIME"``.
            integers: Whether it will run in int8.
            float_layers: Layers that will not.
        """
        found = self._predictor(variant, cost, integers, tuple(float_layers))
        whole = self.bench.whole[cost]
        if found is not None:
            return lambda counts: found.share(counts) * whole
        macs = CostModel.of(variant.problem.analysis)
        full = max(macs.macs({}), 1.0)
        return lambda counts: whole * (_FIXED + (1 - _FIXED) * macs.macs(counts) / full)

    def measured(
        self, variant: Variant, counts: Counts, integers: bool, float_layers: Sequence[str]
    ) -> dict[str, float] | None:
        """Return the milliseconds of the variant cut to counts, by cost; None where its file has no template."""
        template = self._template(variant, integers, tuple(float_layers))
        if template is None:
            return None
        return self.bench.time_file(template[0].model(counts), template[0].feed(counts))

    def widths(self, variant: Variant) -> Mapping[str, Sequence[int]] | None:
        """Return the counts that the runtimes like, by variable; None where there is no cost model."""
        known = [own for key, own in self._predictors.items() if key[0] == id(variant) and own is not None]
        if not known:
            return None
        found: dict[str, set[int]] = {}
        for predictor in known:
            for variable in variant.space.variables:
                found.setdefault(variable.name, set()).update(predictor.widths(variable))
        return {name: sorted(widths) for name, widths in found.items()}

    def _template(self, variant: Variant, integers: bool, float_layers: tuple[str, ...]) -> Any:
        key = (id(variant), integers, float_layers)
        if key not in self._templates:
            self._templates[key] = _or_none(lambda: self._written(variant, integers, float_layers))
        return self._templates[key]

    def _written(self, variant: Variant, integers: bool, float_layers: tuple[str, ...]) -> Any:
        return template_of(
            variant.model,
            self.workpiece.inputs,
            self.workpiece.kwargs or None,
            analysis=variant.problem.analysis,
            space=variant.space,
            quantized=self._quantizing(float_layers) if integers else None,
        )

    def _quantizing(self, float_layers: tuple[str, ...]) -> Callable[[nn.Module], nn.Module]:
        workpiece, candidate = self.workpiece, Candidate(float_layers=float_layers)
        return lambda model: integer_model(workpiece, candidate, model, self.backend, workpiece.batches[:1])

    def _predictor(
        self, variant: Variant, cost: str, integers: bool, float_layers: tuple[str, ...]
    ) -> LatencyPredictor | None:
        key = (id(variant), cost, integers, float_layers)
        if key not in self._predictors:
            self._predictors[key] = _or_none(lambda: self._made(variant, cost, integers, float_layers))
        return self._predictors[key]

    def _made(
        self, variant: Variant, cost: str, integers: bool, float_layers: tuple[str, ...]
    ) -> LatencyPredictor | None:
        runtime = runtime_of(cost)
        template = self._template(variant, integers, float_layers)
        if runtime is None or runtime.startswith("torch") or template is None:
            return None
        return latency_predictor(
            variant.model,
            self.workpiece.inputs,
            self.workpiece.kwargs or None,
            runtime=runtime,
            precision="int8" if integers else "float32",
            analysis=variant.problem.analysis,
            space=variant.space,
            threads=self.threads,
            measurements=4,
            template=template,
        )


def _or_none(make: Callable[[], Any]) -> Any:
    """Return what is made; None where the model has no such file: measurements of exports tell the rest."""
    try:
        return make()
    except DwindleError:
        return None
