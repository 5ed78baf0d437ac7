"""The stage that quantizes after training."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from dwindle.recipe.schema.part import Count, Fraction, Part
from dwindle.recipe.schema.stage import Stage

__all__ = ["LearnedRounding", "QuantizeStage"]


class LearnedRounding(Part):
    """How the rounding of weights is learned; see ``dwindle.quantization.Reconstruction``.

    Attributes:
        blocks: Learn whole blocks together (BRECQ); each layer by itself otherwise (AdaRound).
        steps: Steps of Adam for each block.
        learning_rate: Of Adam.
        batch_size: Samples of a step.
        regularization: Weight of the regularizer.
        warmup: Share of the steps without regularizer.
        seed: Of the order of the samples.
    """

    blocks: bool = False
    steps: Count = 1000
    learning_rate: float = Field(default=1e-2, gt=0.0)
    batch_size: Count = 32
    regularization: float = Field(default=0.01, ge=0.0)
    warmup: Fraction = 0.2
    seed: int = 0


class QuantizeStage(Stage):
    """Quantize after training, with the data's own calibration batches.

    What is left out is left to the preset, or to ``dw.quantize``'s own default.

    Attributes:
        preset: Which numbers, and which means against the loss.
        backend: Where the model is to run: decides what is quantized and how it is grouped.
        config_list: Quantization settings with NNI's keys.
        calibration_batches: Batches of training data that the ranges are taken from.
        observer: How ranges are found.
        avoid_saturation: Compute the same on processors without VNNI.
        settle_scales: Choose scales so that runtimes round alike.
        equalize: Even out channels that are free to be scaled.
        smooth: SmoothQuant's alpha.
        weight_range: ``minmax`` or ``mse``.
        rounding: ``nearest``, ``gptq``, ``adaround`` or ``brecq``, or the settings of a learned one.
        outliers: Divide channels that are far larger than the rest.
        bias_correction: True, false, ``running``, ``sequential`` or ``fast``.
        padding: Argument of the forward that is zero where a token is padding.
        max_drop: Layers go back to float until at most this share of the calibration data gets another answer than
            from the float model.
        worst_layers: So many of the layers that lose most are drawn in the report.
    """

    kind: ClassVar[str] = "quantize"
    makes_model: ClassVar[bool] = True
    preset: str = "int8"
    backend: str | None = None
    config_list: list[dict[str, Any]] | None = None
    calibration_batches: Count = 8
    observer: str | None = None
    avoid_saturation: bool | None = None
    settle_scales: bool | None = None
    equalize: bool | None = None
    smooth: Fraction | None = None
    weight_range: str | None = None
    rounding: str | LearnedRounding | None = None
    outliers: bool | None = None
    bias_correction: bool | str | None = None
    padding: str | None = None
    max_drop: Fraction | None = None
    worst_layers: int = Field(default=6, ge=0)
