"""From measured drops to ratios for pruners, bits for quantizers and ranks for ``dw.factorize``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
from torch import nn

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.factorization.allocation import Choices, allocate
from dwindle.factorization.ranks import LayerProblem
from dwindle.graph.counts import Counts
from dwindle.pruning.sparsity import share_of
from dwindle.quantization.mixed_precision.allocation import REFERENCE_BITS, Allocation, Assignment, Variable
from dwindle.quantization.mixed_precision.choose import best_assignment, result_of
from dwindle.quantization.mixed_precision.policies import Posed, check_policy, pose
from dwindle.quantization.mixed_precision.result import MixedPrecision
from dwindle.search.cost import CountedCost
from dwindle.search.problem import Problem
from dwindle.search.sensitivities.factorized import FactorizedLayers
from dwindle.search.sensitivities.points import SensitivityPoint
from dwindle.search.sensitivities.pruned import Maker, PrunedAxes, makers_of
from dwindle.search.sensitivities.rounded import RoundedLayers
from dwindle.search.sensitivity import fitted, ratio_at_drop
from dwindle.search.space import Space
from dwindle.search.trial import Point

__all__ = ["bits_for", "counts_for", "goal_of", "prune_entries", "rank_entries", "rising_drops"]

Measured = Mapping[str, Sequence[SensitivityPoint]]
"""Points of each target, the mildest first."""


def goal_of(
    drop: float | None, budget: Mapping[str, float] | None, costs: Sequence[str]
) -> tuple[str, float | None]:
    """Return the name of a budget's cost, and its number; ``("drop", None)`` where a drop is given.

    Raises:
        ConfigError: Not exactly one of both is given, or it does not fit.
    """
    if (drop is None) == (budget is None):
        raise ConfigError("give exactly one of drop and budget")
    if drop is not None:
        if not drop >= 0:
            raise ConfigError(f"drop: {drop!r} is not a number from 0 on")
        return "drop", None
    assert budget is not None
    if len(budget) != 1:
        raise ConfigError(f"budget: give exactly one of {', '.join(costs)}, got {sorted(budget)}")
    ((name, number),) = budget.items()
    if name not in costs:
        raise ConfigError(f"budget: {name!r} is not one of {', '.join(costs)}{did_you_mean(name, costs)}")
    top = REFERENCE_BITS if name == "mean_bits" else 1
    if isinstance(number, bool) or not 0 < number <= top:
        raise ConfigError(f"budget: {name} = {number!r} is not above 0 and up to {top}")
    return name, float(number)


def rising_drops(points: Sequence[SensitivityPoint]) -> list[float]:
    """Return the drops at rising compression: none below 0, none below a milder level's."""
    return list(accumulate((max(point.drop, 0.0) for point in points), max))


# pruning


def counts_for(
    subject: PrunedAxes, measured: Measured, drop: float | None, cost: str, share: float | None
) -> Counts:
    """Return how many indices of each axis stay.

    Args:
        subject: The axes.
        measured: Their points.
        drop: What each may cost; None where there is a budget.
        cost: ``macs``, ``params`` or ``bytes``.
        share: What of it may stay. The drop that is the same for all and meets it is found by bisection.

    Raises:
        ConfigError: The measured ratios do not reach the budget.
    """
    curves = _curves(subject, measured)
    problem = subject.problem
    if drop is not None:
        ratios = {}
        for variable in problem.space.variables:
            reach = ratio_at_drop(curves.get(variable.name, [(0.0, 0.0)]), drop, variable.largest_ratio)
            ratios[variable.name] = share_of(variable.size, reach) / variable.size
        return problem.space.counts(ratios)
    assert share is not None
    own = _limited(problem, set(curves), cost, share)
    tops = {name: curve[-1][0] for name, curve in curves.items()}
    least = own.cost.predicted(own.space.counts(tops))
    if least > own.limit:
        raise ConfigError(
            f"budget: {cost} = {share:g} is not reached at the ratios that were measured, which leave "
            f"{least / own.cost.predicted({}):.3g}; measure larger ratios, more axes, or with a larger stop_drop"
        )
    return fitted(own, curves)


