"""Runs a study from its beginning, or from where it was killed, to its end."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from dwindle.config.errors import ConfigError, DwindleError, did_you_mean, require
from dwindle.search.studies.result import StudyResult
from dwindle.search.studies.subject import Subject, SubjectMaker

if TYPE_CHECKING:
    from dwindle.search.studies.plan import StudyPlan

__all__ = ["load_study", "run_study", "work_on_study"]

_LAUNCHERS = ("processes", "ray")
_FAILURES = 10


def run_study(
    subject: Subject | SubjectMaker,
    *,
    trials: int,
    name: str = "study",
    storage: str | os.PathLike[str] | None = None,
    sampler: str = "tpe",
    sampler_options: Mapping[str, Any] | None = None,
    pruner: str | None = None,
    pruner_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    generation: int | None = None,
    enqueue: Sequence[Mapping[str, Any]] = (),
    workers: int = 1,
    launcher: Literal["processes", "ray"] = "processes",
    heartbeat: float = 10.0,
    patience: float | None = None,
    attempts: int = 10,
    progress: bool | None = None,
) -> StudyResult:
    """Search with Optuna until ``trials`` trials are finished; the same call again goes on where a killed one stood.

    With one worker, or with ``generation``, the result depends on nothing but the arguments: the proposal of trial
    ``k`` is drawn by a sampler that is seeded by ``(seed, k)`` and sees finished trials of a fixed set.

    Args:
        subject: What suggests and assesses candidates. For several workers, a :class:`SubjectMaker` that names how
            each process makes its own.
        trials: How many trials shall be finished in the end, those of earlier runs among them.
        name: Of the study in the storage.
        storage: The path of an SQLite file; ``journal:PATH`` for a journal file, which machines may share over a
            network file system; a database URL (``postgresql://...``); None keeps nothing.
        sampler: ``tpe``, ``nsga2``, ``random``, or ``package.module:callable`` that returns an Optuna sampler for
            ``seed`` and the options.
        sampler_options: Further arguments of the sampler.
        pruner: ``median``, ``successive_halving`` or ``package.module:callable``: stops hopeless trials by what they
            report; of one objective only. None lets all go to their end.
        pruner_options: Its arguments.
        seed: Decides every proposal.
        generation: Trials whose proposals are drawn from the results of earlier generations alone, so that a search
            gives the same for any number of workers. None: each proposal sees all that is finished by then.
        enqueue: Parameters of the first trials (warm starts); what they leave out is drawn.
        workers: Processes on this machine. Others may join: ``dwindle worker``.
        launcher: Who starts workers: ``processes`` of this machine, or ``ray`` (tasks, wherever its cluster has room).
        heartbeat: Seconds between two signs of life of a worker.
        patience: A worker of another machine without a sign of life for so many seconds is taken for dead, and its
            trial is done again with the same parameters; default 6 heartbeats. On the same machine it is noticed at
            once.
        attempts: A trial that so many workers did not survive is a failed one.
        progress: Show a bar with the best so far; None means only when the error output is a terminal.

    Raises:
        ConfigError: An argument is not valid, or the storage holds another study of this name.
        MissingDependencyError: Optuna is not installed.
        DwindleError: No trial was completed (a study stops after ten that all failed), or no worker gets to work;
            the message has the first error.
    """
    require("optuna", "search")
    from dwindle.search.studies.plan import Thinking, open_plan
    from dwindle.search.studies.processes import run_processes
    from dwindle.search.studies.ray_workers import run_with_ray
    from dwindle.search.studies.showing import shown
    from dwindle.search.studies.storage import open_storage
    from dwindle.search.studies.work import Worker

    _check_numbers(trials=trials, workers=workers, attempts=attempts)
    maker = subject if isinstance(subject, SubjectMaker) else None
    if launcher not in _LAUNCHERS:
        hint = did_you_mean(launcher, _LAUNCHERS)
        raise ConfigError(f"launcher {launcher!r} is not one of {', '.join(_LAUNCHERS)}{hint}")
    elsewhere = workers > 1 or launcher == "ray"
    if elsewhere and maker is None:
        raise ConfigError(
            "workers: other processes must make the subject by themselves; give a SubjectMaker("
            "'package.module:callable', {...}) in place of the subject"
        )
    if elsewhere and storage is None:
        raise ConfigError("workers: several processes need a storage that they share; give a file")
    made = subject.make() if isinstance(subject, SubjectMaker) else subject
    thinking = Thinking(
        sampler, dict(sampler_options or {}), pruner or "none", dict(pruner_options or {}), seed, generation
    )
    opened = open_storage(storage)
    plan = open_plan(opened, name, made, maker, thinking, trials, enqueue, attempts)
    waits = {"heartbeat": heartbeat, "patience": 6 * heartbeat if patience is None else patience}
    if launcher == "ray":
        steps = run_with_ray(plan, workers, **waits)
    elif workers > 1:
        steps = run_processes(plan, workers, **waits)
    else:
        steps = Worker(plan, made, **waits, poll=0.2).work()
    for _ in shown(plan, steps, progress):
        _check_failures(plan)
    result = StudyResult.of(plan)
    if result.trials and not any(trial.state == "complete" for trial in result.trials):
        raise DwindleError(f"the study {name!r}: {result._why_none()}")
    return result


def work_on_study(
    storage: str | os.PathLike[str],
    name: str,
    *,
    subject: Subject | None = None,
    changed: Mapping[str, Any] | None = None,
    limit: int | None = None,
    heartbeat: float = 10.0,
    patience: float | None = None,
    progress: bool | None = None,
) -> int:
    """Work on a study that another process began, until all its trials are finished.

    The subject is made by the callable that is named in the storage: only join a storage whose writers you trust.

    Args:
        storage: As of :func:`run_study`.
        name: The study.
        subject: What it searches, where it shall not be made by that callable.
        changed: Arguments of that callable that differ here, such as a directory.
        limit: Leave after so many trials.
        heartbeat: Seconds between two signs of life.
        patience: As of :func:`run_study`.
        progress: Show a bar; None means only when the error output is a terminal.

    Returns:
        How many trials this process finished.

    Raises:
        ConfigError: There is no such study, or its subject cannot be made here.
    """
    require("optuna", "search")
    from dwindle.search.studies.plan import find_plan
    from dwindle.search.studies.showing import shown
    from dwindle.search.studies.storage import open_storage
    from dwindle.search.studies.work import Worker

    plan = find_plan(open_storage(storage, existing=True), name)
    if plan.maker is not None and changed:
        maker = SubjectMaker(plan.maker.name, {**plan.maker.arguments, **changed})
        subject = subject or maker.make()
    patience = 6 * heartbeat if patience is None else patience
    worker = Worker(plan, subject, heartbeat=heartbeat, patience=patience)
    return sum(1 for _ in shown(plan, worker.work(limit), progress))


def load_study(storage: str | os.PathLike[str], name: str) -> StudyResult:
    """Read what a study has found so far.

    Raises:
        ConfigError: There is no such study.
    """
    require("optuna", "search")
    from dwindle.search.studies.plan import find_plan
    from dwindle.search.studies.storage import open_storage

    return StudyResult.of(find_plan(open_storage(storage, existing=True), name))


def _check_failures(plan: StudyPlan) -> None:
    """Do not go on for hours when nothing works at all."""
    finished = [trial for trial in plan.all_trials() if trial.state.is_finished()]
    if len(finished) == _FAILURES and all(trial.state.name == "FAIL" for trial in finished):
        raise DwindleError(
            f"the study {plan.name!r} was stopped: its first {_FAILURES} trials all failed; "
            f"the first with: {finished[0].user_attrs.get('error')}"
        )


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
