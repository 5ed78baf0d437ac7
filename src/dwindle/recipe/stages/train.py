"""Training, fine-tuning with distillation, and taking a model as it is."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.distillation import Distiller
from dwindle.quantization import Bits, QuantizationStages, TrainingQuantizer
from dwindle.quantization.aware_training import finished
from dwindle.realize.from_run import realize_run
from dwindle.recipe.compression import Materials, make_compressors
from dwindle.recipe.context import StageContext
from dwindle.recipe.evaluation import evaluate
from dwindle.recipe.model_source import load_model
from dwindle.recipe.reader import Reader
from dwindle.recipe.schema import Distillation, FinetuneStage, QuantizationInTraining, TrainStage
from dwindle.recipe.schema.compression import DistillationAlgorithm, Factorization, Pruning
from dwindle.recipe.variant import load_variant
from dwindle.training import EarlyStop, EpochRecord, TrainingOptions, fit, seed_everything

__all__ = ["run_finetune", "run_original", "run_train"]


def run_original(context: StageContext) -> dict[str, Any]:
    """Take the recipe's model as it is: the start of a recipe that does not train."""
    seed_everything(context.own_seed)
    model = load_model(context.recipe.model.name, context.recipe.model.arguments)
    return context.keep_model(model)


def run_train(context: StageContext) -> dict[str, Any]:
    """Train the newest model, or a new one when this is the first stage."""
    stage = context.stage
    assert isinstance(stage, TrainStage)
    seed_everything(context.own_seed)
    if context.current is None:
        model = load_model(context.recipe.model.name, context.recipe.model.arguments)
    else:
        model = context.load_current()
    record = _fit(context, stage, model, (), 1.0)
    return {**context.keep_model(model), **record}


def run_finetune(context: StageContext) -> dict[str, Any]:
    """Train the newest model on, with distillation from the original one where the recipe says so."""
    stage = context.stage
    assert isinstance(stage, FinetuneStage)
    if context.current is None or context.original is None:
        raise ConfigError("there is no model to fine-tune yet; put 'train' before 'finetune'")
    model = context.load_current()
    compressors: list[Any] = []
    task_weight = 1.0
    answers = context.directory / "teacher"
    if stage.distillation is not None:
        compressors.append(_distiller(context, model, stage.distillation, answers))
        task_weight = 1.0 - stage.distillation.weight
    if stage.quantization is not None:
        compressors.append(training_quantizer(context, model, stage.quantization))
    if stage.compression:
        task_weight = stage.task_weight
        compressors += algorithms_of(context, stage, model)
    record = _fit(context, stage, model, compressors, task_weight)
    if any(isinstance(own, Pruning | Factorization) for own in stage.compression):
        model = _realized(context, model, compressors)
    shutil.rmtree(answers, ignore_errors=True)
    return {**context.keep_model(finished(model)), **record}


def _realized(context: StageContext, model: nn.Module, compressors: Sequence[Any]) -> nn.Module:
    """Return the model without what was masked, and with chains of smaller layers where ranks were learned."""
    args, kwargs = context.data.example(2)
    options: dict[str, Any] = {}
    for compressor in compressors:
        for key, own in getattr(compressor, "realize_options", dict)().items():
            options[key] = [*options.get(key, []), *own]
    small: nn.Module = realize_run(model, args, example_kwargs=kwargs, **options).model
    return small


def _distiller(context: StageContext, model: nn.Module, wanted: Distillation, answers: Path) -> Distiller:
    """Return the distiller of a stage; a killed run finds what the teacher said before in ``answers``."""
    assert context.original is not None
    args, kwargs = context.data.example(2)
    teacher = "ema" if wanted.teacher == "ema" else load_variant(context.original, context.recipe.model)
    return Distiller(
        model,
        wanted.config_list,
        teacher=teacher,
        temperature=wanted.temperature,
        logits_weight=wanted.weight,
        logits_loss=wanted.loss,
        logits_options=wanted.options,
        example_inputs=(args or kwargs) if wanted.config_list else None,
        ema_decay=wanted.ema_decay,
        cache=answers if wanted.cache else None,
        seed=context.own_seed,
    )


def algorithms_of(context: StageContext, stage: FinetuneStage, model: nn.Module) -> list[Any]:
    """Return the compressors of the stage's list; what needs a teacher learns from the original."""
    args, kwargs = context.data.example(2)
    teacher = None
    if any(isinstance(own, DistillationAlgorithm) and own.teacher == "given" for own in stage.compression):
        assert context.original is not None
        teacher = load_variant(context.original, context.recipe.model)
    loader = context.data.training_batches(context.own_seed, stage.batch_size)
    per_epoch = len(loader) if isinstance(loader, Sized) else None
    materials = Materials(
        args,
        kwargs,
        context.data.training_batches(context.own_seed, stage.batch_size),
        teacher,
        steps_per_epoch=per_epoch,
        training_steps=None if per_epoch is None else per_epoch * stage.epochs,
    )
    position = context.recipe.stages.index(stage)
    reader = Reader(context.recipe.name)
    return make_compressors(
        stage.compression, model, materials, reader, ("stages", position, stage.kind, "compression")
    )


