"""What a study is: its settings, kept in the storage, and its trials, which are all there from the beginning.

All trials are made at once, waiting and empty. So their number is fixed, however many workers there are and whatever
happens to them, and a worker needs nothing but the storage and the study's name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.search.studies.leases import FREE, KEY
from dwindle.search.studies.named import make_pruner, make_sampler
from dwindle.search.studies.storage import OpenStorage, quiet
from dwindle.search.studies.subject import Direction, Subject, SubjectMaker

__all__ = ["StudyPlan", "Thinking", "find_plan", "open_plan"]

_ATTRIBUTE = "dwindle"
_FORMAT = "dwindle-study-1"


@dataclass(frozen=True)
class Thinking:
    """How a study thinks; two runs of the same study must agree in it.

    Attributes:
        sampler: Name of the sampler.
        sampler_options: Its arguments.
        pruner: Name of the pruner.
        pruner_options: Its arguments.
        seed: Decides every proposal.
        generation: Trials that are proposed from the results of the generations before alone; None: every proposal
            sees all that is finished.
    """

    sampler: str = "tpe"
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    pruner: str = "none"
    pruner_options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    generation: int | None = None


@dataclass(frozen=True)
class StudyPlan:
    """A study in a storage.

    Attributes:
        storage: Where it is kept.
        study_id: Its key there.
        name: Its name.
        trials: How many trials it shall have.
        population: Trials of one generation of an evolution.
        objectives: By name.
        identity: The subject's.
        thinking: How it thinks.
        maker: How any process makes its subject; None when it only exists in the process that began it.
        attempts: A trial that so many workers did not survive is a failed one.
    """

    storage: OpenStorage
    study_id: int
    name: str
    trials: int
    population: int
    objectives: Mapping[str, Direction]
    identity: Mapping[str, Any]
    thinking: Thinking
    maker: SubjectMaker | None
    attempts: int

    def all_trials(self) -> list[FrozenTrial]:
        """Read the trials, in their order."""
        found = self.storage.optuna.get_all_trials(self.study_id, deepcopy=False)
        return sorted(found, key=lambda trial: trial.number)[: self.trials]

    def first_of_generation(self, number: int) -> int:
        """Return the first trial of the generation that trial ``number`` belongs to; None of generations: itself."""
        size = self.thinking.generation
        return number if size is None else number - number % size

    def seed_of(self, number: int) -> int:
        """Return the seed (32 bits) of the sampler of a trial."""
        text = f"{self.thinking.seed}/{number}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])

    def view(self, trials: Sequence[FrozenTrial], number: int) -> optuna.Study:
        """Make the study as the proposal of trial ``number`` may see it, in memory.

        Args:
            trials: All trials.
            number: Whose proposal is made.
        """
        thinking = self.thinking
        with quiet():
            study = optuna.create_study(
                directions=list(self.objectives.values()),
                sampler=make_sampler(
                    thinking.sampler, self.seed_of(number), self.population, thinking.sampler_options
                ),
                pruner=make_pruner(thinking.pruner, thinking.pruner_options),
            )
            first = self.first_of_generation(number)
            for trial in trials:
                seen = trial.number < first if thinking.generation is not None else trial.number != number
                if seen and trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
                    study.add_trial(trial)
        return study


def open_plan(
    storage: OpenStorage,
    name: str,
    subject: Subject,
    maker: SubjectMaker | None,
    thinking: Thinking,
    trials: int,
    enqueue: Sequence[Mapping[str, Any]] = (),
    attempts: int = 10,
) -> StudyPlan:
    """Make a study, or go on with the one that is there.

    Args:
        storage: Where.
        name: Its name.
        subject: What it searches.
        maker: How other processes make the subject.
        thinking: How it thinks.
        trials: How many trials it shall have; a study that has fewer is continued.
        enqueue: Parameters of the first trials.
        attempts: A trial that so many workers did not survive is a failed one.

    Raises:
        ConfigError: The storage holds a study of this name about something else; the message says what differs.
    """
    objectives = dict(subject.objectives)
    record = {
        "format": _FORMAT,
        "objectives": objectives,
        "identity": dict(subject.identity()),
        "thinking": asdict(thinking),
        "maker": None if maker is None else {"name": maker.name, "arguments": dict(maker.arguments)},
        "trials": trials,
        "population": max(4, min(50, thinking.generation or trials // 5)),
        "attempts": attempts,
    }
    try:
        record = json.loads(json.dumps(record, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the study {name!r}: its settings and identity must be JSON values: {error}"
        ) from error
    _check_thinking(thinking, len(objectives), record["population"])
    kept = _make_study(storage, name, objectives, record)
    study_id = storage.optuna.get_study_id_from_name(name)
    if kept is not None:
        _check_same(name, kept, record)
        record = {
            **kept,
            "trials": max(trials, kept["trials"]),
            "attempts": attempts,
            "maker": record["maker"],
        }
    storage.optuna.set_study_user_attr(study_id, _ATTRIBUTE, record)
    plan = _plan(storage, study_id, name, record)
    _make_trials(plan, enqueue)
    return plan


def find_plan(storage: OpenStorage, name: str) -> StudyPlan:
    """Find a study that another process made.

    Raises:
        ConfigError: There is none of this name (the message names the nearest), or dwindle did not make it.
    """
    names = [study.study_name for study in storage.optuna.get_all_studies()]
    if name not in names:
        known = f"it holds {', '.join(names)}" if names else "it holds none"
        raise ConfigError(f"the storage has no study {name!r}; {known}{did_you_mean(name, names)}")
    study_id = storage.optuna.get_study_id_from_name(name)
    record: Any = storage.optuna.get_study_user_attrs(study_id).get(_ATTRIBUTE)
    _check_format(name, record)
    return _plan(storage, study_id, name, record)


def _plan(storage: OpenStorage, study_id: int, name: str, record: Mapping[str, Any]) -> StudyPlan:
    return StudyPlan(
        storage,
        study_id,
        name,
        record["trials"],
        record["population"],
        record["objectives"],
        record["identity"],
        Thinking(**record["thinking"]),
        None if record["maker"] is None else SubjectMaker(**record["maker"]),
        record["attempts"],
    )


def _make_study(
    storage: OpenStorage, name: str, objectives: Mapping[str, Direction], record: Mapping[str, Any]
) -> Any:
    """Make the study with its settings; where it is there already, return the settings that it was made with."""
    directions = [StudyDirection[direction.upper()] for direction in objectives.values()]
    try:
        with quiet():
            study_id = storage.optuna.create_new_study(directions, name)
            storage.optuna.set_study_user_attr(study_id, _ATTRIBUTE, record)
            study = optuna.load_study(study_name=name, storage=storage.optuna)
            study.set_metric_names(list(objectives))
        return None
    except optuna.exceptions.DuplicatedStudyError:
        study_id = storage.optuna.get_study_id_from_name(name)
    kept = storage.optuna.get_study_user_attrs(study_id).get(_ATTRIBUTE)
    if kept is None and not storage.optuna.get_all_trials(study_id, deepcopy=False):
        return None  # its maker was killed between two steps
    _check_format(name, kept)
    return kept


def _check_format(name: str, record: Any) -> None:
    if not isinstance(record, Mapping) or record.get("format") != _FORMAT:
        raise ConfigError(f"the study {name!r} in the storage was not made by dwindle; give another name")


def _check_thinking(thinking: Thinking, objectives: int, population: int) -> None:
    """Refuse settings that no trial could be proposed with."""
    with quiet():
        make_sampler(thinking.sampler, 0, population, thinking.sampler_options)
        make_pruner(thinking.pruner, thinking.pruner_options)
    if objectives > 1 and thinking.pruner != "none":
        raise ConfigError("a pruner compares one objective; with several leave it out")
    if thinking.generation is not None and thinking.generation < 1:
        raise ConfigError(f"generation must be at least 1, not {thinking.generation}")


def _check_same(name: str, kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise where a stored study is about something else, or thinks otherwise."""
    parts = {key: (kept[key], wanted[key]) for key in ("objectives", "identity", "thinking")}
    different = [
        key
        for before, now in parts.values()
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if different:
        raise ConfigError(
            f"the storage holds another study {name!r}: {', '.join(different)} differ; "
            "give another name or another storage, or remove this one"
        )


def _make_trials(plan: StudyPlan, enqueue: Sequence[Mapping[str, Any]]) -> None:
    """Make the trials that are missing, waiting and empty; the first ones with the given parameters."""
    there = len(plan.storage.optuna.get_all_trials(plan.study_id, deepcopy=False))
    for number in range(there, plan.trials):
        given = {"fixed_params": dict(enqueue[number])} if number < len(enqueue) else {}
        empty = optuna.trial.create_trial(state=TrialState.WAITING, system_attrs={KEY: FREE, **given})
        plan.storage.optuna.create_new_trial(plan.study_id, empty)
