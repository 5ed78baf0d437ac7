"""One search for the best model within limits: it begins greedily, tries, trains the best to the end, and measures."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from dwindle.config.errors import DwindleError
from dwindle.quantization.aware_training import finished
from dwindle.realize.repair import repair
from dwindle.search.auto.beginning import Beginning
from dwindle.search.auto.candidate import Candidate
from dwindle.search.auto.efforts import Effort
from dwindle.search.auto.fitting import Fitted, Fitter
from dwindle.search.auto.joint import JointSubject, Wish
from dwindle.search.auto.judging import Judge
from dwindle.search.auto.latencies import Latencies
from dwindle.search.auto.limits import Limit, runtime_of
from dwindle.search.auto.making import Loss, Shortened, Training, built, integer_model, trained
from dwindle.search.auto.result import AutoResult
from dwindle.search.auto.variant import Workpiece
from dwindle.search.auto.workbench import Workbench
from dwindle.search.journal import checksum
from dwindle.search.studies import Report, StudyResult, run_study
from dwindle.training.normalization_statistics import adapt_normalization
from dwindle.training.progress import narrated

__all__ = ["Searching"]

#: From so many trials on, those that do worse than the median after as many epochs are given up.
_TRIALS_TO_COMPARE = 10

#: So many batches are trained to see how long an epoch takes.
_TIMED_BATCHES = 6

#: How far above its limit a time may lie that is measured at the end.
_TOLERANCE = 0.05


class Searching:
    """Searches for one model, under one budget after another.

    Args:
        workpiece: The original and its variants.
        data: Training batches.
        judge: Scores models.
        effort: How long.
        training: How candidates are trained.
        loss: None trains by the original's answers alone.
        methods: What may be done.
        seed: Of everything random.
        threads: Threads of a timed pass.
        progress: Whether to show what is done.
    """

    def __init__(
        self,
        workpiece: Workpiece,
        data: Any,
        judge: Judge,
        effort: Effort,
        training: Training,
        loss: Loss | None,
        methods: Sequence[str],
        seed: int,
        threads: int | None,
        progress: bool | None,
    ) -> None:
        self.workpiece, self.data, self.judge, self.effort = workpiece, data, judge, effort
        self.training, self.loss, self.methods = training, loss, tuple(methods)
        self.seed, self.threads, self.progress = seed, threads, progress
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []

    def open(self, costs: Sequence[str]) -> None:
        """Measure the original.

        Args:
            costs: Everything that will be limited.
        """
        own = self.workpiece
        with narrated("auto", shown=self.progress) as tell, self._timed("original"):
            tell("measuring the original")
            self.bench = Workbench(own.model, own.inputs, own.kwargs, costs, threads=self.threads)
            self.original_score = self.judge(own.model)
        runtimes = {name for name in map(runtime_of, costs) if name}
        self.backend = "openvino" if runtimes == {"openvino"} else "onnxruntime"
        self.latencies = Latencies(own, self.bench, self.backend, self.threads)

    def run(
        self, limits: Sequence[Limit], max_drop: float, storage: str | os.PathLike[str] | None
    ) -> AutoResult:
        """Search within limits, train the best candidates, and measure the best of those.

        Args:
            limits: The budget.
            max_drop: What the score may lose.
            storage: Where trials are kept.

        Raises:
            DwindleError: No candidate within the budget was found.
        """
        fitter = Fitter(self.workpiece, self.bench, limits, self.backend, self.latencies)
        beginning = Beginning(
            fitter,
            self.methods,
            self.loss is not None,
            self.effort.trials,
            self.latencies.widths,
            self.training.quantize_at,
        )
        with narrated("auto", shown=self.progress) as tell, self._timed("greedy"):
            tell("greedy candidates")
            choices = beginning.choices()
            wishes = beginning.wishes(choices)
        subject = self.subject = JointSubject(
            fitter, choices, self._assess, self._identity(limits), self.latencies.widths
        )
        self.effort = self._within_time(wishes[0])
        compares = self.effort.trials > _TRIALS_TO_COMPARE and self.effort.trial_share > 0
        with self._timed("trials"):
            study = run_study(
                subject,
                trials=self.effort.trials,
                name=f"auto {', '.join(map(str, limits))}",
                storage=storage,
                pruner="median" if compares else None,
                seed=self.seed,
                enqueue=[subject.parameters_of(wish) for wish in wishes],
                progress=self.progress,
            )
        with self._timed("training"):
            candidate, model, score = self._best(study)
        return self._result(candidate, model, score, limits, fitter.allowed, max_drop, study)

    def again(self, candidate: Candidate, limits: Sequence[Limit], max_drop: float) -> AutoResult:
        """Make, train and measure one candidate, without a search.

        Args:
            candidate: What is done to the original.
            limits: The budget that its costs are compared with.
            max_drop: What the score may lose.
        """
        with self._timed("training"):
            if self.effort.trial_share:
                model, score = self._trained(candidate, self.training.epochs * self.training.share)
            else:
                model = self._untrained(candidate)
                score = self.judge(model)
        allowed = {limit.cost: limit.allowed(self.bench.whole[limit.cost]) for limit in limits}
        return self._result(candidate, model, score, limits, allowed, max_drop, None)

    def _result(
        self,
        candidate: Candidate,
        model: nn.Module,
        score: float,
        limits: Sequence[Limit],
        allowed: Mapping[str, float],
        max_drop: float,
        study: StudyResult | None,
    ) -> AutoResult:
        """Prove the cut, measure the model beside the original, and judge its file in each runtime."""
        with self._timed("measuring"):
            small = built(self.workpiece, candidate, verify=True)
            costs = self.bench.measure(
                model, small, integers=candidate.numbers == "int8", float_layers=candidate.float_layers
            )
            scores = {name: self.judge(session) for name, session in self.bench.sessions().items()}
        wanted = [limit.cost for limit in limits]
        return AutoResult(
            model=model,
            candidate=candidate,
            limits=tuple(limits),
            allowed=allowed,
            original_costs={cost: self.bench.whole[cost] for cost in wanted},
            costs={cost: costs[cost] for cost in wanted},
            original_score=self.original_score,
            score=score,
            scores=scores,
            max_drop=max_drop,
            tolerance=_TOLERANCE,
            study=study,
            seconds=dict(self.seconds),
            notes=list(self.notes),
            trial_share=self.effort.trial_share,
            example=(self.workpiece.inputs, self.workpiece.kwargs),
        )

    # trials

    def _within_time(self, wish: Wish) -> Effort:
        """Return the effort that the time allows, after a few batches of the training of one candidate."""
        if self.effort.seconds is None or not self.effort.trial_share:
            return self.effort
        wished = self.subject.fitted(wish).candidate
        batches = max(1, min(_TIMED_BATCHES, len(self.data)))
        with self._timed("greedy"):
            begin = time.perf_counter()
            self._trained(wished, batches / len(self.data) if batches < len(self.data) else 1)
            epoch = (time.perf_counter() - begin) * len(self.data) / batches
        allowed = self.effort.within(epoch, self.training.epochs, sum(self.seconds.values()))
        if allowed != self.effort:
            self._note(
                f"an epoch takes about {epoch:.0f} s: {allowed.trials} trials of "
                f"{allowed.trial_share * self.training.epochs:.2g} epochs, {allowed.finalists} trained to the end"
            )
        return allowed

    def _assess(self, candidate: Candidate, report: Report) -> float:
        if not self.effort.trial_share:
            return self.judge(self._untrained(candidate))
        return self._trained(candidate, self.training.epochs * self.effort.trial_share, report)[1]

    def _untrained(self, candidate: Candidate) -> nn.Module:
        """Return the model of a candidate without training: repaired on unlabelled data, and rounded."""
        original = self.workpiece.model
        small = built(self.workpiece, candidate)
        plain = self.workpiece.unlabelled()
        if candidate.counts or candidate.blocks or candidate.ranks:
            try:
                repair(small, original, plain, adapt=_as_it_is)
            except DwindleError as error:
                self._note(f"not repaired: {error}")
        adapt_normalization(small, plain, adapt=_as_it_is)
        if candidate.numbers == "int8":
            return integer_model(self.workpiece, candidate, small, self.backend)
        return small

    def _trained(
        self, candidate: Candidate, wanted: float, report: Report | None = None
    ) -> tuple[nn.Module, float]:
        """Return the model of a candidate after some epochs (or a part of one), and its score."""
        latest = [0.0]
        epochs, data = max(1, round(wanted)), self.data
        if wanted < 1:
            data = Shortened(data, max(1, round(wanted * len(data))))

        def after_epoch(epoch: int, model: nn.Module) -> None:
            if report is not None or epoch == epochs:
                latest[0] = self.judge(model)
            if report is not None and epoch < epochs:
                report(epoch, latest[0])

        model = trained(
            self.workpiece,
            candidate,
            built(self.workpiece, candidate),
            data,
            self.training,
            epochs=epochs,
            loss=self.loss,
            backend=self.backend,
            seed=self.seed,
            after_epoch=after_epoch,
            progress=self.progress,
        )
        return finished(model), latest[0]

    # the end

    def _best(self, study: StudyResult) -> tuple[Candidate, nn.Module, float]:
        """Train the best candidates to the end, and return the best of those with its score."""
        fitting = sorted(
            (trial for trial in study.trials if trial.feasible), key=lambda own: -own.values["score"]
        )
        if not fitting:
            raise DwindleError(study._why_none())
        scores: dict[str, float] = {}
        candidates: dict[str, Candidate] = {}
        for trial in fitting:
            candidate = Candidate.from_json(trial.attributes["candidate"])
            scores.setdefault(candidate.key, trial.values["score"])
            candidates.setdefault(candidate.key, candidate)
        found: list[tuple[float, Candidate, nn.Module]] = []
        for candidate in self._finalists(list(candidates.values())):
            if self.effort.trial_share:
                model, score = self._trained(candidate, self.training.epochs)
            else:
                model, score = self._untrained(candidate), scores[candidate.key]
            found.append((score, candidate, model))
        score, candidate, model = max(found, key=lambda own: own[0])
        return candidate, model, score

    def _finalists(self, ranked: Sequence[Candidate]) -> list[Candidate]:
        """Return the best candidates that are within the budget when they are measured once more; at least one."""
        chosen: list[Candidate] = []
        missed: list[Fitted] = []
        for candidate in ranked:
            if len(chosen) >= self.effort.finalists:
                break
            now = self.subject.fitter.confirmed(candidate)
            if now.fits:
                chosen.append(candidate)
            else:
                missed.append(now)
        return chosen or [min(missed, key=lambda own: own.over).candidate]

    def _identity(self, limits: Sequence[Limit]) -> dict[str, Any]:
        return {
            "model": checksum(self.workpiece.model.state_dict()),
            "limits": [str(limit) for limit in limits],
            "methods": list(self.methods),
            "epochs": self.training.epochs,
            "trial_share": self.effort.trial_share,
            "seed": self.seed,
        }

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[part] = round(self.seconds.get(part, 0.0) + time.perf_counter() - begin, 2)


def _as_it_is(inputs: Any) -> Any:
    return inputs
