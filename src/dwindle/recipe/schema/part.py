"""What all parts of a recipe are made of: closed to unknown keys, shares, counts, moments, numbers that move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from dwindle.training.named_schedules import read_schedule

__all__ = ["Count", "Fraction", "Moment", "NumberOrSchedule", "Part", "with_steps"]

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]


class Part(BaseModel):
    """Base of everything in a recipe: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Moment(Part):
    """A point of a training run: a step (a bare number is one), an epoch, or a share of the whole run.

    Attributes:
        step: Optimizer steps before it.
        epoch: Epochs before it, not always a whole number.
        share: Share of all steps before it.
    """

    step: int | None = Field(default=None, ge=0)
    epoch: float | None = Field(default=None, ge=0.0)
    share: Fraction | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"step": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one(self) -> Moment:
        if sum(value is not None for value in (self.step, self.epoch, self.share)) != 1:
            raise ValueError("give one of step, epoch and share")
        return self


def with_steps(value: Any, steps_of: Any) -> Any:
    """Return a schedule in words with numbers of steps for the moments in it.

    Args:
        value: A number, or one name with its arguments, some of which may be moments (``steps: {epoch: 2}``).
        steps_of: Called with each :class:`Moment`; gives a number of steps.
    """
    if not isinstance(value, Mapping):
        return value
    return {
        name: {key: _with_steps(own, steps_of) for key, own in arguments.items()}
        if isinstance(arguments, Mapping)
        else arguments
        for name, arguments in value.items()
    }


def _with_steps(value: Any, steps_of: Any) -> Any:
    if isinstance(value, Mapping):
        return steps_of(Moment.model_validate(value))
    return [_with_steps(own, steps_of) for own in value] if isinstance(value, list) else value


def _readable(value: Any) -> Any:
    """Refuse what is neither a number nor a schedule; moments in it count as some steps."""
    rising = iter(range(1, 1_000_000))
    read_schedule(with_steps(value, lambda moment: next(rising)), "here")
    return value


NumberOrSchedule = Annotated[Any, AfterValidator(_readable)]
"""A number, or a schedule in words, see :func:`dwindle.training.named_schedules.read_schedule`."""
