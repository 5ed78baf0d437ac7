"""One budget for many layers: which rank each gets so that the least is lost in all.

Each layer offers choices with a cost and a loss; one is taken of each (a multiple-choice knapsack). Lagrange's
multiplier gives a first answer and a bound below every answer; what the bound does not exclude is then searched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dwindle.config.errors import ConfigError

__all__ = ["Choices", "Chosen", "allocate"]

_Numbers = np.ndarray

#: At most so many partial answers are made at once.
_PAIRS = 200_000


@dataclass(frozen=True)
class Choices:
    """What one layer may become.

    Attributes:
        costs: Of each choice, ``[choices]``.
        losses: Of each choice, ``[choices]``.
    """

    costs: _Numbers
    losses: _Numbers

    def frontier(self) -> _Numbers:
        """Return the numbers of the choices that no cheaper one equals in loss, from the cheapest on."""
        order = np.lexsort((self.losses, self.costs))
        least = np.minimum.accumulate(self.losses[order])
        better = np.ones(len(order), dtype=bool)
        better[1:] = self.losses[order][1:] < least[:-1]
        found: _Numbers = order[better]
        return found


@dataclass(frozen=True)
class Chosen:
    """An answer.

    Attributes:
        choices: The number of the choice of each layer.
        cost: Of all.
        loss: Of all.
        bound: No answer loses less than this.
    """

    choices: tuple[int, ...]
    cost: float
    loss: float
    bound: float


def allocate(layers: Sequence[Choices], budget: float, *, states: int = 20_000) -> Chosen:
    """Return the choices with the least loss whose cost is within the budget.

    Args:
        layers: What each layer may become.
        budget: For all of them.
        states: The exact search keeps at most so many partial answers; the answer is exact while that is enough (its
            ``loss`` and ``bound`` say how far it can be off otherwise).

    Raises:
        ConfigError: Even the cheapest choices cost more.
    """
    numbers = [layer.frontier() for layer in layers]
    costs = [layer.costs[own].astype(np.float64) for layer, own in zip(layers, numbers, strict=True)]
    losses = [layer.losses[own].astype(np.float64) for layer, own in zip(layers, numbers, strict=True)]
    least = sum(float(own[0]) for own in costs)
    if least > budget * (1 + 1e-12):
        raise ConfigError(f"the budget {budget:g} cannot be met; the cheapest choices cost {least:g}")
    multiplier, picks, bound = _lagrange(costs, losses, budget)
    picks = _filled(costs, losses, picks, budget)
    picks = _searched(costs, losses, picks, multiplier, budget, states)
    cost = sum(float(own[pick]) for own, pick in zip(costs, picks, strict=True))
    loss = sum(float(own[pick]) for own, pick in zip(losses, picks, strict=True))
    return Chosen(
        tuple(int(own[pick]) for own, pick in zip(numbers, picks, strict=True)), cost, loss, min(bound, loss)
    )


def _lagrange(
    costs: Sequence[_Numbers], losses: Sequence[_Numbers], budget: float
) -> tuple[float, list[int], float]:
    """Return the best multiplier found by bisection, its choices within the budget, and the bound."""

    def at(multiplier: float) -> tuple[list[int], float, float]:
        picks = [int((loss + multiplier * cost).argmin()) for cost, loss in zip(costs, losses, strict=True)]
        cost = sum(float(own[pick]) for own, pick in zip(costs, picks, strict=True))
        loss = sum(float(own[pick]) for own, pick in zip(losses, picks, strict=True))
        return picks, cost, loss + multiplier * (cost - budget)

    free, cost, bound = at(0.0)
    if cost <= budget:
        return 0.0, free, bound
    low, high = 0.0, 1.0 / max(max(float(own.max()) for own in costs), 1e-300)
    while at(high)[1] > budget and high < 1e300:
        low, high = high, high * 4
    best, multiplier = bound, high
    for _ in range(100):
        middle = (low + high) / 2
        _, cost, own_bound = at(middle)
        if own_bound > best:
            best, multiplier = own_bound, middle
        if cost > budget:
            low = middle
        else:
            high = middle
    return multiplier, at(high)[0], best


def _filled(
    costs: Sequence[_Numbers], losses: Sequence[_Numbers], picks: list[int], budget: float
) -> list[int]:
    """Spend what is left: take again and again the step that saves most loss for its cost."""
    picks = list(picks)
    rest = budget - sum(float(own[pick]) for own, pick in zip(costs, picks, strict=True))
    while True:
        best, found = 0.0, None
        for layer, pick in enumerate(picks):
            extra = costs[layer][pick + 1 :] - costs[layer][pick]
            saved = losses[layer][pick] - losses[layer][pick + 1 :]
            fits = extra <= rest
            if not bool(fits.any()):
                continue
            rates = np.where(fits, saved / np.maximum(extra, 1e-300), 0.0)
            step = int(rates.argmax())
            if rates[step] > best:
                best, found = float(rates[step]), (layer, pick + 1 + step)
        if found is None:
            return picks
        layer, pick = found
        rest -= float(costs[layer][pick] - costs[layer][picks[layer]])
        picks[layer] = pick


def _searched(
    costs: Sequence[_Numbers],
    losses: Sequence[_Numbers],
    picks: list[int],
    multiplier: float,
    budget: float,
    states: int,
) -> list[int]:
    """Improve an answer by going through all that the bound does not exclude, layer by layer.

    A partial answer is dropped when another one costs and loses no more, or when even the multiplier's bound for the
    layers that follow makes it no better than the best answer known.
    """
    known = sum(float(own[pick]) for own, pick in zip(losses, picks, strict=True))
    reduced = [loss + multiplier * cost for cost, loss in zip(costs, losses, strict=True)]
    least = np.array([float(own.min()) for own in reduced])
    cheapest = np.array([float(own[0]) for own in costs])
    rest_bound = np.concatenate([least[::-1].cumsum()[::-1][1:], [0.0]])
    rest_cost = np.concatenate([cheapest[::-1].cumsum()[::-1][1:], [0.0]])
    spent, lost = np.zeros(1), np.zeros(1)
    trail: list[tuple[_Numbers, _Numbers]] = []
    slack = 1e-12 * max(known, 1e-300)
    for layer, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
        own = loss + multiplier * cost
        reach = lost + multiplier * spent
        limit = known - slack + multiplier * budget - rest_bound[layer]
        useful = own <= limit - reach.min()
        if not bool(useful.any()):
            return picks
        choice = np.flatnonzero(useful)
        room = max(1, _PAIRS // len(choice))
        if len(spent) > room:
            best = np.sort(np.argpartition(reach, room)[:room])
            back, spent, lost = trail.pop(), spent[best], lost[best]
            trail.append((back[0][best], back[1][best]))
        new_spent = (spent[:, None] + cost[choice]).ravel()
        new_lost = (lost[:, None] + loss[choice]).ravel()
        parent = np.repeat(np.arange(len(spent)), len(choice))
        taken = np.tile(choice, len(spent))
        stay = (new_lost + multiplier * new_spent <= limit) & (
            new_spent + rest_cost[layer] <= budget * (1 + 1e-12)
        )
        new_spent, new_lost, parent, taken = (item[stay] for item in (new_spent, new_lost, parent, taken))
        if not len(new_spent):
            return picks  # nothing is better than what is known
        kept = Choices(new_spent, new_lost).frontier()
        if len(kept) > states:
            reached = new_lost[kept] + multiplier * new_spent[kept]
            kept = kept[np.sort(np.argpartition(reached, states)[:states])]
        spent, lost = new_spent[kept], new_lost[kept]
        trail.append((parent[kept], taken[kept]))
    state = int(lost.argmin())
    if float(lost[state]) >= known:
        return picks
    found: list[int] = []
    for parents, taken in reversed(trail):
        found.append(int(taken[state]))
        state = int(parents[state])
    return found[::-1]
