"""Stages that make no model: files for runtimes, measurements, the report."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from dwindle.recipe.schema.part import Count
from dwindle.recipe.schema.stage import Stage

__all__ = ["ExportStage", "MeasureStage", "ReportStage"]


class ExportStage(Stage):
    """Write the model for runtimes.

    Attributes:
        formats: ``onnx``, ``openvino``, ``pt2``. An int8 simulation has no ``pt2`` form.
    """

    kind: ClassVar[str] = "export"
    formats: list[Literal["onnx", "openvino", "pt2"]] = Field(default=["onnx"], min_length=1)


class MeasureStage(Stage):
    """Measure the original and what became of it, interleaved, in runtimes.

    Attributes:
        runtimes: ``torch``, ``onnxruntime``, ``openvino`` (``openvino:bf16`` for a precision).
        batch_size: Samples a forward pass while time is taken.
        threads: Threads of each runtime; null leaves it to the runtime.
        repeats: Timed calls of each model in each runtime.
        warmup: Calls before that.
        max_seconds: No more seconds than this for all timed calls.
        compare: Names of stages whose models are measured too; null: all that changed the model.
        parity: Run the whole test set in each runtime and compare the predictions with torch's.
    """

    kind: ClassVar[str] = "measure"
    runtimes: list[str] = Field(default=["torch", "onnxruntime", "openvino"], min_length=1)
    batch_size: Count = 1
    threads: Count | None = None
    repeats: Count = 100
    warmup: int = Field(default=10, ge=0)
    max_seconds: float = Field(default=20.0, gt=0.0)
    compare: list[str] | None = None
    parity: bool = True


class ReportStage(Stage):
    """Write the HTML page; must be the last stage.

    Attributes:
        title: Heading of the page; the recipe's title when left out.
        file: File name in the run directory.
    """

    kind: ClassVar[str] = "report"
    title: str | None = None
    file: str = Field(default="report.html", pattern=r"^[^/\\]+\.html$")
