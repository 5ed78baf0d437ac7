"""Post-training quantization with the data's calibration batches."""

from __future__ import annotations

from typing import Any

from dwindle.recipe.context import StageContext
from dwindle.recipe.schema import QuantizeStage
from dwindle.training import seed_everything

__all__ = ["run_quantize"]


def run_quantize(context: StageContext) -> dict[str, Any]:
    """Quantize the newest model; the record's evaluation is that of the simulation in torch."""
    from dwindle import quantization

    stage = context.stage
    assert isinstance(stage, QuantizeStage)
    model = context.load_current()
    calibration = context.data.calibration_inputs(stage.calibration_batches)
    args, _ = context.data.example(2)
    options: dict[str, Any] = {"preset": stage.preset, **stage.options}
    if stage.backend is not None:
        options["backend"] = stage.backend
    if stage.config_list is not None:
        options["config_list"] = stage.config_list
    seed_everything(context.own_seed)
    quantized = quantization.quantize(model, calibration, example_inputs=args or None, **options)
    samples = sum(_samples(batch) for batch in calibration)
    return {**context.keep_model(quantized), "calibration_samples": samples}


def _samples(batch: Any) -> int:
    values = list(batch.values()) if isinstance(batch, dict) else list(batch)
    return len(values[0]) if values else 0
