"""Stages that train: with labels alone, or after compression with a teacher and with quantizers."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, model_validator

from dwindle.recipe.schema.compression import Algorithm, Rounding
from dwindle.recipe.schema.part import Count, Fraction, Part
from dwindle.recipe.schema.stage import Stage

__all__ = ["Distillation", "EarlyStopping", "FinetuneStage", "QuantizationInTraining", "TrainStage"]


class EarlyStopping(Part):
    """End a stage when its metric gains no more; see ``dwindle.training.EarlyStop``.

    The metric is the accuracy or, without labels, the agreement with the original; epochs in which masks still grow are
    not judged.

    Attributes:
        patience: Evaluations in a row that are no better than the best; null looks only at ``target``.
        minimum_change: What counts as better.
        target: End as soon as the metric is as good as this.
    """

    patience: Count | None = 5
    minimum_change: float = Field(default=0.0, ge=0.0)
    target: float | None = None

    @model_validator(mode="after")
    def _something(self) -> EarlyStopping:
        if self.patience is None and self.target is None:
            raise ValueError("patience null needs a target, else nothing would ever stop")
        return self


class TrainStage(Stage):
    """Train with labels, in a plain PyTorch loop.

    Attributes:
        epochs: Passes over the training data.
        optimizer: ``adamw``, ``adam`` or ``sgd``.
        learning_rate: The largest one.
        weight_decay: Decoupled for ``adamw``.
        momentum: For ``sgd``.
        schedule: How the learning rate moves: ``one_cycle`` (up, then down to nothing), ``cosine`` (down to
            nothing), ``linear`` or ``constant``.
        warmup: Share of the steps in which a one-cycle rate rises.
        label_smoothing: Share of the target spread over all classes.
        precision: ``float32`` or ``bfloat16`` autocast.
        channels_last: Hold images in channels-last memory.
        clip_norm: Largest norm of all gradients together.
        batch_size: Samples a batch, where it differs from the data's.
        evaluate_every: Epochs from one evaluation to the next; the last epoch is always evaluated.
        early_stop: End when nothing more is gained.
        adapt_normalization: Training batches from which running statistics of batch normalizations are estimated anew
            after each epoch; 0 leaves them as training has moved them.
    """

    kind: ClassVar[str] = "train"
    makes_model: ClassVar[bool] = True
    epochs: int = Field(ge=0)
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = Field(default=2e-3, gt=0.0)
    weight_decay: float = Field(default=1e-4, ge=0.0)
    momentum: Fraction = 0.9
    schedule: Literal["one_cycle", "cosine", "linear", "constant"] = "cosine"
    warmup: Fraction = 0.3
    label_smoothing: Fraction = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool = False
    clip_norm: float | None = Field(default=None, gt=0.0)
    batch_size: Count | None = None
    evaluate_every: Count = 1
    early_stop: EarlyStopping | None = None
    adapt_normalization: int = Field(default=0, ge=0)


class Distillation(Part):
    """Learn from the original model (or from the model's own moving average) as well as from the labels.

    Attributes:
        teacher: ``original``, or ``ema``: the moving average of the model that is trained.
        temperature: Softens both distributions.
        weight: Weight of the teacher's outputs; the labels have ``1 - weight``.
        loss: How outputs are compared: ``kl``, ``dkd`` or ``dist``.
        options: Options of that loss.
        config_list: Pairs of intermediate tensors (kind ``distillation``).
        ema_decay: Of the moving average.
        cache: Keep the teacher's answers on disk while the stage trains; for data without ``augment``.
    """

    teacher: Literal["original", "ema"] = "original"
    temperature: float = Field(default=4.0, gt=0.0)
    weight: Fraction = 0.9
    loss: Literal["kl", "binary", "dkd", "dist"] = "kl"
    options: dict[str, Any] = Field(default_factory=dict)
    config_list: list[dict[str, Any]] | None = None
    ema_decay: Fraction = 0.999
    cache: bool = False

    @model_validator(mode="after")
    def _cacheable(self) -> Distillation:
        if self.cache and self.teacher == "ema":
            raise ValueError("cache: what a moving average says changes with every step; nothing can be kept")
        return self


class QuantizationInTraining(Rounding):
    """Train with the rounding of the integer model; see ``dwindle.quantization.TrainingQuantizer``.

    Attributes:
        start_weights: Optimizer step from which weights are rounded.
        start_activations: Optimizer step from which activations are rounded.
        freeze_ranges: Optimizer step from which moving ranges stand still.
        freeze_normalization: Optimizer step from which normalizations take their running statistics.
    """

    start_weights: int = Field(default=0, ge=0)
    start_activations: int = Field(default=0, ge=0)
    freeze_ranges: int | None = Field(default=None, ge=0)
    freeze_normalization: int | None = Field(default=None, ge=0)


class FinetuneStage(TrainStage):
    """Train on after compression, by default with distillation from the original model.

    Attributes:
        distillation: How to learn from the original; null switches it off.
        quantization: Train with quantizers; the stage's model is the integer one then.
        compression: Algorithms in their order, in place of the two above; see :mod:`dwindle.recipe.schema.compression`.
            What they make is realized at the end of the stage.
        task_weight: Weight of the labels' loss beside the losses of ``compression``.
        compressor_rate: Factor for the learning rates of the compressors' own parameters: scales, scores, projections.
    """

    kind: ClassVar[str] = "finetune"
    distillation: Distillation | None = Distillation()
    quantization: QuantizationInTraining | None = None
    compression: tuple[SerializeAsAny[Algorithm], ...] = ()
    task_weight: float = Field(default=1.0, ge=0.0)
    compressor_rate: float = Field(default=1.0, gt=0.0)

    @model_validator(mode="before")
    @classmethod
    def _said_once(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not value.get("compression"):
            if isinstance(value, dict) and "task_weight" in value:
                raise ValueError(
                    "task_weight belongs to 'compression'; distillation has a 'weight' of its own"
                )
            return value
        for key in ("distillation", "quantization"):
            if value.get(key) is not None:
                raise ValueError(f"give {key!r} as an entry of 'compression', not beside it")
        return {**value, "distillation": None}
