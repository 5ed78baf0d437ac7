"""Simulated annealing over the ratios of layers, and AutoCompress, as NNI 2.x has them: with masks, any pruner."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dwindle import pruning, simulate
from dwindle.compat.nni.evaluator import Evaluator
from dwindle.compat.nni.v2.compressor import ConfigList
from dwindle.compat.nni.v2.evaluator import judges, read_arguments
from dwindle.compat.nni.v2.iterative import Handles, IterativePruner
from dwindle.config import Target
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.pruning.plan import PruningPlan, with_ratios
from dwindle.realize import Round, prune_in_rounds, realize
from dwindle.search import SimulatedAnnealing
from dwindle.search.annealing import acceptance, first_ratios, perturbed
from dwindle.training import Rewinding
from dwindle.training.progress import tracked

Ratios = dict[str, float]


@dataclass(frozen=True)
class Allocation:
    """Layers that share a total.

    Attributes:
        sizes: Weights of each target.
        least: The smallest ratio of each: what is gone already.
        largest: The largest.
        total: The share of all weights that goes.
    """

    sizes: Mapping[str, int]
    least: Mapping[str, float]
    largest: Mapping[str, float]
    total: float

    def fitted(self, ratios: Mapping[str, float]) -> Ratios:
        """Return ratios in the same proportions, within their bounds, that meet the total (by bisection).

        Raises:
            ConfigError: The bounds do not allow it.
        """
        goal = self.total * sum(self.sizes.values())

        def at(factor: float) -> Ratios:
            return {
                name: min(max(ratio * factor, self.least[name]), self.largest[name])
                for name, ratio in moved.items()
            }

        def weights(found: Mapping[str, float]) -> float:
            return sum(self.sizes[name] * ratio for name, ratio in found.items())

        moved = {name: max(ratio, 1e-6) for name, ratio in ratios.items()}
        low, high = 0.0, 1e7
        if not weights(at(low)) <= goal + 1e-6 or not weights(at(high)) >= goal - 1e-6:
            raise ConfigError(f"a total sparsity of {self.total:.3f} is not within the bounds of the layers")
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if weights(at(middle)) < goal else (low, middle)
        return at(high)


def allocation_of(plan: PruningPlan, masks: Mapping[Target, Tensor] | None = None) -> Allocation:
    """Return the layers of a plan and what they may lose.

    Args:
        plan: The plan.
        masks: What is masked already.
    """
    sizes, least, largest, wanted = {}, {}, {}, 0.0
    for target, planned in plan.goals.items():
        name, size = str(target), planned.granularity.block_count(planned.shape) * planned.block_size
        sizes[name] = size
        wanted += size * (planned.setting.goal or 0.0)
        mask = (masks or {}).get(target)
        least[name] = 0.0 if mask is None else float((mask == 0).double().mean())
        bound = planned.setting.max_sparse_ratio
        largest[name] = max(0.99 if bound is None else bound, least[name])
    return Allocation(sizes, least, largest, wanted / max(sum(sizes.values()), 1))


def by_layer(plan: PruningPlan, ratios: Mapping[str, float]) -> PruningPlan:
    """Return a plan in which each target has its own ratio, and no ranking is shared.

    Args:
        plan: The plan.
        ratios: By the path of the target.
    """
    own = {Target.parse(name): ratio for name, ratio in ratios.items()}
    alone = {target: {"global_group_id": None, "max_sparse_ratio": None} for target in own}
    return with_ratios(plan, own, alone)


def annealed(
    allocation: Allocation, score: Callable[[Ratios], float], search: SimulatedAnnealing, description: str
) -> tuple[Ratios, float]:
    """Return the best ratios that annealing found, and their score.

    Args:
        allocation: The layers.
        score: Gives the score of ratios, higher is better.
        search: Temperatures, step and seed.
        description: For the progress bar.
    """
    chance = random.Random(search.seed)
    sizes, largest = dict(allocation.sizes), dict(allocation.largest)
    current = best = allocation.fitted(first_ratios(sizes, largest, chance))
    value = best_value = score(current)
    for temperature in tracked(search.temperatures(), description):
        step = search.perturbation_magnitude * temperature / search.start_temperature
        ratios = allocation.fitted(perturbed(current, largest, step, chance))
        found = score(ratios)
        if found > best_value:
            best, best_value = ratios, found
        if chance.random() < acceptance(value - found, temperature):
            current, value = ratios, found
    return best, best_value


class _MaskTrials:
    """Tries ratios by masking the model, and puts it back."""

    def __init__(self, owner: IterativePruner, handles: Handles, config_list: ConfigList) -> None:
        self.owner, self.handles, self.config_list = owner, handles, config_list
        self.masks = simulate.get_masks(owner.bound_model)
        self.masks = {target: mask.clone() for target, mask in self.masks.items()}
        optimizers = owner.evaluator.optimizers if owner.evaluator is not None else None
        single = optimizers if isinstance(optimizers, torch.optim.Optimizer) else None
        self.start = Rewinding(owner.bound_model, single)

    def masked(self, ratios: Mapping[str, float]) -> pruning.Pruner:
        """Mask the model by ratios of its targets; return the pruner."""
        model = self.owner.bound_model
        inner = self.handles.make(model, self.config_list)
        inner.plan = by_layer(inner.plan, ratios)
        self.handles.sparsify(model, inner, Round(0, 0))
        return inner

    def score(self, ratios: Mapping[str, float], *, train: bool) -> float:
        """Return the score of the masked (and trained) model; afterwards it is as before."""
        model = self.owner.bound_model
        inner = self.masked(ratios)
        try:
            if train:
                self.owner.finetune(model)
            value = self.owner.score(model)
        finally:
            inner.detach(keep_values=False)
            self.start.restore()
            simulate.attach_masks(model, [(target, mask, "mul", None) for target, mask in self.masks.items()])
        if value is None:
            raise ConfigError("the search needs an evaluation: evaluating_func of the evaluator")
        return value


class SimulatedAnnealingPruner(IterativePruner):
    """Searches the ratios of layers by simulated annealing, so that the total is as the config asks.

    Arguments: ``model, config_list, evaluator, start_temperature=100, stop_temperature=20, cool_down_rate=0.9,
    perturbation_magnitude=0.35, pruning_algorithm='level', pruning_params={}, log_dir='.',
    keep_intermediate_result=False, speedup=False``; with a function ``evaluator(model)`` the last ones are
    ``finetuner=None, speedup=False, dummy_input=None``. Temperatures are in units of the score.
    """

    def __init__(self, model: nn.Module, config_list: ConfigList, *args: Any, **kwargs: Any) -> None:
        head = [
            "evaluator",
            "start_temperature",
            "stop_temperature",
            "cool_down_rate",
            "perturbation_magnitude",
            "pruning_algorithm",
            "pruning_params",
            "log_dir",
            "keep_intermediate_result",
        ]
        given = read_arguments(
            [*head, "speedup"],
            [*head, "finetuner", "speedup", "dummy_input"],
            {
                "start_temperature": 100,
                "stop_temperature": 20,
                "cool_down_rate": 0.9,
                "perturbation_magnitude": 0.35,
                "pruning_algorithm": "level",
                "pruning_params": {},
                "log_dir": ".",
                "keep_intermediate_result": False,
                "finetuner": None,
                "speedup": False,
                "dummy_input": None,
            },
            args,
            kwargs,
        )
        super().__init__(
            model,
            config_list,
            **judges(given),
            log_dir=given["log_dir"],
            keep_intermediate_result=given["keep_intermediate_result"],
        )
        self.search = SimulatedAnnealing(
            start_temperature=given["start_temperature"],
            stop_temperature=given["stop_temperature"],
            cool_down_rate=given["cool_down_rate"],
            perturbation_magnitude=given["perturbation_magnitude"],
        )
        self.handles = Handles(given["pruning_algorithm"], given["pruning_params"], self.evaluator)
        self.speedup = given["speedup"]
        self.ratios: Ratios = {}

    def compress(self) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
        """Search, then mask (and train) the model by the best ratios."""
        self.handles.inputs = inputs = self.inputs("speedup") if self.speedup else None
        trials = _MaskTrials(self, self.handles, self.config_list)
        plan = self.handles.make(self.bound_model, self.config_list).plan
        self.ratios, _ = annealed(
            allocation_of(plan), lambda ratios: trials.score(ratios, train=True), self.search, "annealing"
        )
        trials.masked(self.ratios)
        model = self.bound_model
        if inputs is not None:
            model = realize(model, inputs).model
        self.finetune(model)
        masks = simulate.masks_as_nested(model)
        self.keep_masks(0, masks)
        self._best = ("best", model, masks, self.score(model), self.config_list)
        return model, masks


class AutoCompressPruner(IterativePruner):
    """In each round, ratios of layers by simulated annealing, then ADMM with these ratios, then shrinking.

    Liu et al., "AutoCompress" (https://arxiv.org/abs/1907.03141).

    Arguments: ``model, config_list, total_iteration, admm_params, sa_params, log_dir='.',
    keep_intermediate_result=False, evaluator=None, speedup=False``; 2.0 to 2.8 end with ``finetuner=None,
    speedup=False, dummy_input=None, evaluator=None``. ``admm_params`` are those of :class:`ADMMPruner`,
    ``sa_params`` those of :class:`SimulatedAnnealingPruner`.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        total_iteration: int,
        admm_params: Mapping[str, Any],
        sa_params: Mapping[str, Any],
        log_dir: str = ".",
        keep_intermediate_result: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        first = kwargs.get("evaluator", args[0] if args else None)
        modern = isinstance(first, Evaluator)
        names = ["evaluator", "speedup"] if modern else ["finetuner", "speedup", "dummy_input", "evaluator"]
        defaults = dict.fromkeys(names) | {"speedup": False}
        given = read_arguments(names, None, defaults, args, kwargs)
        annealing = dict(sa_params)
        scorer = annealing.pop("evaluator", None) or given["evaluator"]
        own = next((one for one in (given["evaluator"], scorer) if isinstance(one, Evaluator)), None)
        super().__init__(
            model,
            config_list,
            evaluator=own,
            finetuner=given.get("finetuner"),
            scorer=None if isinstance(scorer, Evaluator) else scorer,
            dummy_input=given.get("dummy_input"),
            log_dir=log_dir,
            keep_intermediate_result=keep_intermediate_result,
        )
        self.total_iteration, self.speedup = total_iteration, given["speedup"]
        self.try_by = Handles(
            annealing.pop("pruning_algorithm", "level"), annealing.pop("pruning_params", {}), own
        )
        for unused in ("log_dir", "keep_intermediate_result", "speedup", "finetuner", "dummy_input"):
            annealing.pop(unused, None)
        defaults = {"start_temperature": 100, "stop_temperature": 20}
        self.search = SimulatedAnnealing(**{**defaults, **annealing})
        self.handles = Handles("admm", dict(admm_params), own)

    def compress(self) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
        """Prune and train in ``total_iteration`` rounds."""
        optimizer = None
        if self.evaluator is not None and isinstance(self.evaluator.optimizers, torch.optim.Optimizer):
            optimizer = self.evaluator.optimizers
        self.handles.inputs = self.inputs("speedup") if self.speedup else None
        result = prune_in_rounds(
            self.bound_model,
            self.config_list,
            self.handles.make,
            rounds=self.total_iteration,
            train=lambda model, at: self.finetune(model),
            schedule="geometric",
            sparsify=self._allocate,
            shrink=self.speedup,
            optimizer=optimizer,
            **({"example_inputs": self.handles.inputs} if self.speedup else {}),  # type: ignore[arg-type]
        )
        masks = result.masks
        self.keep_masks(self.total_iteration, masks)
        self._best = (self.total_iteration, result.model, masks, self.score(result.model), self.config_list)
        return result.model, masks

    def _allocate(self, model: nn.Module, inner: pruning.Pruner, at: Round) -> None:
        """Share the round's total among the layers, then prune by it."""
        if model is not self.bound_model:
            raise DwindleError("the model was replaced between the rounds")
        allocation = allocation_of(inner.plan, masks=simulate.get_masks(model))
        trials = _MaskTrials(self, self.try_by, self.config_list)
        ratios, _ = annealed(
            allocation,
            lambda found: trials.score(found, train=False),
            self.search,
            f"annealing, round {at.number} of {at.rounds}",
        )
        inner.plan = by_layer(inner.plan, ratios)
        self.handles.sparsify(model, inner, at)