def _curves(subject: PrunedAxes, measured: Measured) -> dict[str, list[Point]]:
    """Return ratio and negative drop of each variable that was measured, from ratio 0 on."""
    curves: dict[str, list[Point]] = {}
    for name, points in measured.items():
        drops = [-own for own in rising_drops(points)]
        curve = [(0.0, 0.0), *zip([point.level for point in points], drops, strict=True)]
        if not math.isfinite(curve[-1][1]):
            curve = [point for point in curve if math.isfinite(point[1])]
        curves.update({variable.name: curve for variable in subject.units[name]})
    return curves


def _limited(problem: Problem, names: set[str], cost: str, share: float) -> Problem:
    """Return the problem of the named variables under a budget."""
    counted = CountedCost(cost, problem.analysis)
    own = problem.limited(share * counted.predicted({}))
    own.cost = counted
    kept = [variable for variable in problem.space.variables if variable.name in names]
    own.space = Space(kept, problem.space.solver, problem.space.round_to)
    return own


def prune_entries(model: nn.Module, space: Space, counts: Counts) -> list[dict[str, Any]]:
    """Return the config_list of a pruner (with example inputs) that leaves these counts.

    Args:
        model: The model.
        space: Its axes.
        counts: How many indices stay; axes that are missing stay whole.
    """
    ratios: dict[Maker, float] = {}
    for variable in space.variables:
        gone = 1 - counts.get(variable.axis, variable.size) / variable.size
        for maker in makers_of(model, variable):
            # A weight on several axes (a fused projection) has one ratio: the smallest, so that none loses too much.
            ratios[maker] = min(gone, ratios.get(maker, 1.0))
    grouped: dict[tuple[str, float], list[str]] = {}
    for maker, ratio in ratios.items():
        if ratio > 0:
            grouped.setdefault((maker.parameter, ratio), []).append(maker.module)
    return [
        {"op_names": modules, "target_names": [name], "sparse_ratio": ratio}
        for (name, ratio), modules in grouped.items()
    ]


# quantization


def bits_for(
    subject: RoundedLayers,
    measured: Measured,
    drop: float | None,
    cost: str,
    number: float | None,
    activations: str | int,
) -> MixedPrecision:
    """Return the bits of every layer.

    Args:
        subject: The layers.
        measured: Their points.
        drop: What each may cost: the fewest bits within it; None where there is a budget.
        cost: ``mean_bits``, ``size`` or ``bit_operations``.
        number: Bits of a weight in the mean, or the share of the cost of everything in 8 bits. Of all choices within
            it that of the least sum of drops is taken, exactly.
        activations: ``"strict"``, ``"liberal"`` or a number.

    Raises:
        ConfigError: The measured bits do not reach the budget, or there is no such policy.
    """
    check_policy(activations)
    if activations == "sensitive":
        raise ConfigError(
            "activations: drops of inputs alone were not measured; give 'strict', 'liberal' or a number"
        )
    harms = []
    for layer in subject.structure.layers:
        known = _harms(measured.get(layer.name, ()), subject.bits) if layer.is_free else {layer.bits: 0.0}
        harms.append(known)
    counted = "bit_operations" if cost == "bit_operations" else "size"
    every = sorted({own for known in harms for own in known})
    posed = pose(subject.structure, every, activations, counted, harms)
    posed = _allowed(posed, harms)
    if drop is not None:
        return result_of(posed, _within(posed, harms, drop), None)
    assert number is not None
    ratio = REFERENCE_BITS / number if cost == "mean_bits" else 1 / number
    return result_of(posed, best_assignment(posed, posed.problem.limit(ratio)), None)


def _harms(points: Sequence[SensitivityPoint], bits: Sequence[int]) -> dict[int, float]:
    """Return the drop at each number of bits that was measured and did not fail; at least one."""
    drops = zip(points, rising_drops(points), strict=True)
    return {point.detail[0]: own for point, own in drops if math.isfinite(own)} or {max(bits): 0.0}


