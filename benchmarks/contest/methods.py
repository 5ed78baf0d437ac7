"""dwindle's pruners, each as one function from a trained model to a pruned and fine-tuned one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

import dwindle as dw
from contest.tasks import Task
from dwindle import pruning
from dwindle.measure.macs import count_macs
from dwindle.realize.repair import repair

#: How near the MACs of a pruned model must come to the goal, as a share of the whole model's.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Method:
    """One way to prune.

    Attributes:
        name: What it is called.
        tool: ``dwindle``, ``torch-pruning`` or ``nncf``.
        kind: ``structured`` (the ratio is the share of MACs that goes) or ``unstructured`` (of weights).
        run: ``run(task, model, ratio, seed)`` prunes and fine-tunes a model of its own; returns the final model and the
            accuracy before fine-tuning (None where pruning and training are one).
        tasks: Names of the tasks it can do; None is all.
    """

    name: str
    tool: Literal["dwindle", "torch-pruning", "nncf"]
    kind: Literal["structured", "unstructured"]
    run: Callable[[Task, nn.Module, float, int], tuple[nn.Module, float | None]]
    tasks: tuple[str, ...] | None = None


def one_shot(
    name: str,
    importance: Any,
    scope: str,
    *,
    needs_data: bool = False,
    repaired: bool = False,
    tasks: tuple[str, ...] | None = None,
    **options: Any,
) -> Method:
    """``dw.prune`` to a share of the MACs, then fine-tuning."""

    def run(task: Task, model: nn.Module, ratio: float, seed: int) -> tuple[nn.Module, float | None]:
        torch.manual_seed(seed)  # of the random importance
        original = copy.deepcopy(model) if repaired else model
        chosen = importance() if callable(importance) else importance
        result = dw.prune(
            model, task.examples, target={"macs": 1 - ratio}, importance=chosen, scope=scope, largest_ratio=0.95,
            data=task.calibration if needs_data else None, **task.prunable["prune"], **options,
        )  # fmt: skip
        if repaired:
            repair(result, original, task.calibration)
        before = task.accuracy(result.model)
        return task.tune(result.model, seed), before

    return Method(name, "dwindle", "structured", run, tasks)


def sparse_first() -> Method:
    """Half of the budget with DepGraph's regularizer, then the group norm, then the other half."""

    def run(task: Task, model: nn.Module, ratio: float, seed: int) -> tuple[nn.Module, float | None]:
        first = max(1, task.tuning // 2)
        regularizer = pruning.GroupSparsity(model, task.examples, strength=1e-3)
        task.tune(model, seed, [regularizer], epochs=first)
        result = dw.prune(
            model, task.examples, target={"macs": 1 - ratio}, importance="group_norm", scope="global",
            largest_ratio=0.95, **task.prunable["prune"],
        )  # fmt: skip
        before = task.accuracy(result.model)
        return task.tune(result.model, seed + 1, epochs=max(1, task.tuning - first)), before

    return Method("group sparsity, then group norm", "dwindle", "structured", run)


def macs_share(model: nn.Module, task: Task, whole: float) -> float:
    """MACs as a share of the whole model's."""
    return count_macs(model, task.examples) / whole


def in_config(task: Task, ratio: float, **more: Any) -> list[dict[str, Any]]:
    """The task's config_list with a ratio."""
    return [{**entry, "sparse_ratio": ratio, **more} for entry in task.prunable["config"]]


def local_ratio(task: Task, model: nn.Module, ratio: float) -> float:
    """Return the ratio of every layer at which the MACs shrink as wanted; counts do not depend on the criterion."""
    whole = count_macs(model, task.examples)
    low, high, best = 0.0, 0.98, (2.0, 0.5)
    for _ in range(9):
        middle = (low + high) / 2
        own = copy.deepcopy(model)
        pruning.L1NormPruner(own, in_config(task, middle), task.examples).compress()
        small = dw.realize(own, example_inputs=task.examples, verify=False).model
        share = macs_share(small, task, whole)
        best = min(best, (abs(share - (1 - ratio)), middle))
        low, high = (middle, high) if share > 1 - ratio else (low, middle)
    return best[1]


def config_pruner(
    name: str, make: Callable[..., pruning.Pruner], tasks: tuple[str, ...] | None = None, **options: Any
) -> Method:
    """A pruner class with a config_list and coupled axes, then real surgery with proof, then fine-tuning."""

    def run(task: Task, model: nn.Module, ratio: float, seed: int) -> tuple[nn.Module, float | None]:
        torch.manual_seed(seed)
        config = in_config(task, local_ratio(task, model, ratio))
        make(
            model, config, task.examples, **{key: _given(value, task) for key, value in options.items()}
        ).compress()
        result = dw.realize(model, example_inputs=task.examples)
        before = task.accuracy(result.model)
        return task.tune(result.model, seed), before

    return Method(name, "dwindle", "structured", run, tasks)


def _given(value: Any, task: Task) -> Any:
    return value(task) if callable(value) else value


def slimming() -> Method:
    """Network slimming: half of the budget with the L1 penalty on scales, then surgery and the other half."""

    def run(task: Task, model: nn.Module, ratio: float, seed: int) -> tuple[nn.Module, float | None]:
        first = max(1, task.tuning // 2)
        level = local_ratio(task, model, ratio)
        config = [{"op_types": ["BatchNorm2d"], "sparse_ratio": level}]
        pruner = pruning.SlimPruner(
            model, config, task.examples, training_steps=first * task.batches, regular_scale=1e-4
        )
        task.tune(model, seed, [pruner], epochs=first)
        result = dw.realize(model, example_inputs=task.examples, masks=pruner.masks or None)
        before = task.accuracy(result.model)
        return task.tune(result.model, seed + 1, epochs=max(1, task.tuning - first)), before

    return Method("SlimPruner", "dwindle", "structured", run, ("digits", "fashion"))


# Unstructured.


def weights_config(ratio: float, *, together: bool = False) -> list[dict[str, Any]]:
    """All weights of convolutions and linear layers, each by itself or ranked together."""
    entry: dict[str, Any] = {
        "op_types": ["Conv2d", "Linear"],
        "sparse_ratio": ratio,
        "granularity": "element",
    }
    return [{**entry, "global_group_id": 1}] if together else [entry]


def masked(name: str, make: Callable[..., Any], *, together: bool = False, **options: Any) -> Method:
    """One-shot masks, then fine-tuning under them."""

    def run(task: Task, model: nn.Module, ratio: float, seed: int) -> tuple[nn.Module, float | None]:
        given = {key: _given(value, task) for key, value in options.items()}
        pruner = make(model, weights_config(ratio, together=together), **given)
        pruner.compress()
        before = task.accuracy(model)
        task.tune(model, seed, [pruner])
        return model, before

    return Method(name, "dwindle", "unstructured", run)


def trained_masks(name: str, make: Callable[[Task, nn.Module, float, int], Any]) -> Method:
    """Masks that move during the fine-tuning."""

    def run(task: Task, model: nn.Module, ratio: float, seed: int) -> tuple[nn.Module, float | None]:
        task.tune(model, seed, [make(task, model, ratio, task.tuning * task.batches)])
        return model, None

    return Method(name, "dwindle", "unstructured", run)


def gradual(
    make: Callable[..., pruning.Pruner], *, together: bool
) -> Callable[[Task, nn.Module, float, int], Any]:
    """A pruner under the cubic schedule over the first half of the budget."""

    def build(task: Task, model: nn.Module, ratio: float, steps: int) -> Any:
        times = max(2, min(50, steps // 4))
        pruner = make(model, weights_config(ratio, together=together))
        return pruning.AGPPruner(pruner, max(1, steps // 2 // times), times)

    return build


def sparsity(model: nn.Module) -> float:
    """Share of zeros in the weights of convolutions and linear layers."""
    weights = [
        module.weight.detach() for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    return sum(int((own == 0).sum()) for own in weights) / sum(own.numel() for own in weights)


def _data(task: Task) -> Any:
    return task.calibration


def _inputs(task: Task) -> Any:
    return task.examples


def structured_methods() -> list[Method]:
    """Every structured pruner of dwindle."""
    images = ("digits", "fashion")  # of what hardly differs the slow task shows one
    found = [one_shot("random, local", "random", "local")]
    for name in ("l1", "l2", "fpgm", "group_norm"):
        found.append(one_shot(f"{name}, local", name, "local"))
        found.append(one_shot(f"{name}, global", name, "global", tasks=images))
    found += [
        one_shot(f"{name}, local", name, "local", needs_data=True, tasks=images)
        for name in ("taylor", "outputs")
    ]
    for name in ("taylor", "fisher", "hessian", "outputs", "activation"):
        found.append(one_shot(f"{name}, global", name, "global", needs_data=True))
    found += [
        one_shot("l1, local, repaired", "l1", "local", repaired=True),
        one_shot("l1, global, repaired", "l1", "global", repaired=True, tasks=images),
        one_shot("group_norm, global, repaired", "group_norm", "global", repaired=True, tasks=images),
        one_shot("outputs, global, repaired", "outputs", "global", needs_data=True, repaired=True),
        one_shot("hessian, global, repaired", "hessian", "global", needs_data=True, repaired=True),
    ]
    found += [sparse_first(), slimming()]
    found += [
        config_pruner("L1NormPruner", pruning.L1NormPruner),
        config_pruner("FPGMPruner", pruning.FPGMPruner),
        config_pruner("ActivationAPoZRankPruner", pruning.ActivationAPoZRankPruner, data=_data),
        config_pruner("ActivationMeanRankPruner", pruning.ActivationMeanRankPruner, data=_data),
        config_pruner("TaylorPruner, gates", pruning.TaylorPruner, data=_data, on="gates"),
        config_pruner("HRankPruner", pruning.HRankPruner, tasks=images, data=_data),
        config_pruner("CHIPPruner", pruning.CHIPPruner, tasks=images, data=_data, samples=128),
    ]
    return found


def unstructured_methods() -> list[Method]:
    """Every unstructured pruner of dwindle."""
    magnitude = pruning.MagnitudePruner
    return [
        masked("LevelPruner", pruning.LevelPruner),
        masked("LevelPruner, global", pruning.LevelPruner, together=True),
        masked("MagnitudePruner, global", magnitude, together=True),
        masked("TaylorPruner, weights, global", pruning.TaylorPruner, together=True, data=_data),
        masked("OBDPruner, global", pruning.OBDPruner, together=True, data=_data),
        masked("SNIPPruner", pruning.SNIPPruner, together=True, data=_data),
        masked("SynFlowPruner", pruning.SynFlowPruner, together=True, example_inputs=_inputs),
        masked("WandaPruner", pruning.WandaPruner, data=_data),
        masked("SparseGPTPruner", pruning.SparseGPTPruner, data=_data),
        trained_masks("LevelPruner, gradual", gradual(pruning.LevelPruner, together=False)),
        trained_masks("MagnitudePruner, global, gradual", gradual(magnitude, together=True)),
        trained_masks(
            "MovementPruner",
            lambda task, model, ratio, steps: pruning.MovementPruner(
                model, weights_config(ratio, together=True), training_steps=steps * 3 // 4, learning_rate=1e-2
            ),
        ),
        trained_masks(
            "RBPruner",
            lambda task, model, ratio, steps: pruning.RBPruner(
                model, weights_config(ratio, together=True), training_steps=steps // 2
            ),
        ),
        trained_masks(
            "L0Pruner",
            lambda task, model, ratio, steps: pruning.L0Pruner(
                model, weights_config(ratio, together=True), training_steps=steps // 2
            ),
        ),
        trained_masks(
            "ADMMPruner",
            lambda task, model, ratio, steps: pruning.ADMMPruner(
                model, weights_config(ratio), training_steps=steps // 2, interval_steps=max(1, steps // 20)
            ),
        ),
        trained_masks(
            "RigLPruner",
            lambda task, model, ratio, steps: pruning.RigLPruner(
                model,
                weights_config(ratio),
                training_steps=steps,
                interval_steps=max(1, steps // 20),
                start="magnitude",
            ),
        ),
    ]
