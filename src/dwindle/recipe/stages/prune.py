"""Structured pruning: the small model is made, and proven, within the stage."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.pruning.named_importances import importance_of
from dwindle.recipe.context import StageContext
from dwindle.recipe.schema import PruneStage
from dwindle.training import adapt_normalization, seed_everything

__all__ = ["run_prune"]

_PRUNERS = {"l1": "L1NormPruner", "l2": "L2NormPruner", "fpgm": "FPGMPruner", "random": "RandomPruner"}


def run_prune(context: StageContext) -> dict[str, Any]:
    """Shrink the newest model; the record says what was cut and how it was proven."""
    stage = context.stage
    assert isinstance(stage, PruneStage)
    model = context.load_current()
    args, kwargs = context.data.example(2)
    seed_everything(context.own_seed)
    result = _shrink(context, stage, model, args, kwargs)
    repaired = {} if result.repair is None else {"repair": _repair_as_json(result.repair)}
    return {
        **repaired,
        **_adapted(context, stage, result.model),
        **context.keep_model(result.model),
        "cuts": [dict(cut) for cut in result.plan.cuts],
        "rewritten": bool(result.plan.rewritten),
        "proof": as_json(result.verification),
    }


def _adapted(context: StageContext, stage: PruneStage, model: nn.Module) -> dict[str, Any]:
    """Estimate statistics of normalizations anew, where that is wanted; return what it did."""
    if not stage.adapt_normalization:
        return {}
    batches = context.data.calibration_inputs(stage.adapt_normalization)
    report = adapt_normalization(model, batches, adapt=lambda inputs: inputs)
    return {"normalization": {"batches": report.batches, "moved": dict(report.moved)}}


def _repair_as_json(report: Any) -> dict[str, Any]:
    """What a repair did, without its layers."""
    names = ("accepted", "output_before", "output_after", "seconds", "notes")
    return {name: getattr(report, name) for name in names}


def _data(context: StageContext, stage: PruneStage) -> Any:
    """Batches for the importance of a stage; None when it looks at weights alone."""
    importance = importance_of(stage.importance)
    if not importance.needs_data:
        return None
    if not importance.needs_labels:
        return context.data.calibration_inputs(stage.data_batches)
    if not context.data.can_train:
        raise ConfigError(f"prune: importance {stage.importance!r} needs labelled training data")
    return list(itertools.islice(context.data.training_batches(context.own_seed), stage.data_batches))


def _shrink(
    context: StageContext, stage: PruneStage, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    from dwindle import realize

    if stage.config_list is None:
        options: dict[str, Any] = {"importance": stage.importance, "scope": stage.scope, **stage.options}
        if stage.target is not None:
            options["target"] = stage.target.model_dump(exclude_none=True)
        elif stage.ratio is not None:
            options["ratio"] = stage.ratio
        else:
            options.update(counts=stage.counts, blocks=stage.blocks)
        options["data"] = _data(context, stage)
        if stage.repair:
            options["repair"] = context.data.calibration_inputs(stage.data_batches)
        return realize.prune(model, args, example_kwargs=kwargs or None, **options)
    from dwindle import pruning

    pruner = getattr(pruning, _PRUNERS[stage.pruner])(
        model, stage.config_list, example_inputs=args, example_kwargs=kwargs or None
    )
    pruner.compress()
    return realize.realize(model, example_inputs=args, example_kwargs=kwargs or None, **stage.options)


def as_json(value: Any) -> Any:
    """Return plain JSON data of a value: its ``to_json``, its fields, or itself."""
    if hasattr(value, "to_json"):
        return as_json(value.to_json())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return as_json(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_json(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
