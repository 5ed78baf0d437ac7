"""Between which steps of a run an algorithm acts, and what in its settings moves in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dwindle.recipe.compression.materials import Materials, Place
from dwindle.recipe.schema.part import Moment, with_steps
from dwindle.training import Compressor
from dwindle.training.named_schedules import read_schedule

__all__ = ["Made", "Window"]

Made = tuple[Compressor, Literal["both", "start", "nothing"]]
"""A compressor, and what of ``start`` and ``stop`` it does not see to by itself."""


@dataclass(frozen=True)
class Window:
    """The part of a run in which one algorithm acts.

    Attributes:
        materials: What the script gave.
        place: Where the algorithm stands in the recipe.
        start: The step at which it begins.
        stop: The step at which what it made stands, or None.
    """

    materials: Materials
    place: Place
    start: int
    stop: int | None

    @property
    def length(self) -> int | None:
        """Steps in which it acts, or None."""
        return None if self.stop is None else self.stop - self.start

    def need_length(self, what: str) -> int:
        """Return the steps in which it acts.

        Raises:
            ConfigError: There is no ``stop``; ``what`` happens there.
        """
        if self.length is None:
            self.place.fail("", f"the key 'stop' is missing: when {what}")
        return self.length

    def after_start(self, moment: Moment | None, key: str) -> int | None:
        """Return the steps from ``start`` to a moment; None for None.

        Raises:
            ConfigError: It lies before the start.
        """
        if moment is None:
            return None
        step = self.materials.step_of(moment, self.place, key)
        if step < self.start:
            self.place.fail(key, f"step {step} is before the start, step {self.start}")
        return step - self.start

    def moving(self, key: str, value: Any) -> Any:
        """Return a number, or the schedule that is said in words; moments in it are durations."""

        def steps_of(moment: Moment) -> int:
            return self.materials.step_of(moment, self.place, key)

        return read_schedule(with_steps(value, steps_of), key)
