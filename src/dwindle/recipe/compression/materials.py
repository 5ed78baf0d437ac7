"""What the user's script gives beside the recipe, and where in the recipe an algorithm that needs it stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.recipe.reader import Location, Reader
from dwindle.recipe.schema.part import Moment
from dwindle.training.inputs import batches_of, forward_inputs

__all__ = ["Materials", "Place"]


@dataclass(frozen=True)
class Place:
    """Where something stands in a recipe, for messages.

    Attributes:
        reader: Of the recipe.
        location: The path of keys and positions.
    """

    reader: Reader
    location: Location

    def fail(self, key: str, message: str, hint: str = "") -> NoReturn:
        """Raise a ConfigError at a key below this place (or, with an empty key, at the place itself)."""
        self.reader.fail((*self.location, key) if key else self.location, message, hint)


@dataclass(frozen=True)
class Materials:
    """What algorithms are made with.

    Attributes:
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        calibration_data: Batches, or None.
        teacher: A model to learn from, or None.
        steps_per_epoch: Optimizer steps of an epoch, where the script says so.
        training_steps: Optimizer steps of the whole run, where the script says so.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    calibration_data: Any = None
    teacher: nn.Module | None = None
    steps_per_epoch: int | None = None
    training_steps: int | None = None

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any, calibration_data: Any, **others: Any) -> Materials:
        """Bring what a script gives into one form; example inputs may come from the first calibration batch.

        Args:
            model: Whose forward it is.
            example_inputs: A tensor, a tuple of positional or a mapping of keyword inputs, or None.
            calibration_data: Batches with or without labels, or None.
            others: The other attributes.

        Raises:
            ConfigError: Something is not what it should be.
        """
        for name in ("steps_per_epoch", "training_steps"):
            value = others.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name}: {value!r} is not a whole number from 1 on")
        teacher = others.get("teacher")
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise ConfigError(
                f"teacher must be a torch.nn.Module, got {type(teacher).__name__}; 'ema' and 'self' are said in the "
                "recipe (distillation: {teacher: ema})"
            )
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if example_inputs is not None:
            args, kwargs = forward_inputs(model, example_inputs, lambda batch: batch)
        elif calibration_data is not None:
            batches = batches_of(calibration_data, "calibration_data")
            if not isinstance(batches, Iterator):  # from that its first batch could be taken only once
                args, kwargs = forward_inputs(model, next(iter(batches), ()))
        return cls(args, kwargs, calibration_data, **others)

    @property
    def has_inputs(self) -> bool:
        """Whether there are example inputs."""
        return bool(self.args or self.kwargs)

    @property
    def inputs(self) -> Any:
        """The example inputs as one value: a tuple, a mapping, or None."""
        return self.args or dict(self.kwargs) or None

    def step_of(self, moment: Moment, place: Place, key: str) -> int:
        """Return the optimizer step of a moment.

        Raises:
            ConfigError: It counts epochs, or shares of the run, and the script did not say how many steps those have.
        """
        if moment.step is not None:
            return moment.step
        if moment.epoch is not None:
            if self.steps_per_epoch is None:
                place.fail(
                    key, "epochs are counted here: give from_recipe(..., steps_per_epoch=len(loader)) too"
                )
            return round(moment.epoch * self.steps_per_epoch)
        assert moment.share is not None
        if self.training_steps is None:
            place.fail(
                key,
                "a share of the whole run: give from_recipe(..., training_steps=epochs * len(loader)) too",
            )
        return round(moment.share * self.training_steps)

    def need_inputs(self, place: Place, why: str) -> None:
        """Raise where there are no example inputs.

        Raises:
            ConfigError: Saying what needs them.
        """
        if not self.has_inputs:
            place.fail("", f"{why} needs from_recipe(..., example_inputs=(a batch of inputs,))")

    def need_calibration_data(self, place: Place, why: str) -> None:
        """Raise where there are no calibration data.

        Raises:
            ConfigError: Saying what needs them.
        """
        if self.calibration_data is None:
            place.fail(
                "", f"{why} needs from_recipe(..., calibration_data=loader), a few batches of your data"
            )
