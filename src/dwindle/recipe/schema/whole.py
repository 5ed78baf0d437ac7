"""A whole run of ``dwindle run``, and every kind of stage."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dwindle.recipe.schema.automatic import AutoStage
from dwindle.recipe.schema.model_and_data import DataPart, ModelPart
from dwindle.recipe.schema.part import Count, Part
from dwindle.recipe.schema.quantizing import QuantizeStage
from dwindle.recipe.schema.showing import ExportStage, MeasureStage, ReportStage
from dwindle.recipe.schema.shrinking import FactorizeStage, PruneStage
from dwindle.recipe.schema.stage import Stage
from dwindle.recipe.schema.training import FinetuneStage, TrainStage

__all__ = ["STAGES", "Recipe"]


STAGES: dict[str, type[Stage]] = {
    stage.kind: stage
    for stage in (
        TrainStage,
        PruneStage,
        FactorizeStage,
        FinetuneStage,
        QuantizeStage,
        AutoStage,
        ExportStage,
        MeasureStage,
        ReportStage,
    )
}
"""Every kind of stage by its key in a recipe."""


class Recipe(Part):
    """A whole run.

    Attributes:
        name: Names the run directory; letters, digits, ``_``, ``-`` and ``.``.
        title: One line for people.
        description: A sentence or two for the report.
        seeds: The whole chain of stages is run once for each; tables show the mean.
        threads: Threads of torch, for results that repeat; null leaves torch's own choice.
        model: What is compressed.
        data: What it is trained, calibrated and tested with.
        stages: What is done, in this order.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)
    title: str | None = None
    description: str | None = None
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(default=(0,), min_length=1)
    threads: Count | None = None
    model: ModelPart
    data: DataPart
    stages: tuple[Stage, ...]
