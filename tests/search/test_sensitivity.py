"""Sensitivity: curves of single cuts, and the ratios of equal drop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwindle.config.errors import ConfigError
from dwindle.search import Problem, Sensitivity, SimulatedAnnealing, run_search, sensitivity_curves
from dwindle.search.sensitivity import ratio_at_drop
from search.models import images, nearness, tiny


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-4, 8), min_size=1, max_size=5), st.integers(0, 12), st.integers(1, 10))
def test_the_ratio_of_a_drop_is_the_last_within_it(eighths: list[int], tolerated: int, tenths: int) -> None:
    """Against a dense interpolation of the running maximum of the drop (numbers that meet no corner of a curve)."""
    scores, drop, top = [value / 8 for value in eighths], tolerated / 8 + 1 / 16, tenths / 10
    ratios = np.linspace(0, 1, len(scores) + 1)
    curve = [(0.0, 1.0), *zip(ratios[1:].tolist(), scores, strict=True)]
    drops = np.maximum.accumulate(np.maximum(1.0 - np.array([1.0, *scores]), 0))
    dense = np.linspace(0, 1, 20_001)
    within = dense[np.interp(dense, ratios, drops) <= drop]
    assert ratio_at_drop(curve, drop, top) == pytest.approx(min(within.max(), top), abs=1e-4)


def test_a_variable_that_costs_nothing_goes_as_far_as_it_may() -> None:
    assert ratio_at_drop([(0.0, 1.0), (0.5, 1.0), (0.9, 1.0)], 0.0, 0.8) == 0.8
    assert ratio_at_drop([(0.0, 1.0)], 0.1, 0.8) == 0


def test_curves_are_those_of_single_cuts_and_the_last_trial_meets_the_budget() -> None:
    model = tiny()
    problem = Problem(model, images(2), nearness(model), {"macs": 0.5})
    result = run_search(problem, Sensitivity())
    curves = sensitivity_curves(result.trials, result.baseline)
    assert set(curves) == {variable.name for variable in problem.space.variables}
    for name, points in curves.items():
        for ratio, score in points:
            assert score == problem.assess(problem.space.counts({name: ratio})).score
    last = result.trials[-1]
    assert last.cost <= problem.limit
    assert result.best.score >= last.score
    uniform = problem.assess(problem.space.fit({}, problem.cost.predicted, problem.limit))
    assert result.best.score > uniform.score
    assert result.proofs[0].proven


def test_equal_drops_are_predicted_for_all() -> None:
    """The drops that the curves predict for the chosen ratios differ by no more than a step of one index."""
    model = tiny()
    problem = Problem(model, images(2), nearness(model), {"macs": 0.6})
    result = run_search(problem, Sensitivity(steps=tuple(n / 10 for n in range(1, 11))))
    curves = sensitivity_curves(result.trials[:-1], result.baseline)

    def predicted(name: str, ratio: float) -> float:
        ratios, scores = zip(*curves[name], strict=True)
        drops = np.maximum.accumulate(np.maximum(scores[0] - np.array(scores), 0))
        return float(np.interp(ratio, ratios, drops))

    chosen = result.trials[-1].ratios
    tolerated = max(predicted(name, ratio) for name, ratio in chosen.items())
    for variable in problem.space.variables:
        ratio = chosen[variable.name]
        if ratio < variable.largest_ratio - 1e-9:
            assert predicted(variable.name, min(ratio + 2 / variable.size, 1)) >= 0.5 * tolerated


def test_early_stop_saves_trials() -> None:
    model = tiny()
    problem = Problem(model, images(2), nearness(model), {"macs": 0.6})
    every = run_search(problem, Sensitivity())
    fewer = run_search(problem, Sensitivity(stop_drop=0.2))
    assert len(fewer.trials) < len(every.trials) == Sensitivity().total(problem)
    for points in sensitivity_curves(fewer.trials[:-1], fewer.baseline).values():
        assert all(points[0][1] - score <= 0.2 for _, score in points[:-1])


def test_searches_of_one_storage_share_their_curves(tmp_path) -> None:
    model = tiny()
    problem = Problem(model, images(2), nearness(model), {"macs": 0.6})
    first = run_search(problem, Sensitivity(), storage=tmp_path)
    other = Problem(model, images(2), lambda small: pytest.fail("run again"), {"macs": 0.6})
    assert run_search(other, Sensitivity(), storage=tmp_path).to_json() == first.to_json()
    assert (
        run_search(problem, SimulatedAnnealing(stop_temperature=15), storage=tmp_path).best.cost
        <= problem.limit
    )


@pytest.mark.parametrize(
    "arguments", [{"steps": ()}, {"steps": (0.5, 0.2)}, {"steps": (0.5, 1.2)}, {"stop_drop": -1}]
)
def test_bad_settings_are_refused(arguments: dict) -> None:
    with pytest.raises(ConfigError):
        Sensitivity(**arguments)
