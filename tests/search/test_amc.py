"""AMC: the paper's state, its bound on actions, its rewards, and episodes that keep the budget."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.search import AMC, AgentOptions, Problem, run_search
from dwindle.search.amc import REWARDS, STATE, LayerStates, most_that_may_stay
from search.models import images, nearness, tiny

AGENT = AgentOptions(hidden=16, batch=16, critic_rate=5e-3, actor_rate=1e-3)


class Chain(nn.Module):
    """Three convolutions and a head, whose layers a hand can count."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.b = nn.Conv2d(8, 12, 5, stride=2, padding=2, bias=False)
        self.c = nn.Conv2d(12, 20, 1, bias=False)
        self.head = nn.Linear(20, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.c(self.b(self.a(x).relu()).relu()).relu().mean((2, 3)))


def problem_of(model: nn.Module, share: float = 0.5, **arguments) -> Problem:
    return Problem(model, images(2), nearness(model), {"macs": share}, **arguments)


def test_states_are_those_of_the_paper() -> None:
    """t, n, c, h, w, stride, k, cost; what earlier actions took, what later layers hold, the last action."""
    problem = problem_of(Chain().eval())
    macs = {"a": 8 * 8 * 8 * 27, "b": 4 * 4 * 12 * 8 * 25, "c": 4 * 4 * 20 * 12, "head": 20 * 5}
    whole = sum(macs.values())
    # what each axis takes with it: the layer that makes it, and the layer that reads it
    shares = [
        (macs["a"] + macs["b"]) / whole,
        (macs["b"] + macs["c"]) / whole,
        (macs["c"] + macs["head"]) / whole,
    ]
    rows = [
        [0 / 3, 8, 3, 8, 8, 1, 3, shares[0]],
        [1 / 3, 12, 8, 4, 4, 2, 5, shares[1]],
        [2 / 3, 20, 12, 4, 4, 1, 1, shares[2]],
    ]
    tops = [max(row[column] for row in rows) for column in range(8)]
    states = LayerStates(problem)
    first, second, third = problem.space.variables
    assert [v.name for v in problem.space.variables] == ["a.weight[0]", "b.weight[0]", "c.weight[0]"]
    chosen = {first.axis: 4, second.axis: 9}
    left = macs["a"] / 2 + macs["b"] * 0.5 * 0.75 + macs["c"] * 0.75 + macs["head"]
    found = states.state(chosen, 2, 0.25)
    expected = [value / top for value, top in zip(rows[2], tops, strict=True)]
    assert found == pytest.approx([*expected, 1 - left / whole, 0.0, 0.25], rel=1e-12)
    start = states.state({}, 0, 0.0)
    rest = (macs["b"] + macs["c"] + macs["head"]) / whole
    expected = [value / top for value, top in zip(rows[0], tops, strict=True)]
    assert start == pytest.approx([*expected, 0.0, rest, 0.0], rel=1e-12)
    assert len(start) == len(STATE) == 11
    assert all(0 <= value <= 1 for value in (*start, *found))
    assert third.name == "c.weight[0]"


def test_states_of_a_model_with_heads_and_residuals_lie_between_zero_and_one() -> None:
    from pruning.models import Attention

    torch.manual_seed(0)
    model = Attention().eval()
    data = torch.randn(4, 5, 24)
    with torch.no_grad():
        wanted = model(data)
    problem = Problem(
        model, data, lambda small: -float((small(data) - wanted).square().mean()), {"macs": 0.6}
    )
    states = LayerStates(problem)
    rows = [states.state({}, place, 0.0) for place in range(len(problem.space.variables))]
    assert all(0 <= value <= 1 for row in rows for value in row)
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_actions_are_bounded_as_in_algorithm_one(share: float, position: int) -> None:
    """On costs that add up: a_t is at least (alpha W_all - a_max W_rest - W_reduced) / W_t."""
    sizes, weights, a_max = [4000, 9000, 2000, 5000], [3.0, 1.0, 7.0, 2.0], 0.8
    variables = [
        SimpleNamespace(axis=place, size=size, least=round(size * (1 - a_max)))
        for place, size in enumerate(sizes)
    ]
    space = SimpleNamespace(variables=variables)

    def cost(counts: dict) -> float:
        return sum(weights[place] * counts.get(place, sizes[place]) for place in range(4))

    layers = [weight * size for weight, size in zip(weights, sizes, strict=True)]
    actions = [0.35, 0.6, 0.1][:position]
    chosen = {place: round(sizes[place] * (1 - action)) for place, action in enumerate(actions)}
    reduced = sum(action * layer for action, layer in zip(actions, layers, strict=False))
    duty = (1 - share) * sum(layers) - a_max * sum(layers[position + 1 :]) - reduced
    lowest = min(max(duty / layers[position], 0.0), a_max)
    count = most_that_may_stay(space, cost, share * sum(layers), chosen, position)
    assert 1 - count / sizes[position] == pytest.approx(lowest, abs=1.01 / sizes[position])


