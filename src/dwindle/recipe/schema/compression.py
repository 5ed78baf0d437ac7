"""What a list of compression algorithms may say: one class for each kind of algorithm.

The same list drives a training script (:func:`dwindle.from_recipe`) and a ``finetune`` stage of ``dwindle run``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from dwindle.config.errors import did_you_mean
from dwindle.pruning.named_pruners import PRUNERS, TRAINING_METHODS
from dwindle.quantization.quantizers import METHODS
from dwindle.recipe.schema.part import Count, Fraction, Moment, NumberOrSchedule, Part
from dwindle.recipe.schema.shrinking import FactorizeTarget

__all__ = [
    "ALGORITHMS",
    "RAMPS",
    "Algorithm",
    "Binarization",
    "CompressionRecipe",
    "DistillationAlgorithm",
    "Factorization",
    "FreezingAlgorithm",
    "Pruning",
    "Quantization",
    "SparsityTraining",
]

RAMPS = ("linear", "cubic", "agp", "cosine")
"""Schedules that a pruning may name alone: from nothing at ``start`` to the goal at ``stop``."""


def _known(what: str, value: str, choices: Any) -> str:
    if value not in choices:
        raise ValueError(f"{value!r} is not one of {', '.join(choices)}{did_you_mean(value, choices)}")
    return value


class Algorithm(Part):
    """Base of all algorithms of a compression list.

    Attributes:
        start: When it begins: a number of optimizer steps, ``{epoch: 1}`` or ``{share: 0.3}`` (of the whole run).
        stop: When what it has made stands: its masks move no more, its loss is not added any longer.
    """

    kind: ClassVar[str] = ""
    start: Moment = Moment(step=0)
    stop: Moment | None = None


class Pruning(Algorithm):
    """Masks: which weights go, by what measure, and when.

    Attributes:
        method: A name in ``dwindle.pruning.named_pruners.PRUNERS``, or ``group_sparsity``.
        config_list: Pruning settings with NNI's keys; not for ``group_sparsity``.
        schedule: How the ratio grows between ``start`` and ``stop``: ``linear``, ``cubic`` (``agp``) or ``cosine``, or
            a schedule in words whose steps count from ``start``. Without one all goes at once.
        values: Whether a schedule in words gives shares of the goal (``progress``) or ratios (``ratio``).
        interval: Optimizer steps from one renewal of the masks to the next, under a schedule.
        batches: Batches of calibration data for a method that looks at the model once.
        options: More arguments of the pruner.
    """

    kind: ClassVar[str] = "pruning"
    method: str = "l1"
    config_list: list[dict[str, Any]] | None = None
    schedule: str | dict[str, Any] | None = None
    values: Literal["progress", "ratio"] = "progress"
    interval: Count | None = None
    batches: Count | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("method")
    @classmethod
    def _method(cls, value: str) -> str:
        return _known("method", value, (*PRUNERS, "group_sparsity"))

    @field_validator("schedule")
    @classmethod
    def _schedule(cls, value: Any) -> Any:
        if isinstance(value, str):
            return _known("schedule", value, RAMPS)
        if value is not None:
            Weighted.model_validate({"value": value})
        return value

    @model_validator(mode="after")
    def _fits(self) -> Pruning:
        if self.method == "group_sparsity":
            if self.config_list is not None or self.schedule is not None:
                raise ValueError(
                    "group_sparsity is a penalty on whole axes; it takes options, no config_list"
                )
        elif not self.config_list:
            raise ValueError("the key 'config_list' is missing: which layers, and how much of them goes")
        if isinstance(self.schedule, str) and self.stop is None:
            raise ValueError(f"schedule {self.schedule!r} needs a 'stop', at which the goal is reached")
        if self.schedule is None and self.interval is not None and self.method in PRUNERS:
            raise ValueError("'interval' belongs to a schedule")
        return self


class SparsityTraining(Pruning):
    """Pruning whose masks come out of the training itself: scores, gates, penalties, growing again.

    Attributes:
        method: One of ``dwindle.pruning.named_pruners.TRAINING_METHODS``.
    """

    kind: ClassVar[str] = "sparsity_training"
    method: str = "l0"

    @field_validator("method")
    @classmethod
    def _method(cls, value: str) -> str:
        return _known("method", value, TRAINING_METHODS)


class Rounding(Part):
    """Which numbers a model is trained with, wherever a recipe says so.

    Attributes:
        method: A name in ``dwindle.quantization.quantizers.METHODS``: ``qat``, ``lsq``, ...
        weight_bits: Bits of weights, 2 to 8.
        activation_bits: Bits of activations, 2 to 8.
        end_bits: Bits of the first and the last layer.
        backend: Where the model is to run: decides what is quantized and how it is grouped.
        config_list: Quantization settings with NNI's keys.
        calibration_batches: Batches of calibration data that the first ranges are taken from.
        avoid_saturation: Compute the same on processors without VNNI.
    """

    method: str = "qat"
    weight_bits: int = Field(default=8, ge=2, le=8)
    activation_bits: int = Field(default=8, ge=2, le=8)
    end_bits: int = Field(default=8, ge=2, le=8)
    backend: str | None = None
    config_list: list[dict[str, Any]] | None = None
    calibration_batches: Count = 8
    avoid_saturation: bool = True

    @field_validator("method")
    @classmethod
    def _method(cls, value: str) -> str:
        return _known("method", value, tuple(METHODS))


class Quantization(Algorithm, Rounding):
    """Train with the rounding of the integer model; see ``dwindle.quantization.TrainingQuantizer``.

    Attributes:
        observer: How first ranges of activations are found.
        start_activations: When activations are rounded too; not before ``start``.
        freeze_ranges: When moving ranges stand still.
        freeze_normalization: When normalizations take their running statistics.
        gradient_bits: Round gradients too (DoReFa).
        penalty: Factor of PACT's penalty on its clips.
        options: More arguments of the method.
    """

    kind: ClassVar[str] = "quantization"
    observer: str = "histogram"
    start_activations: Moment | None = None
    freeze_ranges: Moment | None = None
    freeze_normalization: Moment | None = None
    gradient_bits: int | None = Field(default=None, ge=1, le=8)
    penalty: float = Field(default=2e-4, ge=0.0)
    options: dict[str, Any] = Field(default_factory=dict)


class Binarization(Algorithm):
    """Weights and inputs of layers become signs while the model trains; see ``dwindle.quantization.BinaryQuantizer``.

    Attributes:
        config_list: Targets with ``quant_dtype: int1``.
        weights: ``bnn``, ``xnor``, ``xnor_paper``, ``dorefa`` or ``bireal``.
        activations: ``bnn``, ``bireal``, ``scale_threshold`` or ``dorefa``.
        start_weights: When weights become binary too; not before ``start``, when activations do.
        decay: When the learning rate of the optimizer given to ``run.add_parameters_to`` falls, and its weight decay
            ends.
        end: When the learning rate has fallen to nothing.
        power: Of that fall.
    """

    kind: ClassVar[str] = "binarization"
    config_list: list[dict[str, Any]]
    weights: str = "xnor"
    activations: str = "scale_threshold"
    start_weights: Moment | None = None
    decay: Moment | None = None
    end: Moment | None = None
    power: float = Field(default=2.1, gt=0.0)

    @model_validator(mode="after")
    def _stays(self) -> Binarization:
        if self.stop is not None:
            raise ValueError("what is binary stays so; leave 'stop' out")
        return self


class DistillationAlgorithm(Algorithm):
    """Learn from a teacher as well as from the task; see ``dwindle.distillation.Distiller``.

    Attributes:
        teacher: ``given``: the teacher that comes with the model (of a ``finetune`` stage: the original model);
            ``copy``: the model as it is before anything is done to it; ``ema``: its moving average; ``self``: other
            modules of the model.
        weight: Weight of the teacher's outputs: a number, or a schedule in words over steps from ``start``.
        temperature: Softens both distributions; a number or a schedule.
        loss: How outputs are compared: ``kl``, ``binary``, ``dkd`` or ``dist``.
        options: Options of that loss.
        config_list: Pairs of intermediate tensors (kind ``distillation``).
        ema_decay: Of the moving average.
        class_dim: Dimension of the classes.
        cache: A directory that keeps the teacher's answers, for data without augmentation.
        seed: Of the first weights of learned projections.
    """

    kind: ClassVar[str] = "distillation"
    teacher: Literal["given", "copy", "ema", "self"] = "given"
    weight: NumberOrSchedule = 0.9
    temperature: NumberOrSchedule = 4.0
    loss: Literal["kl", "binary", "dkd", "dist"] = "kl"
    options: dict[str, NumberOrSchedule] = Field(default_factory=dict)
    config_list: list[dict[str, Any]] | None = None
    ema_decay: Fraction = 0.999
    class_dim: int | None = None
    cache: str | None = None
    seed: int = 0


class Factorization(Algorithm):
    """Learn the rank of each layer; see ``dwindle.factorization.LowRankTraining``.

    Attributes:
        target: What should be left, such as ``{macs: 0.5}``.
        config_list: Settings of the kind ``factorization``; all layers that can be factorized when left out.
        width: Distance of the cost from its goal at which the penalty is 1.
        first_closed: Probability that a small direction is closed at the beginning.
        learning_rate: Of the gates.
        seed: Of the gates that are drawn.
    """

    kind: ClassVar[str] = "factorization"
    target: FactorizeTarget | None = None
    config_list: list[dict[str, Any]] | None = None
    width: float = Field(default=0.05, gt=0.0)
    first_closed: float = Field(default=0.02, gt=0.0, lt=1.0)
    learning_rate: float | None = Field(default=None, gt=0.0)
    seed: int = 0

    @model_validator(mode="after")
    def _goal(self) -> Factorization:
        if self.target is None and self.config_list is None:
            raise ValueError("give a target, or a config_list with ranks")
        if self.stop is None:
            raise ValueError("the key 'stop' is missing: when the ranks stand")
        return self


class FreezingAlgorithm(Algorithm):
    """Let modules stand still from ``start`` to ``stop``; see ``dwindle.training.Freezing``.

    Attributes:
        config_list: Which modules: ``op_names``, ``op_types``, ``op_names_re`` and ``exclude_...``.
        statistics: Whether running statistics of their normalizations stand still too.
    """

    kind: ClassVar[str] = "freezing"
    config_list: list[dict[str, Any]]
    statistics: bool = True


class Weighted(Part):
    """Checks one schedule in words."""

    value: NumberOrSchedule


ALGORITHMS: dict[str, type[Algorithm]] = {
    own.kind: own
    for own in (
        Pruning,
        SparsityTraining,
        Quantization,
        Binarization,
        DistillationAlgorithm,
        Factorization,
        FreezingAlgorithm,
    )
}
"""Every kind of algorithm by its key in a compression list."""


class CompressionRecipe(Part):
    """A file that drives a training script.

    Attributes:
        title: One line for people.
        description: A sentence or two.
        task_weight: Weight of the task's own loss beside the algorithms' losses: a number, or a schedule in words;
            ``run.task_weight`` says it in the training loop.
        compression: The algorithms, in the order in which they act.
    """

    title: str | None = None
    description: str | None = None
    task_weight: NumberOrSchedule = 1.0
    compression: tuple[SerializeAsAny[Algorithm], ...]
