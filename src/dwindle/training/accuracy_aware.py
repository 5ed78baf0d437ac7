"""Accuracy-aware training: the largest compression rate at which a model stays as good as it has to be."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dwindle.config.errors import ConfigError, FileFormatError
from dwindle.graph.modes import modes_kept
from dwindle.training.accuracy_records import AccuracyAware, AccuracyOptions, RateTrial
from dwindle.training.accuracy_subjects import BestState, InPlace, MadeAnew, Subject
from dwindle.training.checkpoint import load_state, random_state, restore_random_state, save_state
from dwindle.training.processes import is_distributed, rank, sum_over_processes
from dwindle.training.progress import narrated
from dwindle.training.rate_search import RateSearch

__all__ = ["accuracy_aware"]

Evaluate = Callable[[nn.Module], float]


def accuracy_aware(
    compressor: Any | Callable[[float], nn.Module],
    *,
    train_epoch: Callable[[nn.Module], Any],
    evaluate: Evaluate,
    options: AccuracyOptions,
    baseline: float | None = None,
    calibrate: Callable[[nn.Module], Any] | None = None,
    keep: Sequence[Any] = (),
    path: str | os.PathLike[str] | None = None,
) -> AccuracyAware:
    """Search the largest compression rate that keeps a metric within its bound, training as it goes.

    Each rate is trained until the metric is within the bound, for ``options.epochs`` at most. As long as it is, the
    rate rises; where it is not, everything goes back to the best state so far, unless ``options.go_back`` is False, and
    the steps halve (:class:`dwindle.training.RateSearch`). The model ends in the best state. When something fails,
    or is interrupted by hand, it ends there too, and the exception goes on.

    Args:
        compressor: A pruner (or anything else with ``model``, ``update(rate)``, ``state_dict()`` and
            ``load_state_dict()``), for which a rate of 1 is the goal of its ``config_list``; or a function that
            returns a compressed model of its own for a rate.
        train_epoch: ``train_epoch(model)`` trains one epoch.
        evaluate: ``evaluate(model)`` returns the metric. Called in evaluation mode, without gradients. In a
            distributed run the mean over all processes counts.
        options: What is allowed, and how to search.
        baseline: The metric of the uncompressed model; None evaluates it.
        calibrate: Called with the model whenever its rate was changed, before it is evaluated for the first time:
            ``lambda model: adapt_normalization(model, batches)``.
        keep: What goes back with the model: optimizers, learning rate schedules, loaders.
        path: A file that keeps the whole search, after each epoch where the model is compressed in place and after
            each trial otherwise. When it exists the search goes on from it, and ends as it would have without the
            interruption; the best state then lies on the disk instead of in memory.

    Raises:
        ConfigError: An argument is not valid.
        FileFormatError: The file is damaged, or belongs to another search.
    """
    subject: Subject = _subject(compressor, keep)
    search = _Search(subject, train_epoch, evaluate, options, calibrate, Path(path) if path else None)
    try:
        search.begin(baseline)
    except BaseException:
        subject.abandon()
        raise
    try:
        with narrated("accuracy-aware training", shown=options.progress) as say:
            while search.goes_on:
                say(search.advance())
    except BaseException:
        if search.rate is not None:
            subject.load(search.best.get())
        raise
    return search.result()


def _subject(compressor: Any, keep: Sequence[Any]) -> Subject:
    if not hasattr(compressor, "update") and callable(compressor):
        if keep:
            raise ConfigError(
                "keep goes with a model that is compressed in place; here each rate has its own"
            )
        return MadeAnew(compressor)
    return InPlace(compressor, keep)


class _Search:
    """A search, one evaluation after the other."""

    def __init__(
        self,
        subject: Subject,
        train_epoch: Callable[[nn.Module], Any],
        evaluate: Evaluate,
        options: AccuracyOptions,
        calibrate: Callable[[nn.Module], Any] | None,
        path: Path | None,
    ) -> None:
        self.subject, self.options, self.path = subject, options, path
        self.train_epoch, self.evaluate, self.calibrate = train_epoch, evaluate, calibrate
        self.rates = RateSearch(
            options.step, options.minimum_step, first=options.first_rate, largest=options.largest_rate
        )
        self.trials: list[RateTrial] = []
        self.best = BestState(path)
        self.baseline = math.nan
        self.rate: float | None = None  # of the trial that goes on
        self.epochs, self.metric, self.begun = 0, math.nan, 0.0

    # What the caller does.

    def begin(self, baseline: float | None) -> None:
        """Measure the uncompressed model and hold its state, or go on from the file."""
        if self.path is not None and self.path.exists():
            self._resume(self.path)
            return
        model = self.subject.uncompressed()
        self.baseline = self._evaluated(model) if baseline is None else float(baseline)
        if not math.isfinite(self.baseline):
            raise ConfigError(f"the metric of the uncompressed model is {self.baseline}")
        self.best.keep(self.subject.state(), 0)
        self._save()

    @property
    def goes_on(self) -> bool:
        """Whether there is anything left to do."""
        return self.rate is not None or (self._left > 0 and self.rates.next() is not None)

    def advance(self) -> str:
        """Begin a trial, or train another epoch of it, and judge; return what was found, in words."""
        if self.rate is None:
            self._begin_trial()
        else:
            self.train_epoch(self._model)
            self.epochs += 1
        assert self.rate is not None
        self.metric = self._evaluated(self._model)
        text = f"rate {self.rate:.4g}, epoch {self.epochs}: {self.metric:.5g} of {self.bound:.5g}"
        satisfied = self.options.satisfies(self.metric, self.bound)
        if satisfied or self.epochs >= self.options.epochs or self._left <= 0:
            self._end_trial(satisfied)
        self._save()
        return text

    def result(self) -> AccuracyAware:
        """Return what was found."""
        good = [own for own in self.trials if own.satisfied]
        ended = self.rates.ended or "all epochs are used"
        rate, metric = (good[-1].rate, good[-1].metric) if good else (0.0, self.baseline)
        return AccuracyAware(
            self.subject.model,
            rate,
            metric,
            bool(good),
            self.baseline,
            self.bound,
            tuple(self.trials),
            ended,
        )

    # Inside.

    @property
    def bound(self) -> float:
        return self.options.bound(self.baseline)

    @property
    def _model(self) -> nn.Module:
        model = self.subject.model
        assert model is not None
        return model

    @property
    def _left(self) -> float:
        """Epochs that may still be trained."""
        most = self.options.maximum_epochs
        return math.inf if most is None else most - sum(own.epochs for own in self.trials) - self.epochs

    def _begin_trial(self) -> None:
        self.rate, self.epochs, self.begun = self.rates.next(), 0, time.perf_counter()
        assert self.rate is not None
        self.subject.set(self.rate)
        if self.calibrate is not None:
            self.calibrate(self._model)

    def _end_trial(self, satisfied: bool) -> None:
        assert self.rate is not None
        seconds = time.perf_counter() - self.begun
        self.trials.append(RateTrial(self.rate, self.metric, self.epochs, satisfied, seconds))
        self.rates.tell(self.rate, satisfied)
        self.rate, self.epochs = None, 0
        if satisfied:
            self.best.keep(self.subject.state(), len(self.trials))
        elif self.options.go_back or not self.goes_on:
            self.subject.load(self.best.get())

    def _evaluated(self, model: nn.Module) -> float:
        with modes_kept(model), torch.no_grad():
            model.eval()
            metric = torch.tensor(float(self.evaluate(model)), dtype=torch.float64)
        if is_distributed():
            metric = metric.to(next(model.parameters()).device)
            sum_over_processes([metric])
            metric /= torch.distributed.get_world_size()
        return float(metric)

    def _save(self) -> None:
        if self.path is None or (self.rate is not None and not self.subject.within_trials):
            return
        if rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            state = {
                "options": self._settings(),
                "baseline": self.baseline,
                "trials": [asdict(own) for own in self.trials],
                "rates": self.rates.state_dict(),
                "running": {"rate": self.rate, "epochs": self.epochs},
                "best": self.best.number,
                "subject": self.subject.state(),
                "random": random_state(),
            }
            save_state(state, self.path)
        self.best.drop_others()

    def _settings(self) -> dict[str, Any]:
        changeable = ("progress", "maximum_epochs", "epochs")
        return {key: value for key, value in asdict(self.options).items() if key not in changeable}

    def _resume(self, path: Path) -> None:
        state = load_state(path)
        try:
            if state["options"] != self._settings():
                raise FileFormatError(
                    f"{path} is of a search with other options ({state['options']}); remove it to begin anew"
                )
            self.baseline = float(state["baseline"])
            self.trials = [RateTrial(**own) for own in state["trials"]]
            self.rates.load_state_dict(state["rates"])
            self.rate, self.epochs = state["running"]["rate"], int(state["running"]["epochs"])
            self.best.number = int(state["best"])
            self.begun = time.perf_counter()
            self.subject.uncompressed()
            self.subject.load(state["subject"])
            restore_random_state(state["random"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, FileFormatError):
                raise
            raise FileFormatError(f"{path} does not belong to this search: {error}") from error
