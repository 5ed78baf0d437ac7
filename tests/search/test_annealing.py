"""Simulated annealing: acceptance, steps, and the whole walk against a second account of it."""

from __future__ import annotations

import random
from decimal import Decimal, getcontext

import pytest

from dwindle.config.errors import ConfigError
from dwindle.search import Problem, SimulatedAnnealing, run_search
from dwindle.search.annealing import acceptance, first_ratios, perturbed
from dwindle.search.trial import key_of
from search.models import images, nearness, tiny

getcontext().prec = 40


@pytest.mark.parametrize("drop", [1e-6, 0.3, 2.0, 50.0])
@pytest.mark.parametrize("temperature", [0.5, 7.0, 100.0])
def test_acceptance_is_the_exponential_of_drop_over_temperature(drop: float, temperature: float) -> None:
    exact = (-Decimal(drop) / Decimal(temperature)).exp()
    assert acceptance(drop, temperature) == pytest.approx(float(exact), rel=1e-14)
    assert acceptance(-drop, temperature) == acceptance(0.0, temperature) == 1


def test_larger_variables_get_larger_ratios() -> None:
    sizes = {"a": 30, "b": 10, "c": 20}
    tops = {"a": 0.9, "b": 0.9, "c": 0.9}
    ratios = first_ratios(sizes, tops, random.Random(3))
    assert 0 <= ratios["b"] < ratios["c"] < ratios["a"] <= 0.9


def test_steps_stay_in_bounds_and_reach_both_ways() -> None:
    chance = random.Random(0)
    ratios, tops = {"a": 0.1, "b": 0.5, "c": 0.88}, {"a": 0.9, "b": 0.9, "c": 0.9}
    moved = [perturbed(ratios, tops, 0.2, chance) for _ in range(500)]
    for name in ratios:
        values = [own[name] for own in moved]
        assert 0 <= min(values) < ratios[name] < max(values) <= tops[name]
        assert max(abs(value - ratios[name]) for value in values) <= 0.2
    middle = [own["b"] for own in moved]
    assert abs(sum(middle) / len(middle) - 0.5) < 4 * 0.2 / 3**0.5 / 500**0.5


def test_the_temperatures_cool_geometrically() -> None:
    found = SimulatedAnnealing(start_temperature=100, stop_temperature=20, cool_down_rate=0.9).temperatures()
    assert found[0] == 100
    assert found == pytest.approx([100 * 0.9**step for step in range(len(found))], rel=1e-12)
    assert found[-1] > 20 >= found[-1] * 0.9


def test_the_walk_is_that_of_a_second_account() -> None:
    """Steps, luck and decisions are followed by hand, with the trials' own scores."""
    model = tiny()
    problem = Problem(model, images(2), nearness(model), {"macs": 0.5})
    algorithm = SimulatedAnnealing(
        start_temperature=30, stop_temperature=8, cool_down_rate=0.85, perturbation_magnitude=0.5, seed=4
    )
    result = run_search(problem, algorithm)
    scores = {trial.key: trial.score for trial in result.trials}
    space, chance = problem.space, random.Random(4)
    tops = {variable.name: variable.largest_ratio for variable in space.variables}
    drawn = sorted(chance.random() for _ in tops)
    sizes = {v.name: v.size * len(v.info.parameter_dims) for v in space.variables}
    start = {
        name: drawn[place] * tops[name] for place, name in enumerate(sorted(sizes, key=sizes.__getitem__))
    }
    counts = space.fit(start, problem.cost.predicted, problem.limit)
    keys, temperature, here = [key_of(space.named(counts))], 30.0, counts
    taken = refused = 0
    while temperature > 8:
        step = 0.5 * temperature / 30
        wanted = {
            name: min(max(ratio + chance.uniform(-step, step), 0.0), tops[name])
            for name, ratio in space.ratios(here).items()
        }
        counts = space.fit(wanted, problem.cost.predicted, problem.limit)
        keys.append(key_of(space.named(counts)))
        gain = 100 * (scores[keys[-1]] - scores[key_of(space.named(here))])
        if chance.random() < min(1.0, 2.718281828459045 ** (gain / temperature)):
            here, taken = counts, taken + 1
        else:
            refused += 1
        temperature *= 0.85
    assert [trial.key for trial in result.trials] == keys
    assert taken
    assert taken + refused == len(keys) - 1


@pytest.mark.parametrize("cost", ["macs", "params", "bytes"])
def test_it_meets_its_budget_with_every_trial(cost: str) -> None:
    model = tiny()
    problem = Problem(model, images(2), nearness(model), {cost: 0.5})
    result = run_search(problem, SimulatedAnnealing(stop_temperature=3))
    whole = problem.cost.predicted(problem.space.full())
    assert all(0.4 * whole < trial.cost <= 0.5 * whole for trial in result.trials)
    assert result.best.score == max(trial.score for trial in result.trials) > result.trials[0].score
    assert result.proofs[0].proven


@pytest.mark.parametrize(
    "arguments",
    [{"start_temperature": 1, "stop_temperature": 2}, {"stop_temperature": 0}, {"cool_down_rate": 1.0},
     {"perturbation_magnitude": 0}],
)  # fmt: skip
def test_bad_settings_are_refused(arguments: dict) -> None:
    with pytest.raises(ConfigError):
        SimulatedAnnealing(**arguments)