def _allowed(posed: Posed, harms: Sequence[Mapping[int, float]]) -> Posed:
    """Return the problem with the bits alone that were measured for all layers of a variable (early stop)."""
    variables = []
    for number, variable in enumerate(posed.problem.weights):
        own = [known for known, place in zip(harms, posed.layer_of, strict=True) if place == number]
        common = [bits for bits in variable.choices if all(bits in known for known in own)]
        # Where no number is common (one layer failed where another was not measured), the most bits are safe.
        harm = {bits: variable.harm[bits] for bits in common} or {max(variable.choices): 0.0}
        variables.append(Variable(variable.name, harm))
    problem = posed.problem
    return replace(
        posed, problem=Allocation(tuple(variables), problem.activations, problem.terms, problem.cost)
    )


def _within(posed: Posed, harms: Sequence[Mapping[int, float]], drop: float) -> Assignment:
    """Return the fewest bits at which no layer alone loses more; the most bits where every number does."""
    weights = []
    for number, variable in enumerate(posed.problem.weights):
        own = [known for known, place in zip(harms, posed.layer_of, strict=True) if place == number]
        fitting = [bits for bits in variable.choices if all(known.get(bits, 0.0) <= drop for known in own)]
        weights.append(min(fitting, default=max(variable.choices)))
    return tuple(weights), posed.problem.cheapest[1]


# factorization


def rank_entries(
    subject: FactorizedLayers, measured: Measured, drop: float | None, cost: str, share: float | None
) -> list[dict[str, Any]]:
    """Return the config_list of ``dw.factorize``; layers that are not in it stay whole.

    Args:
        subject: The layers.
        measured: Their points.
        drop: What each may cost: the cheapest ranks within it; None where there is a budget.
        cost: ``macs`` or ``params``.
        share: What of the whole model's may stay; of all measured ranks those of the least sum of drops are taken.

    Raises:
        ConfigError: The measured ranks do not reach the budget.
    """
    unit = "macs" if drop is not None else cost
    tables = {
        name: _table(subject.problems[subject.modules[name]], points, unit, drop)
        for name, points in measured.items()
    }
    if drop is not None:
        picks = {name: int(table.costs.argmin()) for name, (table, _) in tables.items()}
    else:
        assert share is not None
        whole = sum(float(table.costs[-1]) for table, _ in tables.values())
        budget = share * subject.total[cost] - (subject.total[cost] - whole)
        least = sum(float(table.costs.min()) for table, _ in tables.values())
        if least > budget:
            reached = (subject.total[cost] - whole + least) / subject.total[cost]
            raise ConfigError(
                f"budget: {cost} = {share:g} is not reached at the ranks that were measured, which leave "
                f"{reached:.3g}; measure smaller ranks, more layers, or with a larger stop_drop"
            )
        found = allocate([table for table, _ in tables.values()], budget)
        picks = dict(zip(tables, found.choices, strict=True))
    entries = []
    for name, (_, ranks) in tables.items():
        if picks[name] < len(ranks):
            own = ranks[picks[name]]
            module = subject.modules[name]
            method = subject.problems[module].method
            entries.append(
                {"op_names": [module], "method": method, "rank": own[0] if len(own) == 1 else list(own)}
            )
    return entries


def _table(
    problem: LayerProblem, points: Sequence[SensitivityPoint], unit: str, drop: float | None
) -> tuple[Choices, list[tuple[int, ...]]]:
    """Return what a layer may become, the whole layer last, and the ranks of all but that."""
    whole = problem.whole_cost(unit)
    costs, losses, ranks = [], [], []
    for point, own in zip(points, rising_drops(points), strict=True):
        price = problem.cost(point.detail, unit)
        if math.isfinite(own) and price < whole and (drop is None or own <= drop):
            costs.append(price)
            losses.append(own)
            ranks.append(point.detail)
    return Choices(np.array([*costs, whole]), np.array([*losses, 0.0])), ranks
