"""``dw.auto``: name a budget, get the best model within it."""

from __future__ import annotations

import copy
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dwindle.config.errors import ConfigError, DwindleError, did_you_mean
from dwindle.graph.modes import in_mode
from dwindle.graph.stand_ins import copied
from dwindle.measure.structure import example_call
from dwindle.quantization.simulation import is_quantized
from dwindle.realize.repair import repair
from dwindle.search.auto.candidate import Candidate
from dwindle.search.auto.fitting import Fitted, Fitter
from dwindle.search.auto.joint import Choices, JointSubject, Wish
from dwindle.search.auto.judging import Judge
from dwindle.search.auto.latencies import Latencies
from dwindle.search.auto.limits import parse_limits, runtime_of
from dwindle.search.auto.making import Loss, Training, built, integer_model, trained
from dwindle.search.auto.result import AutoResult
from dwindle.search.auto.variant import Workpiece
from dwindle.search.auto.workbench import Workbench
from dwindle.search.journal import checksum
from dwindle.search.studies import Report, StudyResult, run_study
from dwindle.training.inputs import forward_inputs
from dwindle.training.normalization_statistics import adapt_normalization
from dwindle.training.progress import narrated

__all__ = ["EFFORTS", "METHODS", "auto"]

METHODS = ("blocks", "widths", "ranks", "int8")
"""What may be done to a model: residual blocks go, axes shrink, layers become chains of low rank, numbers int8."""


@dataclass(frozen=True)
class Effort:
    """How long a search may take.

    Attributes:
        trials: Candidates that are scored.
        trial_share: Share of the full training that a trial has; 0 trains nothing, and repairs instead.
        finalists: Candidates that are trained to the end.
    """

    trials: int
    trial_share: float
    finalists: int


EFFORTS = {
    "seconds": Effort(4, 0.0, 1),
    "minutes": Effort(10, 0.2, 2),
    "hours": Effort(60, 0.3, 4),
}
"""By name: how many candidates are scored, after what share of the training, and how many are trained to the end."""

#: Batches for importances and for ranges.
_BATCHES = 8


