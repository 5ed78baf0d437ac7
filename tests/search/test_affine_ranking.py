"""LeGR: the affine global ranking, its cut at a budget, its evolution."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from dwindle.config.errors import ConfigError
from dwindle.graph import analyse
from dwindle.realize.cost import CostModel
from dwindle.search import LeGR, Problem, Space, run_search
from dwindle.search.affine_ranking import affine_scores, global_counts, mutated, squared_norms
from search.models import images, nearness, tiny


def test_scores_are_affine_in_squared_norms() -> None:
    generator = np.random.default_rng(0)
    norms = {name: generator.random(5) for name in "ab"}
    affine = {"a": (2.5, -0.1), "b": (0.3, 0.7)}
    found = affine_scores({name: torch.tensor(values) for name, values in norms.items()}, affine)
    for name, (alpha, kappa) in affine.items():
        np.testing.assert_allclose(found[name].numpy(), [alpha * v + kappa for v in norms[name]], rtol=1e-15)


def test_norms_are_squared_lengths_of_filters_over_all_coupled_weights() -> None:
    """Each weight's squared L2 norms over their mean, averaged over the weights of the axis."""
    model = tiny()
    problem = Problem(model, images(2), nearness(model), {"macs": 0.5})
    state = {name: value.double().numpy() for name, value in model.state_dict().items()}
    parts = []
    for name, dim in (("stem.weight", 0), ("inner.weight", 1), ("back.weight", 0), ("wide.weight", 1)):
        own = np.array([np.square(state[name].take(i, dim)).sum() for i in range(8)])
        parts.append(own / own.mean())
    np.testing.assert_allclose(
        squared_norms(problem)["stem.weight[0]"].numpy(), np.mean(parts, 0), rtol=1e-12
    )


@pytest.mark.parametrize("share", [0.3, 0.55, 0.8])
def test_the_lowest_scores_of_all_go(share: float) -> None:
    """Against removing channels one by one from the sorted list of all."""
    analysis = analyse(tiny(), (images(2),))
    space, cost = Space.of(analysis), CostModel.of(analysis).elements
    generator = torch.Generator().manual_seed(2)
    scores = {v.name: torch.rand(v.size, generator=generator, dtype=torch.float64) for v in space.variables}
    budget = share * cost(space.full())
    order = sorted((float(score), v.name) for v in space.variables for score in scores[v.name])
    counts = space.full()
    for _, name in order:
        if cost(counts) <= budget:
            break
        variable = space.by_name[name]
        counts = {**counts, variable.axis: max(variable.least, counts[variable.axis] - 1)}
    tried: set[str] = set()
    while len(tried) < len(space.variables):  # give back what fits, the highest removed score first
        removed = {
            v.name: sorted(scores[v.name].tolist(), reverse=True)[counts[v.axis] :] for v in space.variables
        }
        name = max((n for n in removed if n not in tried), key=lambda n: (removed[n] or [-1.0])[0])
        axis = space.by_name[name].axis
        if removed[name] and cost({**counts, axis: counts[axis] + 1}) <= budget:
            counts = {**counts, axis: counts[axis] + 1}
        else:
            tried.add(name)
    assert cost(counts) <= budget
    assert global_counts(space, scores, cost, budget) == counts


def test_mutations_change_their_share_and_keep_alpha_positive() -> None:
    parent = {name: (1.0, 0.0) for name in "abcdefghij"}
    deviations = dict.fromkeys(parent, 0.5)
    chance = random.Random(1)
    children = [mutated(parent, deviations, 0.3, 1.0, chance) for _ in range(400)]
    assert all(sum(child[name] != parent[name] for name in parent) == 3 for child in children)
    changed = [child[name] for child in children for name in parent if child[name] != (1.0, 0.0)]
    logs = np.array([math.log(alpha) for alpha, _ in changed])
    shifts = np.array([kappa for _, kappa in changed])
    assert abs(logs.mean()) < 4 / len(logs) ** 0.5
    assert logs.std() == pytest.approx(1.0, rel=0.1)
    assert shifts.std() == pytest.approx(0.5, rel=0.1)
    assert all(len({child[name] for child in children}) > 50 for name in parent)


def test_it_learns_a_better_ranking_than_the_plain_one() -> None:
    model = tiny()
    problem = Problem(model, images(2), nearness(model), {"macs": 0.5})
    result = run_search(problem, LeGR(generations=24, population=8, samples=4))
    assert len(result.trials) == 24
    assert all(trial.cost <= problem.limit for trial in result.trials)
    assert result.best.score > result.trials[0].score  # the first candidate is the plain ranking
    assert result.proofs[0].proven


@pytest.mark.parametrize(
    "arguments", [{"samples": 0}, {"population": 10, "samples": 11}, {"mutation_share": 0.0}]
)
def test_bad_settings_are_refused(arguments: dict) -> None:
    with pytest.raises(ConfigError):
        LeGR(**arguments)
