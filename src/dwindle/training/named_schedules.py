"""Schedules in words, for files that hold no Python: ``{"linear": {"start": 1.0, "end": 0.0, "steps": 100}}``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.training import schedule
from dwindle.training.schedule import Schedule

__all__ = ["NAMED_SCHEDULES", "read_schedule"]

NAMED_SCHEDULES: dict[str, type[Any]] = {
    "constant": schedule.ConstantSchedule,
    "linear": schedule.LinearSchedule,
    "cubic": schedule.CubicSchedule,
    "cosine": schedule.CosineSchedule,
    "polynomial": schedule.PolynomialSchedule,
    "exponential": schedule.ExponentialSchedule,
    "exponential_with_bias": schedule.ExponentialWithBiasSchedule,
    "multistep": schedule.MultistepSchedule,
}
"""Schedules by name; their arguments are those of the class."""


def read_schedule(value: Any, where: str) -> float | Schedule:
    """Return a number or a schedule as it is, and the schedule that a mapping describes.

    Args:
        value: A number, a schedule, or a mapping of one name to its arguments.
        where: What it belongs to, for messages.

    Raises:
        ConfigError: It is none of these, or the name or an argument is not known.
    """
    if callable(value):
        return value
    if isinstance(value, Mapping):
        return _made(value, where)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{where} must be a number or a schedule, got {value!r}")
    return value


def _made(words: Mapping[str, Any], where: str) -> Schedule:
    if len(words) != 1:
        raise ConfigError(
            f"{where}: a schedule is one of {', '.join(NAMED_SCHEDULES)} with its arguments, got {dict(words)!r}"
        )
    name, arguments = next(iter(words.items()))
    if name not in NAMED_SCHEDULES:
        hint = did_you_mean(str(name), NAMED_SCHEDULES)
        raise ConfigError(
            f"{where}: there is no schedule {name!r}; known are {', '.join(NAMED_SCHEDULES)}{hint}"
        )
    if not isinstance(arguments, Mapping):
        raise ConfigError(f"{where}: schedule {name!r} needs its arguments as a mapping, got {arguments!r}")
    known = list(inspect.signature(NAMED_SCHEDULES[name]).parameters)
    for key in arguments:
        if key not in known:
            raise ConfigError(
                f"{where}: schedule {name!r} has no argument {key!r}{did_you_mean(str(key), known)}"
            )
    try:
        made: Schedule = NAMED_SCHEDULES[name](**arguments)
    except TypeError as error:
        raise ConfigError(f"{where}: schedule {name!r}: {error}") from error
    return made
