"""One searched value: a list of choices or a range, as a recipe says it, and how Optuna is asked for it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dwindle.config.errors import did_you_mean

__all__ = ["Choice", "Choices", "Order", "Range", "read_choice"]


class Choice(Protocol):
    """What a searched value may be."""

    def suggest(self, trial: Any, name: str) -> Any:
        """Ask an Optuna trial for a value."""

    def examples(self) -> Iterator[Any]:
        """Yield values with which a recipe is checked before anything runs: all choices, or both ends of a range."""

    def parameter(self, value: Any) -> Any:
        """Return the parameter of a trial that gives a value.

        Raises:
            ValueError: None does; the message has the nearest.
        """


@dataclass(frozen=True)
class Choices:
    """One of several values of any kind.

    Attributes:
        values: JSON values.
    """

    values: tuple[Any, ...]

    def suggest(self, trial: Any, name: str) -> Any:
        """Ask an Optuna trial for a value."""
        return self._by_label()[trial.suggest_categorical(name, list(self._by_label()))]

    def examples(self) -> Iterator[Any]:
        """Yield all of them."""
        yield from self.values

    def parameter(self, value: Any) -> Any:
        """Return the label of a value."""
        for label, own in self._by_label().items():
            if own == value and type(own) is type(value):
                return label
        known = [str(own) for own in self.values]
        raise ValueError(f"{value!r} is not one of {', '.join(known)}{did_you_mean(str(value), known)}")

    def _by_label(self) -> dict[Any, Any]:
        """Numbers and words are their own labels; of anything else the JSON text is one."""
        plain = all(isinstance(value, str | int | float | bool) for value in self.values)
        return {value if plain else json.dumps(value, sort_keys=True): value for value in self.values}


@dataclass(frozen=True)
class Range:
    """A number between two, both included.

    Attributes:
        low: The lowest.
        high: The highest.
        whole: Whole numbers only.
        step: Distance between neighbours; None: 1 for whole numbers, none for others.
        log: Ratios count, not differences.
    """

    low: float
    high: float
    whole: bool
    step: float | None = None
    log: bool = False

    def suggest(self, trial: Any, name: str) -> Any:
        """Ask an Optuna trial for a value."""
        if self.whole:
            return trial.suggest_int(
                name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log
            )
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)

    def examples(self) -> Iterator[Any]:
        """Yield both ends."""
        yield from (int(self.low), int(self.high)) if self.whole else (self.low, self.high)

    def parameter(self, value: Any) -> Any:
        """Return the value itself."""
        fits = (
            isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high
        )
        if not fits or (self.whole and value != int(value)):
            raise ValueError(f"{value!r} is not between {self.low} and {self.high}")
        return int(value) if self.whole else float(value)


@dataclass(frozen=True)
class Order:
    """The order of some stages.

    Attributes:
        orders: Those that are possible, each a tuple of names.
    """

    orders: tuple[tuple[str, ...], ...]

    def suggest(self, trial: Any, name: str) -> Any:
        """Ask an Optuna trial for an order."""
        return list(trial.suggest_categorical(name, [" > ".join(own) for own in self.orders]).split(" > "))

    def examples(self) -> Iterator[Any]:
        """Yield all of them."""
        yield from (list(own) for own in self.orders)

    def parameter(self, value: Any) -> Any:
        """Return the label of an order."""
        label = value if isinstance(value, str) else " > ".join(value)
        known = [" > ".join(own) for own in self.orders]
        if label not in known:
            raise ValueError(f"{label!r} is not one of {', '.join(known)}{did_you_mean(label, known)}")
        return label

    @classmethod
    def of(cls, names: Sequence[str]) -> Order:
        """All orders of some names."""
        return cls(tuple(itertools.permutations(names)))


_RANGE = ("low", "high", "step", "log")


def read_choice(said: Any) -> Choice:
    """Read what a recipe says of one searched value: a list, ``{choices: [...]}`` or ``{low: ..., high: ...}``.

    Raises:
        ValueError: It is none of them.
    """
    if isinstance(said, Sequence) and not isinstance(said, str):
        said = {"choices": list(said)}
    if not isinstance(said, Mapping):
        raise ValueError(f"{said!r} is no list of choices and no range (low, high, step, log)")
    known = ("choices",) if "choices" in said else _RANGE
    for key in said:
        if key not in known:
            raise ValueError(
                f"unknown key {key!r}; known are {', '.join(known)}{did_you_mean(str(key), known)}"
            )
    if "choices" in said:
        values = said["choices"]
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise ValueError(f"choices must be a list, not {values!r}")
        labels = [json.dumps(value, sort_keys=True) for value in values]
        if len(set(labels)) < len(labels):
            raise ValueError("a choice stands there twice")
        return Choices(tuple(values))
    return _range(said)


def _range(said: Mapping[str, Any]) -> Range:
    for key in ("low", "high"):
        if key not in said:
            raise ValueError(f"the key {key!r} is missing")
    numbers = [said[key] for key in ("low", "high", "step") if said.get(key) is not None]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"{number!r} is not a number")
    low, high, step, log = said["low"], said["high"], said.get("step"), bool(said.get("log", False))
    if low > high:
        raise ValueError(f"low {low} is above high {high}")
    if step is not None and (step <= 0 or log):
        raise ValueError("log and step exclude each other" if log else f"step {step} is not above 0")
    if log and low <= 0:
        raise ValueError(f"log needs a low above 0, not {low}")
    return Range(low, high, all(isinstance(number, int) for number in numbers), step, log)
