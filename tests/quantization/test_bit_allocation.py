"""The choice of bits as numbers: both solvers against all choices there are."""

from __future__ import annotations

import itertools
import random

import pytest

from dwindle.config.errors import ConfigError
from dwindle.quantization.mixed_precision import integer_program
from dwindle.quantization.mixed_precision.allocation import Allocation, Term, Variable
from dwindle.quantization.mixed_precision.pareto import (
    Frontier,
    Option,
    assignment_of,
    groups_of,
    supported,
    undominated,
)


def random_problem(seed: int, cost: str, *, free_activations: bool, shared: bool) -> Allocation:
    """A few layers; some share a weight, some read the same value; harms span many orders of magnitude."""
    chance = random.Random(seed)
    bits = [2, 4, 8] if seed % 2 else [2, 3, 5, 8]

    def harm() -> dict[int, float]:
        scale = 10 ** chance.uniform(-6, 2)
        return {own: scale * chance.uniform(0.5, 1.0) * 4.0**-own for own in bits}

    weights = tuple(Variable(f"w{number}", harm()) for number in range(3))
    given = {0: 0.0} if not seed % 3 else {6: 0.0}
    activations = tuple(
        Variable(f"a{number}", harm() if free_activations else given) for number in range(2 if shared else 3)
    )
    terms = [
        Term(number, {number % len(activations): chance.randrange(1, 1000)}, chance.randrange(1, 500))
        for number in range(3)
    ]
    if shared:
        terms.append(Term(0, {0: chance.randrange(1, 1000), 1: chance.randrange(1, 1000)}, 7))
    return Allocation(weights, activations, tuple(terms), cost)


@pytest.mark.parametrize("cost", ["bit_operations", "size"])
@pytest.mark.parametrize("free_activations", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_both_solvers_find_the_best_of_all(cost: str, free_activations: bool, shared: bool) -> None:
    for seed in range(3):
        problem = random_problem(seed, cost, free_activations=free_activations, shared=shared)
        every = [(problem.cost_of(own), problem.harm_of(own)) for own in problem.all_assignments()]
        costs = sorted({cost for cost, _ in every})
        for limit in (costs[0], costs[len(costs) // 3], costs[len(costs) // 2], costs[-1]):
            best = min(harm for cost, harm in every if cost <= limit)
            frontier = Frontier(groups_of(problem), limit)
            found = assignment_of(problem, frontier.bits(frontier.best_within(limit)))
            assert problem.cost_of(found) <= limit
            assert problem.harm_of(found) == pytest.approx(best, rel=1e-12)
            found = integer_program.solve(problem, limit)
            assert problem.cost_of(found) <= limit
            assert problem.harm_of(found) == pytest.approx(best, rel=1e-9)


def test_the_frontier_is_that_of_all_choices() -> None:
    problem = random_problem(5, "bit_operations", free_activations=True, shared=True)
    every = [Option(problem.cost_of(own), problem.harm_of(own), {}) for own in problem.all_assignments()]
    expected = undominated(every)
    frontier = Frontier(groups_of(problem))
    assert frontier.cost.tolist() == [own.cost for own in expected]
    assert frontier.harm.tolist() == pytest.approx([own.harm for own in expected], rel=1e-12)
    for position in range(len(frontier.cost)):
        found = assignment_of(problem, frontier.bits(position))
        assert problem.cost_of(found) == frontier.cost[position]
        assert problem.harm_of(found) == pytest.approx(frontier.harm[position], rel=1e-12)


def test_corners_are_on_the_frontier_and_convex() -> None:
    problem = random_problem(5, "bit_operations", free_activations=True, shared=False)
    frontier = Frontier(groups_of(problem))
    points = dict(zip(frontier.cost.tolist(), frontier.harm.tolist(), strict=True))
    corners = supported(groups_of(problem))
    assert len(corners) > 3
    assert all(points[cost] == pytest.approx(harm, rel=1e-6, abs=1e-12) for cost, harm in corners)
    slopes = [(a[1] - b[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(corners)]
    assert all(first >= second * (1 - 1e-9) for first, second in itertools.pairwise(slopes))
    assert corners[0][0] == frontier.cost[0]
    assert corners[-1][0] == frontier.cost[-1]


def test_many_layers_take_little_work() -> None:
    chance = random.Random(0)
    groups = []
    for _ in range(120):
        scale, unit = 10 ** chance.uniform(-4, 1), chance.randrange(1000, 10**7)
        groups.append([Option(unit * bits, scale * 4.0**-bits, {}) for bits in range(2, 9)])
    limit = int(sum(options[-1].cost for options in groups) / 2)
    best = Frontier(groups, limit)
    assert len(best.cost) < 10_000
    position = best.best_within(limit)
    below, above = (
        own for own in itertools.pairwise(supported(groups)) if own[0][0] <= limit < own[1][0]
    ).__next__()
    assert above[1] <= best.harm[position] <= below[1]


def two_layers(cost: str = "bit_operations") -> Allocation:
    bits = {2: 9.0, 4: 3.0, 8: 1.0}
    variables = (Variable("first", bits), Variable("second", bits))
    inputs = (Variable("x", {8: 0.0}), Variable("y", {4: 0.0}))
    return Allocation(variables, inputs, (Term(0, {0: 100}, 10), Term(1, {1: 300}, 90)), cost)


def test_the_ratio_is_that_of_multiplications_times_the_larger_bits() -> None:
    problem = two_layers()
    # 100 * max(4, 8) + 300 * max(2, 4), against 400 * 8
    assert problem.ratio_of(((4, 2), (8, 4))) == pytest.approx(3200 / 2000)
    assert two_layers("size").ratio_of(((4, 2), (8, 4))) == pytest.approx(800 / (40 + 180))


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ratio_that_is_none_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match="ratio"):
        two_layers().limit(ratio)


def test_a_ratio_that_cannot_be_reached_says_what_can() -> None:
    with pytest.raises(ConfigError, match=r"1\.6"):
        two_layers().limit(1.7)
    assert two_layers().limit(1.6) == 2000


def test_an_unknown_cost_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'size'"):
        two_layers("sizes")
