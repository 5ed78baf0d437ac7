"""Does what a trial of an experiment proposes: prunes, makes it small, trains on, quantizes."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dwindle.compat.nni import v1, v2
from dwindle.compat.nni.speedup import ModelSpeedup
from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.measure import measure
from dwindle.training.checkpoint import random_state, restore_random_state
from dwindle.training.loop import seed_everything

__all__ = ["PRUNERS", "QUANTIZERS", "Materials", "compressed", "figures_of"]

PRUNERS: Mapping[str, type[Any]] = {
    "L1NormPruner": v2.L1NormPruner,
    "L2NormPruner": v2.L2NormPruner,
    "FPGMPruner": v2.FPGMPruner,
    "LevelPruner": v2.LevelPruner,
    "TaylorFOWeightPruner": v2.TaylorFOWeightPruner,
    "ActivationAPoZRankPruner": v2.ActivationAPoZRankPruner,
    "ActivationMeanRankPruner": v2.ActivationMeanRankPruner,
    "level": v1.LevelPruner,
    "slim": v1.SlimPruner,
    "l1": v1.L1FilterPruner,
    "l2": v1.L2FilterPruner,
    "fpgm": v1.FPGMPruner,
    "taylorfo": v1.TaylorFOWeightFilterPruner,
    "apoz": v1.ActivationAPoZRankFilterPruner,
    "mean_activation": v1.ActivationMeanRankFilterPruner,
}
QUANTIZERS: Mapping[str, type[Any]] = {
    "ObserverQuantizer": v2.ObserverQuantizer,
    "QAT_Quantizer": v2.QAT_Quantizer,
    "DoReFaQuantizer": v2.DoReFaQuantizer,
    "LsqQuantizer": v2.LsqQuantizer,
    "NaiveQuantizer": v2.NaiveQuantizer,
    "observer": v2.ObserverQuantizer,
    "qat": v2.QAT_Quantizer,
    "dorefa": v2.DoReFaQuantizer,
    "lsq": v2.LsqQuantizer,
    "naive": v2.NaiveQuantizer,
}
"""By the names of NNI 2.10 and by those of its automatic compression."""

Trainer = Callable[..., Any]


@dataclass
class Materials:
    """What the user gives an experiment.

    Attributes:
        model: The model; copied for each trial.
        evaluator: ``f(model)`` gives the metric.
        finetuner: ``f(model)`` trains a compressed model; None trains none.
        dummy_input: Example inputs; None leaves pruned models masked.
        trainer: ``f(model, optimizer, criterion)``, for pruners that watch a training.
        optimizer: Makes its optimizer: ``f(parameters)``.
        criterion: Its loss.
        runtime: Where latency is measured; None measures none.
    """

    model: nn.Module
    evaluator: Callable[[nn.Module], float]
    finetuner: Callable[[nn.Module], Any] | None = None
    dummy_input: Any = None
    trainer: Trainer | None = None
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None
    criterion: Callable[..., Any] | None = None
    runtime: str | None = None

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Positional example inputs."""
        given = self.dummy_input
        return tuple(given) if isinstance(given, tuple | list) else (given,)


@dataclass(frozen=True)
class Step:
    """An algorithm with its settings, as plain data.

    Attributes:
        name: In :data:`PRUNERS` or :data:`QUANTIZERS`.
        config_list: The config.
        arguments: Further arguments.
    """

    name: str
    config_list: Sequence[Mapping[str, Any]]
    arguments: Mapping[str, Any]