def test_bounds_are_exact_where_axes_multiply() -> None:
    problem = problem_of(tiny(), 0.45)
    space, cost = problem.space, problem.cost.predicted
    chosen = {space.variables[0].axis: 7}
    found = most_that_may_stay(space, cost, problem.limit, chosen, 1)
    later = {v.axis: v.least for v in space.variables[2:]}
    own = space.variables[1]
    able = [
        n for n in range(own.least, own.size + 1) if cost({**chosen, **later, own.axis: n}) <= problem.limit
    ]
    assert found == max(able)


def test_rewards_are_those_of_the_paper() -> None:
    assert REWARDS["error"](0.93, 1e6) == pytest.approx(-0.07, rel=1e-12)
    assert REWARDS["error_log_cost"](0.93, 1e6) == pytest.approx(-0.07 * 6 * math.log(10), rel=1e-12)


@pytest.mark.parametrize("cost", ["macs", "params"])
def test_every_episode_keeps_the_budget_and_the_best_uses_it(cost: str) -> None:
    model = tiny()
    problem = Problem(model, images(2), nearness(model), {cost: 0.55})
    result = run_search(problem, AMC(episodes=10, warmup=4, agent=AGENT))
    assert len(result.trials) == 11
    assert all(trial.cost <= problem.limit for trial in result.trials)
    assert result.best.score >= max(trial.score for trial in result.trials[:-1])
    last = problem.space.from_names(result.trials[-1].counts)
    for variable in problem.space.variables:  # the last one is filled to one block
        if last[variable.axis] < variable.size:
            assert problem.cost.predicted({**last, variable.axis: last[variable.axis] + 1}) > problem.limit
    assert result.proofs[0].proven


def test_it_learns() -> None:
    """Later episodes score higher than those of the warm-up, and the best beats an even cut."""
    model = tiny()
    problem = problem_of(model, 0.6)
    scores = {}

    def table(small: nn.Module) -> float:  # keeps the inner axis: a score that a cut of it lowers at once
        return 0.2 + 0.8 * small.inner.weight.shape[0] / 16

    problem.evaluate = table
    result = run_search(problem, AMC(episodes=70, warmup=25, agent=AgentOptions(
        hidden=24, batch=32, critic_rate=5e-3, actor_rate=2e-3, noise_decay=0.93, share=0.05)))  # fmt: skip
    scores = [trial.score for trial in result.trials]
    assert sum(scores[55:70]) / 15 > sum(scores[:25]) / 25 + 0.05
    even = problem.assess(problem.space.fit({}, problem.cost.predicted, problem.limit))
    assert result.best.score > even.score


def test_a_reward_of_cost_shrinks_without_a_budget() -> None:
    model = tiny()
    problem = problem_of(model, 1.0)
    problem.evaluate = lambda small: 0.5  # nothing is lost by cutting: the cheapest wins
    result = run_search(problem, AMC(episodes=8, warmup=8, reward="error_log_cost", agent=AGENT))
    assert result.best.cost == min(trial.cost for trial in result.trials)


def test_bad_settings_are_refused() -> None:
    for arguments in ({"episodes": 0}, {"warmup": -1}, {"reward": "accuracy"}):
        with pytest.raises(ConfigError):
            AMC(**arguments)
