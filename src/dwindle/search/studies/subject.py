"""What a study works on: something that suggests candidates and assesses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from dwindle.config.callables import call_checked, import_callable
from dwindle.config.errors import ConfigError

if TYPE_CHECKING:
    from optuna.trial import Trial

__all__ = ["Assessment", "Direction", "Hopeless", "Report", "Subject", "SubjectMaker"]

Direction = Literal["maximize", "minimize"]


class Hopeless(BaseException):
    """Raised inside ``report`` when the study's pruner gives a trial up; the study catches it.

    A ``BaseException``, so that ``except Exception`` around a training step does not swallow it. A context manager or
    a ``finally`` of the subject sees it like any other end.
    """


class Report(Protocol):
    """How an assessment tells how it goes."""

    @property
    def number(self) -> int:
        """The trial that is assessed, from 0: for names of files; the result must not depend on it."""

    def __call__(self, step: int, value: float) -> None:
        """Tell how a candidate does so far.

        Args:
            step: Rises from call to call.
            value: What the only objective would be if the assessment ended now; of several objectives it is ignored.

        Raises:
            Hopeless: The trial is not worth more work.
        """


@dataclass(frozen=True)
class Assessment:
    """What is known of a candidate; all of it must be JSON values.

    Attributes:
        values: A finite number for each objective of the subject, by name.
        costs: Further figures that tables and pictures show (milliseconds, bytes, MACs, ...).
        violations: By name of the constraint: how far the candidate is above what it may be, in the constraint's
            own unit or as a share; 0 or less where the constraint is met.
        attributes: Anything else worth keeping, such as the recipe as plain data.
    """

    values: Mapping[str, float]
    costs: Mapping[str, float] = field(default_factory=dict)
    violations: Mapping[str, float] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Subject(Protocol):
    """What a study searches.

    A subject may be made anew in any process; what it gives for a candidate must not depend on other candidates, nor on
    their order.
    """

    @property
    def objectives(self) -> Mapping[str, Direction]:
        """The objectives by name: one, or several for a Pareto front."""

    def identity(self) -> Mapping[str, Any]:
        """Return what must agree for stored trials to be valid: JSON values (checksums, budgets, settings)."""

    def suggest(self, trial: Trial) -> Mapping[str, Any]:
        """Draw a candidate.

        Args:
            trial: Optuna's; ``trial.suggest_float("ratio", 0, 0.9)`` and the like name the parameters.

        Returns:
            The candidate as JSON values: a function of the suggested parameters and of nothing else.
        """

    def assess(self, candidate: Mapping[str, Any], report: Report) -> Assessment:
        """Find out how good a candidate is; an exception makes the trial a failed one.

        Args:
            candidate: What :meth:`suggest` returned, read back from JSON.
            report: To be told how it goes, where that is known before the end.
        """


@dataclass(frozen=True)
class SubjectMaker:
    """How any process makes the subject of a study.

    Attributes:
        name: ``package.module:callable``, which returns a :class:`Subject`.
        arguments: Its keyword arguments; JSON values.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> Subject:
        """Import the callable and call it.

        Raises:
            ConfigError: It does not exist, refuses the arguments, or gives something else.
        """
        found = call_checked(import_callable(self.name, "subject"), dict(self.arguments), self.name)
        if not isinstance(found, Subject):
            raise ConfigError(
                f"{self.name!r} gave a {type(found).__name__}; a subject has 'objectives', identity(), suggest(trial) "
                "and assess(candidate, report)"
            )
        return found