def compressed(materials: Materials, pruner: Step | None, quantizer: Step | None, seed: int = 0) -> nn.Module:
    """Return a compressed copy of the model, in evaluation mode.

    Args:
        materials: What there is.
        pruner: How it is pruned.
        quantizer: How it is quantized.
        seed: Every trial begins with the random generators seeded by it.

    Raises:
        ConfigError: A name or an argument does not fit.
    """
    state = random_state()
    seed_everything(seed)
    try:
        with warnings.catch_warnings():
            # What the modern form of a config is need not be said for each trial.
            warnings.filterwarnings("ignore", message="config_list has the form of NNI 2.x")
            warnings.filterwarnings("ignore", message="trainer, traced_optimizer and criterion")
            model = copy.deepcopy(materials.model)
            if pruner is not None:
                model = _pruned(materials, model, pruner)
                if materials.finetuner is not None:
                    materials.finetuner(model)
            if quantizer is not None:
                model = _quantized(materials, model, quantizer)
            return model.eval()
    finally:
        restore_random_state(state)


def _pruned(materials: Materials, model: nn.Module, step: Step) -> nn.Module:
    known = _class_of(PRUNERS, "pruner", step.name)
    given: dict[str, Any] = dict(step.arguments)
    accepted = inspect.signature(known.__init__).parameters
    open_ended = any(own.kind is own.VAR_KEYWORD for own in accepted.values())
    if given.get("mode") == "dependency_aware" or "dummy_input" in accepted:
        given.setdefault("dummy_input", materials.dummy_input)
    if open_ended or "trainer" in accepted:
        if materials.trainer is None or materials.optimizer is None:
            raise ConfigError(f"{step.name} watches a training: give trainer, optimizer and criterion")
        name = "traced_optimizer" if open_ended else "optimizer"
        training = {"trainer": materials.trainer, name: materials.optimizer(model.parameters())}
        given = {**training, "criterion": materials.criterion, **given}
    made = known(model, [dict(entry) for entry in step.config_list], **given)
    made.compress()
    if materials.dummy_input is None:
        return model
    return ModelSpeedup(model, materials.dummy_input).speedup_model()


def _quantized(materials: Materials, model: nn.Module, step: Step) -> nn.Module:
    known = _class_of(QUANTIZERS, "quantizer", step.name)
    arguments: dict[str, Any] = dict(step.arguments)
    config = [dict(entry) for entry in step.config_list]
    if known is v2.NaiveQuantizer:
        known(model, config).compress()
        return model
    if known is v2.ObserverQuantizer:
        made = known(model.eval(), config, **arguments)
        with torch.no_grad():
            materials.evaluator(model)
        made.compress()
    else:
        if materials.finetuner is None:
            raise ConfigError(f"{step.name} quantizes in training: give a finetuner")
        if known is v2.LsqQuantizer and materials.optimizer is not None:
            arguments.setdefault("optimizer", materials.optimizer(model.parameters()))
        if materials.dummy_input is not None:
            arguments.setdefault("dummy_input", materials.dummy_input)
        made = known(model, config, **arguments)
        made.compress()
        materials.finetuner(model)
    found: nn.Module = made.integer_model()
    return found


def _class_of(known: Mapping[str, type[Any]], what: str, name: str) -> type[Any]:
    if name not in known:
        raise ConfigError(
            f"there is no {what} {name!r}; known are {', '.join(known)}{did_you_mean(name, known)}"
        )
    return known[name]


def figures_of(materials: Materials, models: Mapping[str, nn.Module]) -> dict[str, dict[str, float]]:
    """Return ``metric``, ``params``, ``flops`` and ``latency`` of models that are measured side by side.

    Args:
        materials: What there is; without example inputs there is the metric alone.
        models: By name.
    """
    found: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        with torch.no_grad():
            metric = materials.evaluator(model.eval())
        found[name] = {"metric": float(metric["default"] if isinstance(metric, Mapping) else metric)}
    if materials.dummy_input is None:
        return found
    runtimes = [] if materials.runtime is None else [materials.runtime]
    measured = measure(dict(models), materials.inputs, runtimes=runtimes, latency=bool(runtimes), repeats=30)
    for name, own in measured.items():
        found[name] |= {"params": float(own.parameters), "flops": float(own.macs)}
        if runtimes:
            found[name]["latency"] = float(next(iter(own.latency.values())).p50)
    return found
