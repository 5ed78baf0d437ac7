"""What a recipe may say, as checked values: the model, the data, and the stages in their order."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "STAGES",
    "CalibrationPart",
    "DataPart",
    "Distillation",
    "ExportStage",
    "FinetuneStage",
    "LearnedRounding",
    "MeasureStage",
    "ModelPart",
    "OriginalStage",
    "PruneStage",
    "QuantizeStage",
    "Recipe",
    "ReportStage",
    "Stage",
    "TrainStage",
]

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]


class Part(BaseModel):
    """Base of everything in a recipe: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelPart(Part):
    """Which model: ``package.module:callable``, ``timm/NAME``, ``hf/PATH``, or a directory dwindle wrote.

    Attributes:
        name: The name.
        arguments: Keyword arguments of the callable.
    """

    name: str = Field(min_length=1)
    arguments: dict[str, Any] = {}


class CalibrationPart(Part):
    """Where calibration inputs come from, when not from the training data.

    Attributes:
        name: ``package.module:callable``; gives inputs alone, or whatever the data may be.
        arguments: Its keyword arguments.
    """

    name: str = Field(min_length=1)
    arguments: dict[str, Any] = {}


class DataPart(Part):
    """Which data: ``package.module:callable``, called once; see :mod:`dwindle.recipe.data_source`.

    Attributes:
        name: The callable.
        arguments: Its keyword arguments.
        batch_size: Samples a training batch, for data that come as tensors.
        evaluation_batch_size: Samples a batch when nothing is trained.
        augment: ``package.module:callable``, called with ``(images, generator)`` on each training batch.
        augment_arguments: Further keyword arguments of ``augment``.
        limit: Only the first so many training samples, for data that come as tensors.
        test_limit: Only the first so many test samples, for data that come as tensors.
        calibration: Where calibration inputs come from, when not from the training data.
    """

    name: str = Field(min_length=1)
    arguments: dict[str, Any] = {}
    batch_size: Count = 128
    evaluation_batch_size: Count = 512
    augment: str | None = None
    augment_arguments: dict[str, Any] = {}
    limit: Count | None = None
    test_limit: Count | None = None
    calibration: CalibrationPart | None = None


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
    loss: Literal["kl", "dkd", "dist"] = "kl"
    options: dict[str, Any] = {}
    config_list: list[dict[str, Any]] | None = None
    ema_decay: Fraction = 0.999
    cache: bool = False

    @model_validator(mode="after")
    def _cacheable(self) -> Distillation:
        if self.cache and self.teacher == "ema":
            raise ValueError("cache: what a moving average says changes with every step; nothing can be kept")
        return self


class QuantizationInTraining(Part):
    """Train with the rounding of the integer model; see ``dwindle.quantization.TrainingQuantizer``.

    Attributes:
        method: A name in ``dwindle.quantization.quantizers.METHODS``: ``qat``, ``lsq``, ...
        weight_bits: Bits of weights, 2 to 8.
        activation_bits: Bits of activations, 2 to 8.
        end_bits: Bits of the first and the last layer.
        backend: Where the model is to run: decides what is quantized and how it is grouped.
        config_list: Quantization settings with NNI's keys.
        calibration_batches: Batches of training data that the first ranges are taken from.
        start_weights: Optimizer step from which weights are rounded.
        start_activations: Optimizer step from which activations are rounded.
        freeze_ranges: Optimizer step from which moving ranges stand still.
        freeze_normalization: Optimizer step from which normalizations take their running statistics.
        avoid_saturation: Compute the same on processors without VNNI.
    """

    method: str = "qat"
    weight_bits: int = Field(default=8, ge=2, le=8)
    activation_bits: int = Field(default=8, ge=2, le=8)
    end_bits: int = Field(default=8, ge=2, le=8)
    backend: str | None = None
    config_list: list[dict[str, Any]] | None = None
    calibration_batches: Count = 8
    start_weights: int = Field(default=0, ge=0)
    start_activations: int = Field(default=0, ge=0)
    freeze_ranges: int | None = Field(default=None, ge=0)
    freeze_normalization: int | None = Field(default=None, ge=0)
    avoid_saturation: bool = True


class FinetuneStage(TrainStage):
    """Train on after compression, by default with distillation from the original model.

    Attributes:
        distillation: How to learn from the original; null switches it off.
        quantization: Train with quantizers; the stage's model is the integer one then.
    """

    kind: ClassVar[str] = "finetune"
    distillation: Distillation | None = Distillation()
    quantization: QuantizationInTraining | None = None


