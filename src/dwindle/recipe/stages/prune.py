"""Structured pruning: the small model is made, and proven, within the stage."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from dwindle.recipe.context import StageContext
from dwindle.recipe.schema import PruneStage
from dwindle.training import seed_everything

__all__ = ["run_prune"]

_PRUNERS = {"l1": "L1NormPruner", "l2": "L2NormPruner", "fpgm": "FPGMPruner", "random": "RandomPruner"}


def run_prune(context: StageContext) -> dict[str, Any]:
    """Shrink the newest model; the record says what was cut and how it was proven."""
    stage = context.stage
    assert isinstance(stage, PruneStage)
    model = context.load_current()
    args, kwargs = context.data.example(2)
    seed_everything(context.own_seed)
    result = _shrink(stage, model, args, kwargs)
    return {
        **context.keep_model(result.model),
        "cuts": [dict(cut) for cut in result.plan.cuts],
        "rewritten": bool(result.plan.rewritten),
        "proof": as_json(result.verification),
    }


def _shrink(stage: PruneStage, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from dwindle import realize

    if stage.config_list is None:
        options: dict[str, Any] = {"importance": stage.importance, "scope": stage.scope, **stage.options}
        if stage.target is not None:
            options["target"] = stage.target.model_dump(exclude_none=True)
        else:
            options["ratio"] = stage.ratio
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
