"""``dw.sensitivity``: what becomes of a model when each of its parts alone is compressed."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.graph.stand_ins import copied
from dwindle.pruning.axis_importance import AxisImportance, Loss
from dwindle.pruning.named_importances import Criterion, importance_of
from dwindle.quantization.observers import Observer
from dwindle.quantization.simulation import is_quantized
from dwindle.search.journal import Journal, checksum
from dwindle.search.problem import Problem
from dwindle.search.sensitivities.factorized import FactorizedLayers
from dwindle.search.sensitivities.points import (
    KINDS,
    Level,
    SensitivityPoint,
    SensitivityTarget,
    key_of_point,
)
from dwindle.search.sensitivities.pruned import PrunedAxes
from dwindle.search.sensitivities.result import SensitivityResult
from dwindle.search.sensitivities.rounded import RoundedLayers
from dwindle.search.sensitivities.scoring import Metric, MetricScore, Score, SignalToNoise
from dwindle.search.sensitivities.settings import Settings
from dwindle.search.sensitivities.subject import Selection, Subject, selection_of
from dwindle.training.checkpoint import random_state, restore_random_state
from dwindle.training.inputs import Inputs, batches_of, forward_inputs
from dwindle.training.loop import seed_everything
from dwindle.training.progress import tracked

__all__ = ["sensitivity"]

FORMAT = "dwindle-sensitivity-1"


def sensitivity(
    model: nn.Module,
    data: Any,
    metric: Metric | None = None,
    *,
    greater_is_better: bool = True,
    kinds: Sequence[str] = KINDS,
    ratios: Sequence[float] = Settings.ratios,
    bits: Sequence[int] = Settings.bits,
    rank_ratios: Sequence[float] = Settings.rank_ratios,
    ranks: Sequence[int] = (),
    config_list: Sequence[Mapping[str, Any]] | None = None,
    stop_drop: float | None = None,
    storage: str | os.PathLike[str] | None = None,
    example_inputs: Any = None,
    importance: str | Criterion | AxisImportance = "l1",
    loss: Loss = nn.functional.cross_entropy,
    axes: Sequence[str] | None = None,
    input_bits: int | str | None = "same",
    weight_range: str = "minmax",
    observer: str | Callable[[], Observer] = "histogram",
    backend: str = "layers",
    method: str = "auto",
    data_aware: bool = False,
    adapt: Callable[[Any], Any] | None = None,
    max_batches: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> SensitivityResult:
    """Compress every part of a model alone, level by level, and score the model each time.

    The model is only read: all work is done on copies, whatever happens. Pruning cuts every coupled axis as
    :func:`dwindle.prune` does; quantization rounds one layer's weight and what it reads, as :func:`dwindle.quantize`
    rounds them; factorization gives one layer the chain of :func:`dwindle.factorize`.

    Args:
        model: A trained float model.
        data: A tensor or a tuple (one batch), or an iterable of batches, as :func:`dwindle.quantize` takes them, which
            are kept in memory. They tell the ranges of inputs and, without a metric, the outputs that are compared.
        metric: From a model to a number, such as its accuracy; called in evaluation mode, without gradients. None is
            the signal to noise of the outputs in dB against the unchanged model, which needs no labels.
        greater_is_better: False for metrics that are losses.
        kinds: Some of ``"pruning"``, ``"quantization"``, ``"factorization"``.
        ratios: Shares of each axis that go.
        bits: Numbers of bits, 2 to 8.
        rank_ratios: Shares of the full rank that stay.
        ranks: Ranks besides.
        config_list: Entries that only select (``op_types``, ``op_names``, ``op_names_re``, ``exclude_...``): layers,
            and the axes that they make. None takes all.
        stop_drop: A target is not compressed further once its drop is larger: of the metric, or without one the noise
            as a share of the outputs' energy (0.01 is 20 dB).
        storage: A folder in which every finished point is on the disk at once. The same call again goes on there;
            other levels, kinds or targets of the same model and data share it. A metric cannot be told from another:
            use another folder for another one.
        example_inputs: Arguments to record the model with: a tensor, a tuple, or a mapping; the first batch when not
            given.
        importance: Which indices of an axis go first, as in :func:`dwindle.prune`; those that run the model use
            ``data``.
        loss: ``loss(outputs, target)`` for importances that need labels.
        axes: Kinds of axes; None is all that shrink by default.
        input_bits: Bits of what a rounded layer reads: ``"same"`` as its weight, a number, or None: it stays float.
        weight_range: ``"minmax"``, or ``"mse"``: weights are clipped where that loses least.
        observer: How ranges of inputs are found, as in :func:`dwindle.quantize`.
        backend: Whose places: ``"layers"``, ``"onnxruntime"`` or ``"openvino"``.
        method: How layers are factorized, as in :func:`dwindle.factorize`.
        data_aware: Chains keep what matters on the data, as with ``data`` of :func:`dwindle.factorize`.
        adapt: Function from a batch to inputs, for batches of another form.
        max_batches: Take so many batches.
        seed: Random generators begin every score with it and are put back, so that order does not matter.
        progress: Show a progress bar; None means only when the error output is a terminal.

    Raises:
        ConfigError: An argument does not fit, the unchanged model has no finite score, or the storage holds
            measurements of something else.
        CaptureError: The model fails on the data.
    """
    settings = Settings(
        tuple(kinds), tuple(ratios), tuple(bits), tuple(rank_ratios), tuple(ranks), stop_drop, importance, loss, axes,
        input_bits, weight_range, observer, backend, method, data_aware, seed,
    )  # fmt: skip
    if is_quantized(model):
        raise ConfigError("this model is quantized already; analyse the original instead")
    selection = selection_of(model, config_list)
    own = copied(model).eval()
    batches = _kept(data, max_batches)
    inputs = [forward_inputs(own, batch, adapt) for batch in batches]
    whole: Callable[[Any], Any] = lambda batch: batch  # noqa: E731  # what is given by name is taken as it is
    example = inputs[0] if example_inputs is None else forward_inputs(own, example_inputs, whole)
    score: Score = SignalToNoise(own, inputs) if metric is None else MetricScore(metric, greater_is_better)
    run = _Run(own, settings, selection, batches, inputs, example, score, storage)
    points = list(tracked(run.points(), "sensitivity", total=run.total, shown=progress))
    return SensitivityResult(run.subjects, points, score.name, score.baseline, run.notes)


def _kept(data: Any, limit: int | None) -> list[Any]:
    """Return the batches; one tensor, mapping or tuple is one.

    Raises:
        ConfigError: There are none.
    """
    source = [data] if isinstance(data, tuple) else batches_of(data)
    found = list(itertools.islice(source, limit))
    if not found:
        raise ConfigError("data gave no batch")
    return found


class _Run:
    """One analysis.

    Attributes:
        subjects: The kinds that have targets.
        total: How many points there are without early stop.
        notes: What the user should know.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        selection: Selection,
        batches: Sequence[Any],
        inputs: Sequence[Inputs],
        example: Inputs,
        score: Score,
        storage: str | os.PathLike[str] | None,
    ) -> None:
        self.model, self.settings, self.score = model, settings, score
        self.batches, self.inputs, self.example, self.selection = batches, inputs, example, selection
        self.data = checksum({f"{place:09d}": own for place, own in enumerate(_tensors(inputs))})
        identity = {"model": checksum(model.state_dict()), "score": score.name, "seed": settings.seed}
        if isinstance(score, SignalToNoise):
            identity["data"] = self.data
        path = None if storage is None else Path(storage) / "sensitivity.jsonl"
        self.journal = Journal(path, FORMAT, identity, "measurement")
        self.known = {entry["key"]: entry["point"] for entry in self.journal.earlier if "key" in entry}
        self._measure_baseline()
        self.notes: list[str] = []
        self.subjects = list(self._subjects())
        self.total = sum(len(own.levels(target.name)) for own in self.subjects for target in own.targets)

    def _measure_baseline(self) -> None:
        if not isinstance(self.score, MetricScore):
            return
        kept = next((own["baseline"] for own in self.journal.earlier if "baseline" in own), None)
        if kept is None:
            with self._seeded():
                kept = self.score(self.model)
            if not math.isfinite(kept):
                raise ConfigError(f"metric: the unchanged model's score is {kept}")
            self.journal.append({"baseline": kept})
        self.score.baseline = kept

    def _subjects(self) -> Iterator[Subject]:
        """Yield the kinds that have targets.

        Raises:
            ConfigError: None has.
        """
        failures: list[ConfigError] = []
        for kind in KINDS:
            if kind not in self.settings.kinds:
                continue
            try:
                subject = self._subject(kind)
            except ConfigError as error:
                failures.append(error)
                self.notes.append(f"{kind}: {error}")
                continue
            self.notes += subject.notes
            if subject.targets:
                yield subject
            else:
                failures.append(
                    ConfigError(f"{kind}: the config_list selects nothing that can be compressed alone")
                )
                self.notes.append(str(failures[-1]))
        if len(failures) == len(set(self.settings.kinds)):
            raise failures[0]

    def _subject(self, kind: str) -> Subject:
        chosen, options = self.settings, self.settings.options(kind, self.data)
        args, kwargs = self.example
        if kind == "pruning":
            problem = Problem(
                self.model,
                args,
                self.score,
                {"macs": 1.0},
                importance=chosen.importance,
                data=self.batches if importance_of(chosen.importance).needs_data else None,
                loss=chosen.loss,
                example_kwargs=kwargs,
                axes=chosen.axes,
                largest_ratio=max(0.9, *chosen.ratios),
            )
            return PrunedAxes(problem, chosen.ratios, self.selection, options)
        if kind == "quantization":
            return RoundedLayers(
                self.model,
                self.inputs,
                example=self.example,
                bits=chosen.bits,
                input_bits=chosen.input_bits,
                weight_range=chosen.weight_range,
                observer=chosen.observer,
                backend=chosen.backend,
                selection=self.selection,
                options=options,
            )
        return FactorizedLayers(
            self.model,
            self.example,
            [kwargs or args for args, kwargs in self.inputs] if chosen.data_aware else None,
            rank_ratios=chosen.rank_ratios,
            ranks=chosen.ranks,
            method=chosen.method,
            selection=self.selection,
            options=options,
        )

    def points(self) -> Iterator[SensitivityPoint]:
        """Yield every point as it is measured, or as it was kept; a target's levels until the drop is too large."""
        bound = self.settings.stop_drop
        for subject in self.subjects:
            for target in subject.targets:
                for level in subject.levels(target.name):
                    point = self._point(subject, target, level)
                    yield point
                    if bound is not None and point.drop > bound:
                        break

    def _point(self, subject: Subject, target: SensitivityTarget, level: Level) -> SensitivityPoint:
        key = key_of_point(subject.kind, subject.options, target.name, level.detail)
        if key in self.known:
            return SensitivityPoint.from_json(self.known[key])
        started = time.perf_counter()
        score: float | None = None
        drop, error = math.inf, None
        try:
            with self._seeded(), subject.variant(target.name, level) as variant:
                score = self.score(variant)
        except DwindleError as failure:
            error = str(failure)
        if score is not None and (math.isnan(score) or (score != self.score.baseline and math.isinf(score))):
            error, score = f"the score is {score}", None
        if score is not None:
            drop = self.score.drop(score)
        seconds = time.perf_counter() - started
        point = SensitivityPoint(
            subject.kind, target.name, level.value, level.detail, score, drop, level.macs, seconds, error
        )
        self.journal.append({"key": key, "point": point.to_json()})
        return point

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        before = random_state()
        seed_everything(self.settings.seed)
        try:
            yield
        finally:
            restore_random_state(before)


def _tensors(inputs: Sequence[Inputs]) -> Iterator[Tensor]:
    for args, kwargs in inputs:
        for value in (*args, *(kwargs[name] for name in sorted(kwargs))):
            entries = value if isinstance(value, tuple | list) else [value]
            yield from (own for own in entries if isinstance(own, torch.Tensor))