class PruneTarget(Part):
    """What should be left, as a share (0 to 1) of the model that enters the stage."""

    macs: Fraction | None = None
    params: Fraction | None = None
    bytes: Fraction | None = None

    @model_validator(mode="after")
    def _one(self) -> PruneTarget:
        if sum(value is not None for value in (self.macs, self.params, self.bytes)) != 1:
            raise ValueError("give one of macs, params and bytes")
        return self


class PruneStage(Stage):
    """Remove whole channels, heads and features, and make the small model at once.

    Give one of ``ratio``, ``target`` and ``config_list``.

    Attributes:
        ratio: Share of every prunable axis that goes.
        target: What should be left, such as ``{macs: 0.35}``.
        config_list: Pruning settings with NNI's keys, for ``pruner``.
        pruner: Which pruner reads ``config_list``.
        importance: What decides which indices stay, as in ``dw.prune``.
        data_batches: Batches for an importance that runs the model (training data where it needs labels, otherwise
            calibration data), and for ``repair``.
        repair: Make up for what went with unlabelled calibration data (``dw.repair``).
        scope: Rank within each axis (``local``) or over the whole model (``global``).
        options: Further keyword arguments of ``dw.prune``.
    """

    kind: ClassVar[str] = "prune"
    makes_model: ClassVar[bool] = True
    ratio: Fraction | None = None
    target: PruneTarget | None = None
    config_list: list[dict[str, Any]] | None = None
    pruner: Literal["l1", "l2", "fpgm", "random"] = "l1"
    importance: Literal[
        "l1", "l2", "fpgm", "random", "group_norm", "taylor", "fisher", "hessian", "outputs", "activation"
    ] = "l1"
    data_batches: Count = 8
    repair: bool = False
    scope: Literal["local", "global"] = "local"
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one(self) -> PruneStage:
        if sum(value is not None for value in (self.ratio, self.target, self.config_list)) != 1:
            raise ValueError("give one of ratio, target and config_list")
        if self.repair and self.config_list is not None:
            raise ValueError("repair goes with ratio or target, not with config_list")
        return self


class FactorizeTarget(Part):
    """What should be left, as a share (0 to 1) of the model that enters the stage."""

    macs: Fraction | None = None
    params: Fraction | None = None

    @model_validator(mode="after")
    def _one(self) -> FactorizeTarget:
        if (self.macs is None) == (self.params is None):
            raise ValueError("give one of macs and params")
        return self


class FactorizeStage(Stage):
    """Replace layers by chains of smaller ones of low rank; see ``dw.factorize``.

    Give one of ``target``, ``rank``, ``rank_ratio`` and ``energy``, or a ``config_list``, or both.

    Attributes:
        target: What should be left, such as ``{macs: 0.5}``.
        rank: Rank of every layer, or ``vbmf``.
        rank_ratio: Share of the full ranks.
        energy: Share of the energy that is kept.
        method: ``auto``, ``svd``, ``tucker``, ``cp`` or ``spatial``.
        config_list: Settings of the kind ``factorization`` for single layers.
        round_to: Ranks become a multiple of this.
        minimum: Smallest rank.
        data_batches: Calibration batches by which ``svd`` judges what matters for the outputs; 0 judges by the weights.
    """

    kind: ClassVar[str] = "factorize"
    makes_model: ClassVar[bool] = True
    target: FactorizeTarget | None = None
    rank: Count | Literal["vbmf"] | None = None
    rank_ratio: float | None = Field(default=None, gt=0.0, le=1.0)
    energy: float | None = Field(default=None, gt=0.0, le=1.0)
    method: Literal["auto", "svd", "tucker", "cp", "spatial"] = "auto"
    config_list: list[dict[str, Any]] | None = None
    round_to: Count = 1
    minimum: Count = 1
    data_batches: int = Field(default=8, ge=0)

    @model_validator(mode="after")
    def _some(self) -> FactorizeStage:
        ranks = [
            name for name in ("target", "rank", "rank_ratio", "energy") if getattr(self, name) is not None
        ]
        if len(ranks) > 1:
            raise ValueError(f"{' and '.join(ranks)} exclude each other")
        if not ranks and self.config_list is None:
            raise ValueError("give a target, rank, rank_ratio, energy or config_list")
        return self


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


class OriginalStage(Stage):
    """Stands, unwritten, before the first stage of a recipe that does not begin with training: the model as it is."""

    kind: ClassVar[str] = "original"
    makes_model: ClassVar[bool] = True


STAGES: dict[str, type[Stage]] = {
    stage.kind: stage
    for stage in (
        TrainStage,
        PruneStage,
        FactorizeStage,
        FinetuneStage,
        QuantizeStage,
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
