"""The stage that finds the best model within a budget by itself."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import yaml
from torch import nn

from dwindle.recipe.context import StageContext
from dwindle.recipe.schema import AutoStage
from dwindle.search.auto import AutoResult, Training, auto
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
        candidate=stage.candidate,
        metric=stage.metric,
        validation=validation,
        max_drop=stage.max_drop,
        effort=stage.effort,
        trials=stage.trials,
        loss=nn.functional.cross_entropy if stage.labels else None,
        training=Training(
            stage.epochs,
            partial(_optimizer, stage),
            share=stage.share,
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
    return {
        **context.keep_model(result.model),
        "auto": found,
        "stages": result.stages(),
        "trials": _write_trials(context, stage, result),
    }


def _write_trials(context: StageContext, stage: AutoStage, result: AutoResult) -> list[dict[str, Any]]:
    """Write a recipe for each trial that was completed, which does it again alone; return what they gave."""
    found: list[dict[str, Any]] = []
    for trial in result.study.trials if result.study is not None else ():
        if not trial.feasible:
            continue
        place = f"trials/{trial.number:04d}.yaml"
        own = stage.model_copy(
            update={
                "candidate": dict(trial.attributes["candidate"]),
                "share": result.trial_share or 1.0,
                "minimize": None,
                "trials": None,
            }
        )
        recipe = _recipe_until(context, stage, own, f"{context.recipe.name}-trial-{trial.number}")
        path = context.directory / place
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
        found.append({"recipe": place, "score": trial.values["score"], "costs": dict(trial.costs)})
    return found


def _recipe_until(context: StageContext, stage: AutoStage, own: AutoStage, name: str) -> dict[str, Any]:
    """Return the recipe up to this stage, with another one in its place."""
    whole = context.recipe
    stages: list[dict[str, Any]] = []
    for other in whole.stages:
        chosen = own if other is stage else other
        if chosen is own or other.makes_model:
            stages.append({chosen.kind: chosen.model_dump(mode="json", exclude_defaults=True)})
        if chosen is own:
            break
    return {
        "name": name[:80],
        "seeds": [context.seed],
        "threads": whole.threads,
        "model": whole.model.model_dump(mode="json", exclude_defaults=True),
        "data": whole.data.model_dump(mode="json", exclude_defaults=True),
        "stages": stages,
    }


def _optimizer(stage: AutoStage, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    if stage.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, stage.learning_rate, momentum=0.9, weight_decay=stage.weight_decay, nesterov=True
        )
    return torch.optim.AdamW(parameters, stage.learning_rate, weight_decay=stage.weight_decay)
