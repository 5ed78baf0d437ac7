"""Post-training quantization with the data's calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.recipe.context import StageContext
from dwindle.recipe.schema import LearnedRounding, QuantizeStage
from dwindle.recipe.stages.prune import as_json
from dwindle.training import logits_of, seed_everything

__all__ = ["quantize_options", "run_quantize"]

_OWN = frozenset(("name", "calibration_batches", "worst_layers", "max_drop"))
"""Keys of the stage that are not arguments of ``dw.quantize`` by the same name."""

REPORT_BATCHES = 4
"""Calibration batches on which the layers are compared with the float model."""


def run_quantize(context: StageContext) -> dict[str, Any]:
    """Quantize the newest model; the record's evaluation is that of the simulation in torch."""
    from dwindle import quantization

    stage = context.stage
    assert isinstance(stage, QuantizeStage)
    model = context.load_current()
    calibration = context.data.calibration_inputs(stage.calibration_batches)
    args, _ = context.data.example(2)
    options = quantize_options(stage)
    if stage.max_drop is not None:
        options.update(evaluate=_agreement_with(model, calibration), max_drop=stage.max_drop)
    seed_everything(context.own_seed)
    quantized = quantization.quantize(model, calibration, example_inputs=args or None, **options)
    report = quantization.quantization_report(model, quantized, calibration, max_batches=REPORT_BATCHES)
    return {
        **context.keep_model(quantized),
        "calibration_samples": sum(_samples(batch) for batch in calibration),
        "quantization": as_json(report.to_json(worst=stage.worst_layers)),
    }


def quantize_options(stage: QuantizeStage) -> dict[str, Any]:
    """Return the keyword arguments of ``dw.quantize`` that a stage gives."""
    from dwindle.quantization import Reconstruction

    given = {name: getattr(stage, name) for name in type(stage).model_fields if name not in _OWN}
    options = {name: value for name, value in given.items() if value is not None}
    if isinstance(stage.rounding, LearnedRounding):
        options["rounding"] = Reconstruction(**stage.rounding.model_dump())
    return options


def _agreement_with(model: nn.Module, batches: Sequence[Any]) -> Callable[[nn.Module], float]:
    """Return a function that says how often a model answers as another one does."""

    def answers(own: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            outputs = [own(**batch) if isinstance(batch, dict) else own(*batch) for batch in batches]
        return [logits_of(output).argmax(-1) for output in outputs]

    expected = answers(model.eval())

    def agreement(own: nn.Module) -> float:
        equal = [(got == wanted).flatten() for got, wanted in zip(answers(own), expected, strict=True)]
        return float(torch.cat(equal).double().mean())

    return agreement


def _samples(batch: Any) -> int:
    values = list(batch.values()) if isinstance(batch, dict) else list(batch)
    return len(values[0]) if values else 0
