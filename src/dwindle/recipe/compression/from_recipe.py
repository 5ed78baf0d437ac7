"""``dw.from_recipe``: one YAML file drives the user's own training script."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

import dwindle.realize  # noqa: F401  (registers what a run's realize() calls)
from dwindle.config.errors import ConfigError
from dwindle.quantization import BinaryQuantizer
from dwindle.recipe.compression.making import make_compressors
from dwindle.recipe.compression.materials import Materials, Place
from dwindle.recipe.compression.reading import read_compression
from dwindle.recipe.compression.window import Window
from dwindle.recipe.schema.compression import CompressionRecipe
from dwindle.training import CompressionRun, Compressor, Schedule, value_at

__all__ = ["RecipeRun", "from_recipe"]


class RecipeRun(CompressionRun):
    """The run of a recipe. Made by :func:`from_recipe`.

    Attributes:
        recipe: What the file says.
    """

    def __init__(
        self,
        model: nn.Module,
        compressors: Sequence[Compressor],
        recipe: CompressionRecipe,
        task_weight: float | Schedule,
        *,
        restore_on_error: bool = True,
    ):
        super().__init__(model, compressors, restore_on_error=restore_on_error)
        self.recipe = recipe
        self._task_weight = task_weight

    def add_parameters_to(
        self, optimizer: torch.optim.Optimizer, *, schedule: Any | None = None, **group_options: Any
    ) -> int:
        """As :meth:`CompressionRun.add_parameters_to`; the stages of a binarization act on the optimizer, too."""
        for compressor in self.compressors:
            if isinstance(compressor, BinaryQuantizer):
                compressor.follow(optimizer)
        return super().add_parameters_to(optimizer, schedule=schedule, **group_options)

    @property
    def task_weight(self) -> float:
        """Weight of the task's own loss in the step to come."""
        return value_at(self._task_weight, self.steps)


def from_recipe(
    model: nn.Module,
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    *,
    example_inputs: Any = None,
    calibration_data: Any = None,
    teacher: nn.Module | None = None,
    steps_per_epoch: int | None = None,
    training_steps: int | None = None,
    restore_on_error: bool = True,
) -> RecipeRun:
    """Make the compressors that a recipe lists, for a training loop of your own.

    with dw.from_recipe(model, "recipe.yaml", example_inputs=(x,), calibration_data=loader) as run:
        run.add_parameters_to(optimizer)
        for x, y in loader:
            loss = run.task_weight * criterion(model(x), y) + run.loss()
            loss.backward(); optimizer.step(); optimizer.zero_grad(); run.step()
        small = run.realize(example_inputs=(x,))

    Everything is checked before anything is done: the model is only read until the block is entered.

    Args:
        model: The model that is trained.
        recipe: A YAML file (or what it would hold, as a mapping) with the key ``compression``.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword inputs; when left out, those of the
            first batch of ``calibration_data``.
        calibration_data: Batches, with or without labels; for quantizers' first ranges and for pruners that look at
            data once.
        teacher: The model that a ``distillation`` learns from (``teacher: given``).
        steps_per_epoch: Optimizer steps of an epoch, for recipes that count epochs.
        training_steps: Optimizer steps of the whole run, for recipes that say shares of it.
        restore_on_error: As in :func:`dwindle.compress`.

    Returns:
        The run, not yet entered.

    Raises:
        ConfigError: The recipe is not valid, does not fit the model, or needs what was not given. The message names
            the file, the line, the entry and the key.
        CaptureError: The model fails on the example inputs.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    said, reader = read_compression(recipe)
    materials = Materials.of(
        model,
        example_inputs,
        calibration_data,
        teacher=teacher,
        steps_per_epoch=steps_per_epoch,
        training_steps=training_steps,
    )
    compressors = make_compressors(said.compression, model, materials, reader)
    weight = Window(materials, Place(reader, ()), 0, None).moving("task_weight", said.task_weight)
    try:
        return RecipeRun(model, compressors, said, weight, restore_on_error=restore_on_error)
    except ConfigError as error:
        # Two that cannot go together; the run counts compressors as the list counts them.
        reader.fail(("compression",), str(error))
