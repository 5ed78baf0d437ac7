"""What all stages of a recipe have in common."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from dwindle.recipe.schema.part import Part

__all__ = ["OriginalStage", "Stage"]


class Stage(Part):
    """Base of all stages.

    Attributes:
        name: What the stage is called in tables and on disk; the kind when left out. Two stages of one kind
            need names of their own.
    """

    kind: ClassVar[str] = ""
    makes_model: ClassVar[bool] = False
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.-]*$", max_length=60)

    @property
    def label(self) -> str:
        """The stage's own name, or its kind."""
        return self.name or self.kind


class OriginalStage(Stage):
    """Stands, unwritten, before the first stage of a recipe that does not begin with training: the model as it is."""

    kind: ClassVar[str] = "original"
    makes_model: ClassVar[bool] = True
