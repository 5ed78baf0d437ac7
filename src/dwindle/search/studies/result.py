"""What a study found: its trials, the best of them or the Pareto front, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from dwindle.config.errors import DwindleError
from dwindle.search.studies.importances import importances
from dwindle.search.studies.subject import Direction

if TYPE_CHECKING:
    from dwindle.search.studies.plan import StudyPlan

__all__ = ["StudyResult", "StudyTrial"]


@dataclass(frozen=True)
class StudyTrial:
    """A finished trial, as plain data.

    Attributes:
        number: From 0.
        state: ``complete``, ``pruned`` (given up by the pruner) or ``failed``.
        parameters: As they were suggested.
        candidate: What the subject made of them; None when it failed at that.
        values: By objective; empty unless complete.
        costs: By name.
        violations: By constraint; met at 0 and below.
        attributes: What else the subject kept.
        seconds: Wall time.
        error: Why it failed.
    """

    number: int
    state: str
    parameters: Mapping[str, Any]
    candidate: Mapping[str, Any] | None
    values: Mapping[str, float]
    costs: Mapping[str, float]
    violations: Mapping[str, float]
    attributes: Mapping[str, Any] = field(repr=False)
    seconds: float
    error: str | None

    @property
    def feasible(self) -> bool:
        """Whether it is complete and meets every constraint."""
        return self.state == "complete" and all(excess <= 0 for excess in self.violations.values())


@dataclass(frozen=True)
class StudyResult:
    """The end of a study, or how far it is.

    Attributes:
        name: Of the study.
        storage: What another process opens the storage by; None for memory.
        objectives: By name.
        trials: The finished trials, by number.
        wanted: How many trials the study shall have.
        sampler: Its name.
    """

    name: str
    storage: str | None
    objectives: Mapping[str, Direction]
    trials: Sequence[StudyTrial]
    wanted: int
    sampler: str

    @classmethod
    def of(cls, plan: StudyPlan) -> StudyResult:
        """Read a study from its storage."""
        names = {1: "complete", 2: "pruned", 3: "failed"}
        frozen = [trial for trial in plan.all_trials() if trial.state.is_finished()]
        trials = []
        for trial in frozen:
            kept = trial.user_attrs
            done = names[trial.state.value] == "complete"
            trials.append(
                StudyTrial(
                    trial.number,
                    names[trial.state.value],
                    dict(trial.params),
                    kept.get("candidate"),
                    dict(zip(plan.objectives, trial.values or (), strict=True)) if done else {},
                    {key[len("cost.") :]: value for key, value in kept.items() if key.startswith("cost.")},
                    dict(trial.constraints) if done else {},
                    kept.get("attributes", {}),
                    kept.get("seconds", 0.0),
                    kept.get("error"),
                )
            )
        return cls(
            plan.name,
            plan.storage.place,
            dict(plan.objectives),
            trials,
            plan.trials,
            plan.thinking.sampler,
        )

    @property
    def best(self) -> StudyTrial:
        """The best trial that meets every constraint (of equal ones the first); of one objective only.

        Raises:
            DwindleError: There are several objectives, or no trial meets the constraints.
        """
        if len(self.objectives) > 1:
            raise DwindleError(f"the study has the objectives {', '.join(self.objectives)}: see its front")
        found = self.front
        if not found:
            raise DwindleError(self._why_none())
        return found[0]

    @property
    def front(self) -> list[StudyTrial]:
        """The trials that meet every constraint and that no other beats in every way, by the first objective."""
        fitting = [trial for trial in self.trials if trial.feasible]
        signs = [1.0 if way == "maximize" else -1.0 for way in self.objectives.values()]
        points = {
            trial.number: tuple(
                s * trial.values[name] for s, name in zip(signs, self.objectives, strict=True)
            )
            for trial in fitting
        }
        front: list[StudyTrial] = []
        for trial in sorted(
            fitting, key=lambda own: (tuple(-value for value in points[own.number]), own.number)
        ):
            own = points[trial.number]
            others = (points[other.number] for other in front)
            # Sorted by the first objective: only those before can be better, or the same.
            if not any(all(a >= b for a, b in zip(other, own, strict=True)) for other in others):
                front.append(trial)
        return front

    @property
    def importances(self) -> dict[str, float]:
        """How much of the first objective's variance each parameter explains, where that can be told."""
        complete = [trial for trial in self.trials if trial.state == "complete"]
        name = next(iter(self.objectives))
        return importances(
            [trial.parameters for trial in complete], [trial.values[name] for trial in complete]
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data; what a page is drawn from."""
        return {
            "name": self.name,
            "storage": self.storage,
            "sampler": self.sampler,
            "objectives": dict(self.objectives),
            "wanted": self.wanted,
            "trials": [{**asdict(trial), "feasible": trial.feasible} for trial in self.trials],
            "front": [trial.number for trial in self.front],
            "importances": self.importances,
        }

    def summary(self) -> str:
        """Return a readable account."""
        count = {state: sum(trial.state == state for trial in self.trials) for state in ("pruned", "failed")}
        left = ", ".join(f"{number} {state}" for state, number in count.items() if number)
        lines = [f"{self.name}: {len(self.trials)} of {self.wanted} trials{f' ({left})' if left else ''}"]
        if not self.front:
            return "\n".join([*lines, self._why_none()])
        for trial in self.front:
            figures = {**trial.values, **trial.costs}
            text = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            lines.append(f"  trial {trial.number}: {text}")
            if len(self.objectives) == 1:
                lines += [f"    {name} = {value}" for name, value in trial.parameters.items()]
        return "\n".join(lines)

    def _why_none(self) -> str:
        """Say why there is no best trial."""
        complete = [trial for trial in self.trials if trial.state == "complete"]
        if complete:
            nearest = min(complete, key=lambda trial: sum(max(0.0, own) for own in trial.violations.values()))
            above = ", ".join(f"{name} by {own:.4g}" for name, own in nearest.violations.items() if own > 0)
            return (
                f"none of {len(self.trials)} trials meets the constraints; "
                f"the nearest, trial {nearest.number}, is above {above}"
            )
        errors = [trial.error for trial in self.trials if trial.error]
        first = f"; the first failed with: {errors[0]}" if errors else ""
        return f"none of {len(self.trials)} trials was completed{first}"
