"""Low-rank factorization: the small layers are made, and proven, within the stage."""

from __future__ import annotations

from typing import Any

from dwindle.recipe.context import StageContext
from dwindle.recipe.schema import FactorizeStage
from dwindle.recipe.stages.prune import as_json
from dwindle.training import seed_everything

__all__ = ["factorize_options", "run_factorize"]

_OWN = frozenset(("name", "target", "data_batches"))
"""Keys of the stage that are not arguments of ``dw.factorize`` as they are."""


def run_factorize(context: StageContext) -> dict[str, Any]:
    """Factorize the newest model; the record says which layers became what, and why the others stayed."""
    from dwindle import realize

    stage = context.stage
    assert isinstance(stage, FactorizeStage)
    model = context.load_current()
    args, kwargs = context.data.example(2)
    options = factorize_options(stage)
    if stage.data_batches:
        options["data"] = context.data.calibration_inputs(stage.data_batches)
    seed_everything(context.own_seed)
    result = realize.factorize(model, example_inputs=args, example_kwargs=kwargs or None, **options)
    return {**context.keep_model(result.model), "factorization": as_json(result.to_json())}


def factorize_options(stage: FactorizeStage) -> dict[str, Any]:
    """Return the keyword arguments of ``dw.factorize`` that a stage gives."""
    given = {name: getattr(stage, name) for name in type(stage).model_fields if name not in _OWN}
    options = {name: value for name, value in given.items() if value is not None}
    if stage.target is not None:
        options["target"] = stage.target.model_dump(exclude_none=True)
    return options
