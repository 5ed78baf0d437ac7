"""The exact Pareto frontier of cost and harm, by dynamic programming.

A partial choice that costs no less and harms no less than another can never be part of a better whole, because what
is added later is the same for both. So one variable after another is added, and only what is not dominated is kept:
the result is the frontier of all choices, without looking at all of them.

For the best choice within one limit, partial choices are also dropped that cannot lead to it: those whose harm, with
what the rest must add at least (a Lagrangian bound), is above that of a choice which is known already. The known ones
are the corners of the frontier's convex hull, which a sort finds.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dwindle.config.errors import ConfigError
from dwindle.quantization.mixed_precision.allocation import Allocation, Assignment

MOST_POINTS = 2_000_000
"""A frontier of more points is given up: integer programming needs no frontier."""


@dataclass(frozen=True)
class Option:
    """Bits of some variables together.

    Attributes:
        cost: What they cost.
        harm: What they harm.
        bits: Bits by variable: ``(is_activation, number) -> bits``.
    """

    cost: int
    harm: float
    bits: dict[tuple[bool, int], int]


class Frontier:
    """All choices that nothing dominates, by rising cost and falling harm.

    Args:
        groups: Options of each group of variables; one of each group is chosen.
        limit: Keep only what can be the best choice within this cost.

    Attributes:
        cost: int64, rising.
        harm: float64, falling.

    Raises:
        ConfigError: There are too many points.
    """

    def __init__(self, groups: Sequence[Sequence[Option]], limit: int | None = None) -> None:
        self.groups = [undominated(options) for options in groups]
        self._steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        self.cost: NDArray[np.int64] = np.zeros(1, dtype=np.int64)
        self.harm: NDArray[np.float64] = np.zeros(1)
        bound = None if limit is None else _Bound(self.groups, limit)
        for number, options in enumerate(self.groups):
            self._add(options, number, bound)

    def _add(self, options: Sequence[Option], number: int, bound: _Bound | None) -> None:
        cost = np.concatenate([self.cost + option.cost for option in options])
        harm = np.concatenate([self.harm + option.harm for option in options])
        order = np.lexsort((harm, cost))
        least = np.minimum.accumulate(harm[order])
        kept = order[np.concatenate([[True], harm[order][1:] < least[:-1]])]
        if bound is not None:
            kept = kept[bound.allows(cost[kept], harm[kept], number + 1)]
        if len(kept) > MOST_POINTS:
            raise ConfigError(f"the Pareto frontier has more than {MOST_POINTS} points; use solver='integer'")
        self._steps.append((kept % len(self.cost), kept // len(self.cost)))
        self.cost, self.harm = cost[kept], harm[kept]

    def best_within(self, limit: int) -> int:
        """Return the number of the point with the least harm that costs at most ``limit``.

        Raises:
            ConfigError: There is none.
        """
        if len(self.cost) == 0:
            raise ConfigError(f"nothing costs at most {limit}")
        position = int(np.searchsorted(self.cost, limit, side="right")) - 1
        if position < 0:
            raise ConfigError(f"nothing costs at most {limit}; the cheapest costs {int(self.cost[0])}")
        return position

    def bits(self, position: int) -> dict[tuple[bool, int], int]:
        """Return the bits of all variables at a point."""
        found: dict[tuple[bool, int], int] = {}
        for (before, chosen), options in zip(reversed(self._steps), reversed(self.groups), strict=True):
            found.update(options[int(chosen[position])].bits)
            position = int(before[position])
        return found


class _Bound:
    """Says which partial choices may still become the best within a limit."""

    def __init__(self, groups: Sequence[Sequence[Option]], limit: int) -> None:
        corners = supported(groups)
        fitting = [own for own in corners if own[0] <= limit]
        self._known = fitting[-1][1] if fitting else np.inf
        beyond = corners[len(fitting)] if fitting and len(fitting) < len(corners) else None
        # The price of cost at the limit: the slope of the hull there.
        self._price = 0.0
        if beyond is not None:
            self._price = (fitting[-1][1] - beyond[1]) / (beyond[0] - fitting[-1][0])
        priced = [min(own.harm + self._price * own.cost for own in options) for options in groups]
        cheapest = [min(own.cost for own in options) for options in groups]
        self._rest = [sum(priced[number:]) for number in range(len(groups) + 1)]
        self._least = [sum(cheapest[number:]) for number in range(len(groups) + 1)]
        self._limit = limit

    def allows(self, cost: NDArray[np.int64], harm: NDArray[np.float64], number: int) -> NDArray[np.bool_]:
        """Say it for choices of the first ``number`` groups."""
        reachable = cost + self._least[number] <= self._limit
        lowest = harm + self._rest[number] - self._price * (self._limit - cost)
        slack = 1e-9 * (abs(self._known) + self._price * self._limit) if np.isfinite(self._known) else np.inf
        return reachable & (lowest <= self._known + slack)


def supported(groups: Sequence[Sequence[Option]]) -> list[tuple[int, float]]:
    """Return the corners of the frontier's convex hull, cost and harm, by rising cost.

    Each group's hull is walked in steps of falling gain a cost; all groups' steps, sorted by that, walk the whole hull.
    """
    cost, harm = 0, 0.0
    steps: list[tuple[float, int, int, int, float]] = []
    for number, options in enumerate(groups):
        hull = _hull(undominated(options))
        cost, harm = cost + hull[0].cost, harm + hull[0].harm
        for place, (before, after) in enumerate(itertools.pairwise(hull)):
            more, less = after.cost - before.cost, before.harm - after.harm
            steps.append((-less / more, number, place, more, less))
    found = [(cost, harm)]
    for _, _, _, more, less in sorted(steps):
        found.append((found[-1][0] + more, found[-1][1] - less))
    return found


def _hull(options: Sequence[Option]) -> list[Option]:
    """Return the lower convex hull of options that do not dominate each other."""
    kept: list[Option] = []
    for option in options:
        while len(kept) > 1 and _is_above(kept[-2], kept[-1], option):
            kept.pop()
        kept.append(option)
    return kept


def _is_above(left: Option, middle: Option, right: Option) -> bool:
    """Say whether the middle lies on or above the line between its neighbours."""
    first = (left.harm - middle.harm) * (right.cost - middle.cost)
    return first <= (middle.harm - right.harm) * (middle.cost - left.cost)


def undominated(options: Sequence[Option]) -> list[Option]:
    """Return the options that none other dominates, by rising cost and falling harm."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda own: (own.cost, own.harm)):
        if not kept or option.harm < kept[-1].harm:
            kept.append(option)
    return kept


