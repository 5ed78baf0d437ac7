"""What a worker does: take a trial, propose its parameters, assess it, write down what came out, take the next."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from dwindle.config.errors import ConfigError
from dwindle.search.studies.heart import Heart, LeaseLost, Watch
from dwindle.search.studies.leases import KEY, Lease
from dwindle.search.studies.owner import new_owner
from dwindle.search.studies.plan import StudyPlan, find_plan
from dwindle.search.studies.storage import quiet
from dwindle.search.studies.subject import Assessment, Hopeless, Subject

__all__ = ["Worker"]

_PROPOSAL = "dwindle:proposal"


class Worker:
    """Works on the trials of a study until all are finished.

    Args:
        plan: The study.
        subject: What it searches; made from the study's maker when left out.
        heartbeat: Seconds from one sign of life to the next.
        patience: A worker of another machine that gave no sign of life for so many seconds is taken for dead.
        poll: Seconds between two looks when there is nothing to do but wait.

    Raises:
        ConfigError: The subject only exists in the process that began the study, or is another than the study's.
    """

    def __init__(
        self,
        plan: StudyPlan,
        subject: Subject | None = None,
        *,
        heartbeat: float = 10.0,
        patience: float = 60.0,
        poll: float = 0.5,
    ) -> None:
        if subject is None:
            if plan.maker is None:
                raise ConfigError(
                    f"the study {plan.name!r} does not say how its subject is made; begin it with a SubjectMaker, so "
                    "that other processes can work on it"
                )
            subject = plan.maker.make()
        _check_subject(plan, subject)
        self.plan, self.subject = plan, subject
        self._heartbeat, self._poll = heartbeat, poll
        self._watch = Watch(patience)
        self._owner = new_owner()
        self._storage, self._leases = plan.storage.optuna, plan.storage.leases

    def work(self, limit: int | None = None) -> Iterator[int]:
        """Yield the number of each trial that this worker finished.

        Args:
            limit: Leave after so many.
        """
        done = 0
        while limit is None or done < limit:
            trials = self.plan.all_trials()
            if len(trials) == self.plan.trials and all(trial.state.is_finished() for trial in trials):
                # Somebody may have asked for more meanwhile.
                self.plan = replace(self.plan, trials=find_plan(self.plan.storage, self.plan.name).trials)
                if len(trials) == self.plan.trials:
                    return
                continue
            taken = self._take(trials)
            if taken is None:
                time.sleep(self._poll)
                continue
            if self._do(*taken):
                done += 1
                yield taken[0].number

    def _take(self, trials: list[FrozenTrial]) -> tuple[FrozenTrial, Lease] | None:
        """Take the first trial that nobody works on and whose turn it is; None when there is none."""
        unfinished = [trial for trial in trials if not trial.state.is_finished()]
        for trial in unfinished:
            if self.plan.thinking.generation is not None:
                first = self.plan.first_of_generation(trial.number)
                if unfinished[0].number < first:
                    return None
            text = self._leases.of(trial)
            if not self._watch.is_stale(trial, text):
                continue
            lease = Lease.read(text).taken(self._owner)
            try:
                if self._leases.swap(trial._trial_id, text, lease.text()):
                    return trial, lease
            except UpdateFinishedTrialError:
                continue
        return None

    def _do(self, trial: FrozenTrial, lease: Lease) -> bool:
        """Work on a trial that was taken; tell whether it was finished by this worker."""
        heart = Heart(self._leases, trial._trial_id, lease, self._heartbeat)
        try:
            current = self._storage.get_trial(trial._trial_id)
            if current.state.is_finished():
                heart.rest()
                return False
            if current.state == TrialState.WAITING:
                self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
            if lease.claims > self.plan.attempts:
                raise _GivenUp(f"given up: {lease.claims - 1} workers ended while they worked on it")
            self._finish(trial._trial_id, heart, *self._answer(trial._trial_id, heart))
        except _GivenUp as error:
            self._finish(trial._trial_id, heart, TrialState.FAIL, None, {"error": str(error)})
        except (LeaseLost, UpdateFinishedTrialError):
            heart.rest()
            return False
        except BaseException:
            heart.give_back()
            raise
        return True

    def _answer(self, trial_id: int, heart: Heart) -> tuple[TrialState, list[float] | None, dict[str, Any]]:
        """Propose and assess; return the state, the values and the attributes of the finished trial."""
        began = time.perf_counter()
        attributes: dict[str, Any] = {}
        values: list[float] | None = None
        try:
            view, candidate = self._propose(trial_id)
            attributes["candidate"] = candidate
            self._storage.set_trial_user_attr(trial_id, "candidate", candidate)
            number = self._storage.get_trial_number_from_id(trial_id)
            report = _Reporter(self.plan, trial_id, number, view, heart)
            assessment = self.subject.assess(json.loads(json.dumps(candidate)), report)
            values = _checked_values(self.plan.objectives, assessment)
            attributes |= _attributes(assessment)
            for name, excess in assessment.violations.items():
                view.set_constraint(name, float(excess))
            state = TrialState.COMPLETE
        except Hopeless:
            state = TrialState.PRUNED
            told = self._storage.get_trial(trial_id).intermediate_values
            values = [told[max(told)]] if told else None
        except UpdateFinishedTrialError:
            raise
        except Exception as error:
            state = TrialState.FAIL
            attributes["error"] = f"{type(error).__name__}: {error}"
            view = None
        if view is not None:
            self._keep_notes(trial_id, view)
        attributes["seconds"] = round(time.perf_counter() - began, 3)
        return state, values, attributes

    def _propose(self, trial_id: int) -> tuple[Trial, Any]:
        """Draw the parameters of a trial; what an earlier holder of it drew, stays."""
        while True:
            current = self._storage.get_trial(trial_id)
            notes = current.system_attrs
            given = {**notes.get("fixed_params", {}), **notes.get(_PROPOSAL, {})}
            if _PROPOSAL in notes:
                given |= current.params
            study = self.plan.view(self.plan.all_trials(), current.number)
            with quiet():
                if given:
                    study.enqueue_trial(given)
                view = study.ask()
                candidate = dict(self.subject.suggest(view))
            drawn = view.params
            # All at once, before the storage gets them one by one: a worker that is killed between two of them leaves
            # no parameters beside which others would be drawn.
            if _PROPOSAL not in notes:
                self._storage.set_trial_system_attr(trial_id, _PROPOSAL, drawn)
            for name, distribution in view.distributions.items():
                if name not in current.params:
                    internal = distribution.to_internal_repr(drawn[name])
                    self._storage.set_trial_param(trial_id, name, internal, distribution)
            self._keep_notes(trial_id, view)
            kept = self._storage.get_trial(trial_id).params
            # One who was taken for dead may have written first; then its parameters count.
            if all(kept[name] == value for name, value in drawn.items()):
                return view, json.loads(json.dumps(candidate, allow_nan=False))

    def _keep_notes(self, trial_id: int, view: Trial) -> None:
        """Keep what the sampler or the pruner noted on a trial (generations, rungs), and its constraints."""
        kept = self._storage.get_trial(trial_id).system_attrs
        notes = view.study.get_trials(deepcopy=False)[-1].system_attrs
        for key, value in notes.items():
            if key not in (KEY, _PROPOSAL, "fixed_params") and kept.get(key) != value:
                self._storage.set_trial_system_attr(trial_id, key, value)

    def _finish(
        self,
        trial_id: int,
        heart: Heart,
        state: TrialState,
        values: list[float] | None,
        attributes: Mapping[str, Any],
    ) -> None:
        """Write down what came out; the last step is one that only the first of several can do."""
        heart.stop()
        for key, value in attributes.items():
            self._storage.set_trial_user_attr(trial_id, key, value)
        self._storage.set_trial_state_values(trial_id, state, values)


class _GivenUp(Exception):
    """A trial that nobody survives."""


class _Reporter:
    """``report(step, value)`` of one trial."""

    def __init__(self, plan: StudyPlan, trial_id: int, number: int, view: Trial, heart: Heart) -> None:
        self._plan, self._trial_id, self._view, self._heart = plan, trial_id, view, heart
        self._number = number

    @property
    def number(self) -> int:
        """The trial's number."""
        return self._number

    def __call__(self, step: int, value: float) -> None:
        """Keep a value; raise Hopeless when the pruner gives the trial up."""
        self._heart.check()
        if not math.isfinite(value):
            raise ValueError(f"report({step}, {value}): the value is not finite")
        self._plan.storage.optuna.set_trial_intermediate_value(self._trial_id, step, float(value))
        if len(self._plan.objectives) > 1:
            return
        self._view.report(float(value), step)
        if self._view.should_prune():
            raise Hopeless


def _check_subject(plan: StudyPlan, subject: Subject) -> None:
    """Raise where a subject is not the study's."""
    own = json.loads(json.dumps({"objectives": dict(subject.objectives), **dict(subject.identity())}))
    kept = {"objectives": dict(plan.objectives), **plan.identity}
    different = sorted(key for key in {*own, *kept} if own.get(key) != kept.get(key))
    if different:
        raise ConfigError(
            f"the study {plan.name!r} is about another subject than this process made: {', '.join(different)} differ"
        )


def _checked_values(objectives: Mapping[str, Any], assessment: Assessment) -> list[float]:
    missing = [name for name in objectives if name not in assessment.values]
    if missing:
        raise ConfigError(f"the assessment has no value for {', '.join(missing)}")
    values = [float(assessment.values[name]) for name in objectives]
    for name, value in zip(objectives, values, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}")
    return values


def _attributes(assessment: Assessment) -> dict[str, Any]:
    """What a finished trial keeps of its assessment; costs one by one, so that a dashboard shows them as columns."""
    costs = {f"cost.{name}": float(value) for name, value in assessment.costs.items()}
    return {**costs, "attributes": json.loads(json.dumps(dict(assessment.attributes), allow_nan=False))}