def auto(
    model: nn.Module,
    data: Any,
    *,
    budget: Mapping[str, float | str],
    metric: str | Callable[[Callable[..., Any]], float] = "accuracy",
    validation: Iterable[Any] | None = None,
    greater_is_better: bool = True,
    max_drop: float = 0.01,
    effort: str = "minutes",
    trials: int | None = None,
    loss: Loss | None = nn.functional.cross_entropy,
    training: Training | None = None,
    methods: Sequence[str] = METHODS,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    axes: Sequence[str] | None = None,
    storage: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> AutoResult:
    """Find the best small model within a budget.

    Candidates (which residual blocks go, how much of each axis, which layers get a low rank, which stay in float) are
    made to fit the budget by measurement: a small model is built, exported and timed beside the original in the
    runtimes of the budget before anything is trained. A greedy answer comes first; then a search with Optuna goes on
    from it, each trial a short training with the original as teacher and int8 in the loop; the best are trained to the
    end, exported, and measured again. The model itself is only read.

    Args:
        model: A trained float model.
        data: Training batches, ``(inputs, target)``, that can be read again and again; inputs alone with ``loss=None``.
        budget: Limits by cost (:data:`dwindle.search.auto.limits.COSTS`): shares of the original's
            (``{"latency:onnxruntime": 0.25}``) or words (``{"latency:onnxruntime": "8 ms", "bytes": "500 kB"}``). All
            of them hold together.
        metric: ``"accuracy"``, ``"agreement"`` with the original (no labels needed), or a function from something that
            is called like the model to a number.
        validation: Batches that the metric is taken on; a list, or anything that can be iterated once.
        greater_is_better: False for a metric that is a loss.
        max_drop: What the metric may lose against the original. A result that loses more is returned, and says so.
        effort: ``"seconds"`` trains nothing (repair and ranges only, no labels needed), ``"minutes"``, ``"hours"``.
        trials: Candidates that are scored, in place of the effort's own number.
        loss: ``loss(outputs, target)``; None trains by the original's answers alone.
        training: How long and with what optimizer; the defaults suit small networks.
        methods: Some of :data:`METHODS`.
        example_inputs: The inputs whose latency counts; the first validation batch (or of the data) when not given.
        example_kwargs: Keyword inputs.
        ignore: Parameter names, module names or patterns whose axes stay.
        axes: Kinds of axes that may shrink; None: all that shrink by default.
        storage: A file that keeps the trials (SQLite, or what :func:`dwindle.search.studies.run_study` takes); a search
            that was killed goes on there.
        threads: Threads of one timed pass; None: each runtime's own choice.
        seed: Of everything that is random.
        progress: Show what is done; None means only when the error output is a terminal.

    Raises:
        ConfigError: An argument is not valid; nothing was done.
        DwindleError: No candidate within the budget was found; the message says how near the nearest came.
        MissingDependencyError: A runtime, or Optuna, is not installed.
    """
    limits = parse_limits(budget)
    chosen = _effort(effort, trials)
    for name in methods:
        if name not in METHODS:
            raise ConfigError(
                f"methods: {name!r} is not one of {', '.join(METHODS)}{did_you_mean(name, METHODS)}"
            )
    if is_quantized(model):
        raise ConfigError("this model is quantized already; give the float model")
    if max_drop < 0:
        raise ConfigError(f"max_drop: {max_drop} is negative")
    own = copied(model).eval()
    kept = None if validation is None else list(validation)
    batches = list(itertools.islice(iter(data), _BATCHES))
    if not batches:
        raise ConfigError("data: it gave no batch")
    judge = Judge(metric, own, kept, greater_is_better)
    inputs, kwargs = _example(own, example_inputs, example_kwargs, kept or batches)
    workpiece = Workpiece(own, inputs, kwargs, batches, loss, ignore=ignore, axes=axes, seed=seed)
    search = _Search(
        workpiece, data, judge, chosen, training or Training(), loss, tuple(methods), seed, threads, progress
    )
    return search.run(limits, max_drop, storage)


def _effort(name: str, trials: int | None) -> Effort:
    if name not in EFFORTS:
        raise ConfigError(f"effort: {name!r} is not one of {', '.join(EFFORTS)}{did_you_mean(name, EFFORTS)}")
    found = EFFORTS[name]
    if trials is None:
        return found
    if trials < 1:
        raise ConfigError(f"trials: {trials} is not a positive number")
    return Effort(trials, found.trial_share, min(found.finalists, trials))


def _example(
    model: nn.Module, inputs: Any, kwargs: Mapping[str, Any] | None, batches: Sequence[Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if inputs is None and not kwargs:
        return forward_inputs(model, batches[0])
    args, named = example_call(model, inputs, kwargs)
    return tuple(args), dict(named)


class _Search:
    """One call of :func:`auto`."""

    def __init__(
        self,
        workpiece: Workpiece,
        data: Any,
        judge: Judge,
        effort: Effort,
        training: Training,
        loss: Loss | None,
        methods: tuple[str, ...],
        seed: int,
        threads: int | None,
        progress: bool | None,
    ) -> None:
        self.workpiece, self.data, self.judge, self.effort = workpiece, data, judge, effort
        self.training, self.loss, self.methods = training, loss, methods
        self.seed, self.threads, self.progress = seed, threads, progress
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []

    def run(self, limits: Any, max_drop: float, storage: str | os.PathLike[str] | None) -> AutoResult:
        """Do everything."""
        costs = [limit.cost for limit in limits]
        with narrated("auto", shown=self.progress) as tell:
            tell("measuring the original")
            with self._timed("original"):
                bench = Workbench(
                    self.workpiece.model,
                    self.workpiece.inputs,
                    self.workpiece.kwargs,
                    costs,
                    threads=self.threads,
                )
                original_score = self.judge(self.workpiece.model)
            runtimes = [name for name in map(runtime_of, costs) if name]
            backend = "openvino" if set(runtimes) == {"openvino"} else "onnxruntime"
            latencies = Latencies(self.workpiece, bench, backend, self.threads)
            fitter = Fitter(self.workpiece, bench, limits, backend, latencies)
            tell("greedy candidates")
            with self._timed("greedy"):
                choices, wishes = self._begin(fitter)
        subject = JointSubject(
            fitter, choices, self._trial(backend), self._identity(limits), latencies.widths
        )
        with self._timed("trials"):
            study = run_study(
                subject,
                trials=self.effort.trials,
                name="auto",
                storage=storage,
                pruner="median" if self.effort.trials > 10 and self.effort.trial_share else None,
                seed=self.seed,
                enqueue=[subject.parameters_of(wish) for wish in wishes],
                progress=self.progress,
            )
        with self._timed("training"):
            candidate, model, score = self._final(study, backend)
        with self._timed("measuring"):
            small = built(self.workpiece, candidate, verify=True)
            integers = candidate.numbers == "int8"
            measured = bench.measure(model, small, integers=integers, float_layers=candidate.float_layers)
            scores = {name: self.judge(session) for name, session in bench.sessions().items()}
        return AutoResult(
            model,
            candidate,
            tuple(limits),
            fitter.allowed,
            {cost: bench.whole[cost] for cost in costs},
            {cost: measured[cost] for cost in costs},
            original_score,
            score,
            scores,
            max_drop,
            0.05,
            study,
            self.seconds,
            self.notes,
            (self.workpiece.inputs, self.workpiece.kwargs),
        )

    # the beginning

    def _begin(self, fitter: Fitter) -> tuple[Choices, list[Wish]]:
        """Return what trials choose between, and the wishes to begin with, the most promising first."""
        blocks = self._block_sets() if "blocks" in self.methods else ((),)
        numbers = ("int8",) if "int8" in self.methods else ("float32",)
        importances = ("outputs", "taylor") if self.loss is not None else ("outputs",)
        layers = self._float_sets(fitter, blocks[-1]) if numbers == ("int8",) else ((),)
        choices = Choices(blocks, importances, layers, numbers, self._ranks())
        wishes = []
        for gone, kept, importance in itertools.product(reversed(blocks), layers, importances):
            wishes.append(
                Wish(
                    Candidate((*gone,), importance=importance, numbers=numbers[0], float_layers=kept),
                    "greedy",
                    {},
                )
            )
        wishes.append(Wish(Candidate(importance=importances[0], numbers=numbers[0]), "uniform", {}))
        if "widths" not in self.methods:
            self.notes.append("widths stay: only blocks, ranks and numbers change")
        return choices, self._reachable(fitter, wishes)

    def _reachable(self, fitter: Fitter, wishes: Sequence[Wish]) -> list[Wish]:
        """Return the wishes that fit the budget, interleaved so that each set of blocks has its turn early."""
        subject = JointSubject(fitter, Choices(), lambda candidate, report: 0.0, {})
        able: list[tuple[Wish, Fitted]] = []
        nearest: Fitted | None = None
        for wish in wishes:
            found = fitter.fit(wish.base, wish.how(subject._widths))
            if found is not None and found.fits:
                able.append((wish, found))
            if found is not None and (nearest is None or found.over < nearest.over):
                nearest = found
            if len(able) >= self.effort.trials:
                break
        if not able:
            near = "" if nearest is None else f"; the nearest costs {nearest.over:.2f} times what is allowed"
            raise DwindleError(f"the budget is out of reach of every candidate{near}")
        return [wish for wish, _ in able]

    def _block_sets(self) -> tuple[tuple[str, ...], ...]:
        """Return no block, then more and more of them, the least harmful first."""
        variant = self.workpiece.variant()
        if not variant.can_shrink:
            return ((),)
        able = [block.path for block in variant.problem.analysis.blocks if block.reason is None]
        if not able:
            return ((),)
        harms = {path: self._harm_of((path,)) for path in able}
        order = sorted(
            (path for path in able if harms[path] is not None), key=lambda path: harms[path] or 0.0
        )
        sets: list[tuple[str, ...]] = [()]
        for number in range(1, len(order) + 1):
            sets.append(tuple(order[:number]))
        step = max(1, len(sets) // 6)
        return tuple(sets[::step]) if len(sets) > 7 else tuple(sets)

    def _harm_of(self, blocks: Sequence[str]) -> float | None:
        """Return how far the outputs move without some blocks, as a share of their energy; None where they stay."""
        try:
            model = self.workpiece.variant(blocks).model
        except DwindleError:
            return None
        energy = change = 0.0
        for batch in self.workpiece.batches[:2]:
            args, kwargs = forward_inputs(self.workpiece.model, batch)
            with torch.no_grad(), in_mode(model, training=False):
                wanted = _floats(self.workpiece.model(*args, **kwargs))
                found = _floats(model(*args, **kwargs))
            energy += sum(float(own.double().square().sum()) for own in wanted)
            change += sum(
                float((a.double() - b.double()).square().sum()) for a, b in zip(found, wanted, strict=True)
            )
        return change / max(energy, 1e-30)

    def _float_sets(self, fitter: Fitter, blocks: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
        """Return no layer, and first layers that the runtimes run as fast in float as in int8.

        A first layer of few channels gains little or nothing from int8 in most runtimes; whether it does is measured on
        the greedy candidate of the most blocks.
        """
        plain = fitter.fit(Candidate(blocks), Wish(Candidate(blocks), "greedy", {}).how(lambda variant: None))
        first = _first_layer(self.workpiece)
        if plain is None or first is None:
            return ((),)
        try:
            other = fitter.measure(plain.candidate.but(float_layers=(first,)))
        except DwindleError:
            return ((),)
        return ((first,), ()) if other.over < plain.over else ((),)

    def _ranks(self) -> dict[str, int] | None:
        """Return the layers that may become chains: linear layers and convolutions that a chain of half its rank helps."""
        if "ranks" not in self.methods or self.effort.trials < 20:
            return None
        found = {}
        for path, module in self.workpiece.model.named_modules():
            weight = getattr(module, "weight", None)
            if (
                isinstance(module, nn.Linear | nn.Conv2d)
                and weight is not None
                and getattr(module, "groups", 1) == 1
            ):
                rows, columns = weight.shape[0], weight[0].numel()
                if min(rows, columns) >= 64:
                    found[path] = min(rows, columns)
        return found or None

    # trials

    def _trial(self, backend: str) -> Callable[[Candidate, Report], float]:
        epochs = max(1, round(self.training.epochs * self.effort.trial_share))

        def assess(candidate: Candidate, report: Report) -> float:
            if not self.effort.trial_share:
                return self.judge(self._untrained(candidate, backend))
            _, score = self._trained(candidate, backend, epochs, report)
            return score

        return assess

    def _untrained(self, candidate: Candidate, backend: str) -> nn.Module:
        """Return the model of a candidate without training: repaired on unlabelled data, and rounded."""
        small = built(self.workpiece, candidate)
        inputs = [forward_inputs(self.workpiece.model, batch) for batch in self.workpiece.batches]
        plain = [kwargs or args for args, kwargs in inputs]
        if candidate.counts or candidate.blocks or candidate.ranks:
            try:
                repair(small, self.workpiece.model, plain, adapt=_as_it_is)
            except DwindleError as error:
                self._note(f"not repaired: {error}")
        adapt_normalization(small, plain, adapt=_as_it_is)
        if candidate.numbers == "int8":
            return integer_model(self.workpiece, candidate, small, backend)
        return small

    def _trained(
        self, candidate: Candidate, backend: str, epochs: int, report: Report | None = None
    ) -> tuple[nn.Module, float]:
        small = built(self.workpiece, candidate)
        latest = [0.0]

        def after_epoch(epoch: int, model: nn.Module) -> None:
            if report is not None or epoch == epochs:
                latest[0] = self.judge(model)
            if report is not None and epoch < epochs:
                report(epoch, latest[0])

        model = trained(
            self.workpiece,
            candidate,
            small,
            self.data,
            self.training,
            epochs=epochs,
            loss=self.loss,
            backend=backend,
            seed=self.seed,
            after_epoch=after_epoch,
            progress=self.progress,
        )
        return model, latest[0]

    # the end

    def _final(self, study: StudyResult, backend: str) -> tuple[Candidate, nn.Module, float]:
        """Train the best candidates to the end, and return the best of those."""
        fitting = sorted(
            (trial for trial in study.trials if trial.feasible), key=lambda own: -own.values["score"]
        )
        if not fitting:
            raise DwindleError(study._why_none())
        best: tuple[Candidate, nn.Module, float] | None = None
        seen = set()
        for trial in fitting:
            candidate = Candidate.from_json(trial.attributes["candidate"])
            if candidate.key in seen or len(seen) >= self.effort.finalists:
                continue
            seen.add(candidate.key)
            if self.effort.trial_share:
                model, score = self._trained(candidate, backend, self.training.epochs)
            else:
                model, score = self._untrained(candidate, backend), trial.values["score"]
            if best is None or score > best[2]:
                best = (candidate, model, score)
        assert best is not None
        return best

    def _identity(self, limits: Any) -> dict[str, Any]:
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
        self.seconds[part] = round(time.perf_counter() - begin, 2)


def _first_layer(workpiece: Workpiece) -> str | None:
    """Return the path of the first convolution or linear layer that runs."""
    for node in workpiece.variant().problem.analysis.trace.live_nodes():
        module = dict(workpiece.model.named_modules()).get(node.module)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            return str(node.module)
    return None


def _floats(outputs: Any) -> list[torch.Tensor]:
    from dwindle.realize.packing import floating_outputs

    return list(floating_outputs(outputs))


def _as_it_is(inputs: Any) -> Any:
    return inputs
