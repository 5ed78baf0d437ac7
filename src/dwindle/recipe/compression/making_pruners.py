"""From what a recipe says of pruning to a pruner, with its schedule or the steps that it trains."""

from __future__ import annotations

from typing import Any

from torch import nn

from dwindle.config.errors import did_you_mean
from dwindle.pruning import (
    GroupSparsity,
    Pruner,
    ScheduledPruner,
    SparseGPTPruner,
    SynFlowPruner,
    TrainingPruner,
    TransformerHeadPruner,
)
from dwindle.pruning.heads import CRITERIA
from dwindle.pruning.named_pruners import PRUNERS, arguments_of, watches
from dwindle.recipe.compression.window import Made, Window
from dwindle.recipe.schema.compression import Pruning
from dwindle.training import CosineSchedule, CubicSchedule, LinearSchedule

__all__ = ["make_pruning"]

_RAMPS: dict[str, type[Any]] = {
    "linear": LinearSchedule,
    "cubic": CubicSchedule,
    "agp": CubicSchedule,
    "cosine": CosineSchedule,
}
_UPDATES = 20
"""How often masks are renewed on the way to the goal, where the recipe does not say."""


def make_pruning(said: Pruning, model: nn.Module, window: Window) -> Made:
    """Return the pruner that a recipe describes.

    A pruner that trains its masks gets the steps from ``start`` to ``stop``. One that ranks weights (or watches the
    training) goes under the schedule, if there is one; one that watches and has neither a schedule nor a ``stop``
    looks at the calibration data once, when it begins.

    Raises:
        ConfigError: An option is not known, or something that the method needs is missing.
    """
    if said.method == "group_sparsity":
        return _group_sparsity(said, model, window)
    kind = PRUNERS[said.method]
    _check_options(said, kind, window)
    if issubclass(kind, TrainingPruner):
        return _training(said, kind, model, window)
    options = dict(said.options)
    if kind in (TransformerHeadPruner, SynFlowPruner):
        window.materials.need_inputs(window.place, f"method {said.method!r}")
    observes = _observes(said, kind)
    if observes and said.schedule is None and window.length is not None and kind is not SparseGPTPruner:
        return _made(kind, said, model, window, training_steps=window.length, **options), "start"
    if observes and said.schedule is None:
        window.materials.need_calibration_data(
            window.place,
            f"method {said.method!r} without a 'stop' (until which it would watch the training)"
            if kind is not SparseGPTPruner
            else f"method {said.method!r}",
        )
        options |= {"data": window.materials.calibration_data, "batches": said.batches}
    if kind is SparseGPTPruner and said.schedule is not None:
        window.place.fail("schedule", "sparse_gpt changes weights too, once; it goes under no schedule")
    if not observes and said.batches is not None:
        window.place.fail("batches", f"method {said.method!r} looks at weights, not at data")
    pruner = _made(kind, said, model, window, **options)
    if said.schedule is None:
        if window.length is not None:
            window.place.fail("stop", f"method {said.method!r} masks at once; give a 'schedule' too")
        return pruner, "start"
    return _scheduled(said, pruner, window), "start"


def _observes(said: Pruning, kind: type[Pruner]) -> bool:
    if kind is TransformerHeadPruner:
        criterion = str(said.options.get("criterion", CRITERIA[0]))
        return not criterion.endswith("_weight")
    return watches(kind) or kind is SparseGPTPruner


def _made(kind: type[Pruner], said: Pruning, model: nn.Module, window: Window, **options: Any) -> Pruner:
    materials = window.materials
    if kind.__name__ == "RigLPruner":  # single connections, nothing is coupled
        return kind(model, said.config_list or [], **options)
    args, kwargs = (materials.args or None), (dict(materials.kwargs) or None)
    return kind(model, said.config_list or [], args, kwargs, **options)


def _training(said: Pruning, kind: type[Pruner], model: nn.Module, window: Window) -> Made:
    """Return a pruner whose masks come out of the training, until ``stop``."""
    steps = window.need_length("the masks stand")
    options = dict(said.options)
    if said.batches is not None:
        window.place.fail("batches", f"method {said.method!r} looks at the training, not at other data")
    if said.schedule is None:
        return _made(kind, said, model, window, training_steps=steps, **options), "start"
    if "schedule" not in arguments_of(kind):
        known = [name for name, own in PRUNERS.items() if "schedule" in arguments_of(own)]
        window.place.fail(
            "schedule",
            f"method {said.method!r} has a way of its own to its goal; of those that train, {', '.join(known)} take a "
            "schedule",
        )
    if said.interval is not None or said.values != "progress":
        key = "interval" if said.interval is not None else "values"
        window.place.fail(
            key, f"method {said.method!r} renews its masks at every step, by shares of its goal"
        )
    schedule = _RAMPS[said.schedule](0.0, 1.0, steps) if isinstance(said.schedule, str) else None
    if schedule is None:
        schedule = window.moving("schedule", said.schedule)
    return _made(kind, said, model, window, training_steps=steps, schedule=schedule, **options), "start"


def _scheduled(said: Pruning, pruner: Pruner, window: Window) -> ScheduledPruner:
    if isinstance(said.schedule, str):
        steps = window.need_length("the goal is reached")
        interval = said.interval or max(1, steps // _UPDATES)
        if interval > steps:
            window.place.fail("interval", f"{interval} steps are more than the {steps} from start to stop")
        # The last renewal at or before stop reaches the goal.
        schedule = _RAMPS[said.schedule](0.0, 1.0, interval * (steps // interval))
    else:
        schedule, interval = window.moving("schedule", said.schedule), said.interval or 1
        if window.length is not None:
            window.place.fail("stop", "a schedule in words says itself when it ends")
    return ScheduledPruner(pruner, schedule, interval, values=said.values)


def _check_options(said: Pruning, kind: type, window: Window) -> None:
    known = [name for name in arguments_of(kind) if name != "schedule"]
    for name in said.options:
        if name not in known:
            listed = f"its options are {', '.join(known)}" if known else "it has no options"
            window.place.fail(
                "options",
                f"method {said.method!r} has no option {name!r}; {listed}",
                did_you_mean(str(name), known),
            )


def _group_sparsity(said: Pruning, model: nn.Module, window: Window) -> Made:
    window.materials.need_inputs(window.place, "method 'group_sparsity'")
    _check_options(said, GroupSparsity, window)
    materials = window.materials
    options = {**said.options, "training_steps": window.length}
    return GroupSparsity(model, materials.args, dict(materials.kwargs) or None, **options), "start"
