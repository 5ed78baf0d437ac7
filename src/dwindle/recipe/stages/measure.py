"""Measures the original and what became of it, side by side, and compares the runtimes' answers with torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dwindle.config.errors import ConfigError
from dwindle.recipe.context import StageContext
from dwindle.recipe.evaluation import agreement_of, predict
from dwindle.recipe.schema import MeasureStage
from dwindle.recipe.variant import Variant, load_predictions, load_variant

__all__ = ["run_measure"]

_FILE_ORDER = ("onnxruntime", "openvino", "safetensors")
"""Whose file counts as the bytes of a model: the ONNX file before all others."""


def run_measure(context: StageContext) -> dict[str, Any]:
    """Measure in every runtime of the recipe; times are taken once, here, and never again on a resumption."""
    from dwindle.measure import measure

    stage = context.stage
    assert isinstance(stage, MeasureStage)
    chosen = _chosen(context, stage)
    models = {variant.label: load_variant(variant, context.recipe.model) for variant in chosen}
    args, kwargs = context.data.example(max(stage.batch_size, 2))
    answers: list[Tensor] = []

    def ask(session: Callable[..., Any]) -> float:
        context.advance(len(answers), len(chosen) * len(stage.runtimes), f"asking {session.runtime.label}")  # type: ignore[attr-defined]
        predicted, targets = predict(session, context.data)
        answers.append(predicted)
        reference = targets if targets is not None else context.original_predictions
        return agreement_of(predicted, reference) if reference is not None else 0.0

    found = measure(
        models,
        args,
        kwargs or None,
        runtimes=stage.runtimes,
        accuracy=ask if stage.parity else None,
        batch=stage.batch_size,
        threads=stage.threads,
        warmup=stage.warmup,
        repeats=stage.repeats,
        max_seconds=stage.max_seconds,
        on_error="record",
    )
    # Answers were taken model by model and, within a model, runtime by runtime: the order of `accuracy`.
    keys = [(name, label) for name, entry in found.items() for label in entry.accuracy]
    by_key = dict(zip(keys, answers, strict=True))
    quantized = _quantized_labels(context)
    return {
        "batch_size": stage.batch_size,
        "threads": stage.threads,
        "models": {
            variant.label: _model_json(variant, found[variant.label], by_key, variant.label in quantized)
            for variant in chosen
        },
    }


def _chosen(context: StageContext, stage: MeasureStage) -> list[Variant]:
    """The models to measure: the original first, then those that changed it."""
    if context.original is None:
        raise ConfigError("there is no model to measure yet; put 'train' before 'measure'")
    after = [v for v in context.variants if v.label != context.original.label]
    # Before the original there may be stages that only led to it.
    started = context.variants.index(context.original)
    after = [v for v in after if context.variants.index(v) > started]
    if stage.compare is not None:
        after = [v for v in after if v.label in stage.compare]
    return [context.original, *after]


def _quantized_labels(context: StageContext) -> set[str]:
    return {variant.label for variant in context.variants if variant.kind == "quantize"}


def _model_json(
    variant: Variant, measurement: Any, answers: dict[tuple[str, str], Tensor], simulated: bool
) -> dict[str, Any]:
    """The figures of one model; parity is the share of answers equal to the model's own in torch."""
    own = load_predictions(variant)
    values = measurement.to_json()
    files = {name: size for name, size in values["bytes_on_disk"].items()}
    counted = next((name for name in _FILE_ORDER if name in files), None)
    runtimes: dict[str, Any] = {}
    for label, latency in values["latency"].items():
        runtimes[label] = {"latency": latency, "simulated": simulated and label == "torch"}
    for label in values["accuracy"]:
        entry = runtimes.setdefault(label, {"latency": None, "simulated": simulated and label == "torch"})
        entry["score"] = values["accuracy"][label]
        entry["parity"] = agreement_of(answers[variant.label, label], own)
        entry["different"] = int((answers[variant.label, label] != own).sum())
    return {
        "parameters": values["parameters"],
        "macs": round(measurement.macs_per_sample),
        "peak_activation_bytes": values["peak_activation_bytes"],
        "bytes": files.get(counted) if counted is not None else None,
        "bytes_of": counted,
        "files": files,
        "uncounted_operators": values["uncounted_operators"],
        "runtimes": runtimes,
        "failures": values["failures"],
    }
