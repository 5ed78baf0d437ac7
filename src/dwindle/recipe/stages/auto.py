"""The stage that finds the best model within a budget by itself."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from dwindle.recipe.context import StageContext
from dwindle.recipe.schema import AutoStage
from dwindle.search.auto import Training, auto
from dwindle.training import seed_everything

__all__ = ["run_auto"]


def run_auto(context: StageContext) -> dict[str, Any]:
    """Search the best model within the stage's budget; the record says what was done, for a recipe of its own."""
    stage = context.stage
    assert isinstance(stage, AutoStage)
    model = context.load_current()
    seed_everything(context.own_seed)
    train, validation = context.data.with_validation(
        stage.validation, context.own_seed, labelled=stage.labels or stage.metric == "accuracy"
    )
    args, kwargs = context.data.example(stage.batch_size)
    result = auto(
        model,
        train,
        budget=stage.budget,
        minimize=stage.minimize,
        metric=stage.metric,
        validation=validation,
        max_drop=stage.max_drop,
        effort=stage.effort,
        trials=stage.trials,
        loss=nn.functional.cross_entropy if stage.labels else None,
        training=Training(
            stage.epochs,
            partial(_optimizer, stage),
            teacher_weight=stage.teacher_weight,
            temperature=stage.temperature,
        ),
        methods=stage.methods,
        example_inputs=args or None,
        example_kwargs=kwargs or None,
        ignore=stage.ignore,
        axes=stage.axes,
        storage=context.directory / "trials.db",
        threads=stage.threads,
        seed=context.own_seed,
        progress=False,
    )
    found = result.to_json()
    del found["study"]
    return {**context.keep_model(result.model), "auto": found, "stages": result.stages()}


def _optimizer(stage: AutoStage, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    if stage.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, stage.learning_rate, momentum=0.9, weight_decay=stage.weight_decay, nesterov=True
        )
    return torch.optim.AdamW(parameters, stage.learning_rate, weight_decay=stage.weight_decay)