def training_quantizer(
    context: StageContext, model: nn.Module, wanted: QuantizationInTraining
) -> TrainingQuantizer:
    """Return the compressor that rounds while a model trains."""
    args, _ = context.data.example(2)
    stages = QuantizationStages(
        weights=wanted.start_weights,
        activations=wanted.start_activations,
        freeze_ranges=wanted.freeze_ranges,
        freeze_normalization=wanted.freeze_normalization,
    )
    return TrainingQuantizer(
        model,
        wanted.config_list,
        calibration_data=context.data.calibration_inputs(wanted.calibration_batches),
        method=wanted.method,
        bits=Bits(wanted.weight_bits, wanted.activation_bits, wanted.end_bits),
        stages=stages,
        backend=wanted.backend,
        example_inputs=args or None,
        max_batches=wanted.calibration_batches,
        avoid_saturation=wanted.avoid_saturation,
    )


def _fit(
    context: StageContext,
    stage: TrainStage,
    model: nn.Module,
    compressors: Sequence[Any],
    task_weight: float,
) -> dict[str, Any]:
    """Train ``model`` in place; return its epochs, and why it stopped early if it did."""
    loader = context.data.training_batches(context.own_seed, stage.batch_size)
    optimizer = _optimizer(stage, model)
    options = TrainingOptions(
        precision=stage.precision,
        channels_last=stage.channels_last,
        clip_norm=stage.clip_norm,
        task_weight=task_weight,
        compressor_rate=stage.compressor_rate if isinstance(stage, FinetuneStage) else 1.0,
        adapt_normalization=stage.adapt_normalization,
        seed=context.own_seed,
        progress=False,
    )
    result = fit(
        model,
        loader,
        optimizer,
        epochs=stage.epochs,
        loss=_loss(stage),
        schedule=_schedule(stage, optimizer, loader),
        compressors=compressors,
        evaluate=_evaluator(context, stage),
        early_stop=None if stage.early_stop is None else EarlyStop(**stage.early_stop.model_dump()),
        options=options,
        checkpoint=context.directory / "checkpoint.safetensors",
        description=stage.label,
    )
    (context.directory / "checkpoint.safetensors").unlink(missing_ok=True)
    stopped = {} if result.stopped is None else {"stopped": result.stopped}
    return {"curve": [_epoch_json(record) for record in result.history], **stopped}


def _evaluator(context: StageContext, stage: TrainStage) -> Callable[[nn.Module], float]:
    """Return a function that evaluates after an epoch (or gives NaN when this epoch is not its turn)."""
    checkpoint = context.directory / "checkpoint.safetensors"
    epoch = _epochs_in(checkpoint)

    def evaluate_epoch(model: nn.Module) -> float:
        nonlocal epoch
        epoch += 1
        value = math.nan
        if epoch == stage.epochs or epoch % stage.evaluate_every == 0:
            evaluation, _ = evaluate(model, context.data, context.original_predictions)
            found = evaluation.accuracy if evaluation.accuracy is not None else evaluation.agreement
            value = math.nan if found is None else found
        text = f"epoch {epoch} of {stage.epochs}" + ("" if math.isnan(value) else f", {value:.2%}")
        context.advance(epoch, stage.epochs, text)
        return value

    return evaluate_epoch


def _epochs_in(checkpoint: Any) -> int:
    """How many epochs a killed run had finished."""
    from dwindle.training import load_state

    return len(load_state(checkpoint)["history"]) if checkpoint.is_file() else 0


def _optimizer(stage: TrainStage, model: nn.Module) -> torch.optim.Optimizer:
    rate, decay = stage.learning_rate, stage.weight_decay
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if stage.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=rate, momentum=stage.momentum, weight_decay=decay, nesterov=stage.momentum > 0
        )
    kind = torch.optim.AdamW if stage.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=rate, weight_decay=decay)


def _schedule(stage: TrainStage, optimizer: torch.optim.Optimizer, loader: Iterable[Any]) -> Any:
    """Return the learning rate schedule, stepped after every batch."""
    if stage.schedule == "constant" or stage.epochs == 0:
        return None
    if not isinstance(loader, Sized):
        raise ConfigError(
            f"schedule {stage.schedule!r} needs training data with a length; use 'constant', or give the loader "
            "a __len__"
        )
    steps = max(len(loader) * stage.epochs, 1)
    if stage.schedule == "one_cycle":
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=stage.learning_rate,
            total_steps=steps,
            pct_start=stage.warmup,
            cycle_momentum=False,
        )
    if stage.schedule == "linear":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1.0 - step / steps, 0.0))
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1.0 + math.cos(math.pi * min(step / steps, 1.0)))
    )


def _loss(stage: TrainStage) -> Callable[[Tensor, Tensor], Tensor]:
    def cross_entropy(outputs: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, target, label_smoothing=stage.label_smoothing)

    return cross_entropy


def _epoch_json(record: EpochRecord) -> dict[str, Any]:
    metric = record.metric if record.metric is not None and math.isfinite(record.metric) else None
    return {
        "epoch": record.epoch,
        "loss": record.loss,
        "metric": metric,
        "learning_rate": record.learning_rate,
        "seconds": round(record.seconds, 4),
    }