def groups_of(problem: Allocation) -> list[list[Option]]:
    """Return the options of a problem in groups of which one each is chosen, independently.

    Variables that do not meet in any layer are groups of their own. Where weights meet in an activation they are not
    independent, but they are once its bits are fixed: the frontier of such a component is the union over its
    activations' bits of frontiers of single weights.
    """
    return [
        options
        for weights, activations in problem.components()
        for options in _groups(problem, weights, activations)
    ]


def _groups(problem: Allocation, weights: list[int], activations: list[int]) -> list[list[Option]]:
    fixed = all(len(problem.activations[own].choices) == 1 for own in activations)
    if fixed or problem.cost == "size":  # nothing that is chosen of one changes the cost of another
        alone = [_activation_options(problem, own) for own in activations]
        bits = {own: max(problem.activations[own].choices) for own in activations}
        return [*(_weight_options(problem, own, bits) for own in weights), *alone]
    found: list[Option] = []
    for chosen in itertools.product(*(problem.activations[own].choices for own in activations)):
        bits = dict(zip(activations, chosen, strict=True))
        inner = Frontier([_weight_options(problem, own, bits) for own in weights])
        harm = sum(problem.activations[own].harm[number] for own, number in bits.items())
        own_bits = {(True, own): number for own, number in bits.items()}
        found += [
            Option(int(inner.cost[point]), float(inner.harm[point]) + harm, {**inner.bits(point), **own_bits})
            for point in range(len(inner.cost))
        ]
    return [found]


def _activation_options(problem: Allocation, own: int) -> list[Option]:
    return [Option(0, harm, {(True, own): bits}) for bits, harm in problem.activations[own].harm.items()]


def _weight_options(problem: Allocation, own: int, activations: dict[int, int]) -> list[Option]:
    reads = [activations.get(number, 0) for number in range(len(problem.activations))]
    terms = [term for term in problem.terms if term.weight == own]
    return [
        Option(sum(problem.term_cost(term, bits, reads) for term in terms), harm, {(False, own): bits})
        for bits, harm in problem.weights[own].harm.items()
    ]


def assignment_of(problem: Allocation, bits: dict[tuple[bool, int], int]) -> Assignment:
    """Return bits by variable as an assignment."""
    return (
        tuple(bits[False, own] for own in range(len(problem.weights))),
        tuple(bits[True, own] for own in range(len(problem.activations))),
    )


__all__ = ["Frontier", "Option", "assignment_of", "groups_of", "supported", "undominated"]
