"""NetAdapt: how many filters, which candidate, and the rounds against a second account of them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.graph import analyse
from dwindle.realize.cost import CostModel
from dwindle.search import NetAdapt, Problem, Space, Trial, run_search
from dwindle.search.netadapt import chosen_count, winner
from dwindle.search.trial import key_of
from search.models import images, nearness, tiny


def toward(model: nn.Module):
    """A short fine-tuning: three steps toward the outputs of the model, on images in a random order."""
    data = images()
    with torch.no_grad():
        wanted = copy.deepcopy(model).eval()(data)

    def tune(small: nn.Module) -> None:
        optimizer = torch.optim.SGD(small.parameters(), lr=0.02)
        for _ in range(3):
            chosen = torch.randperm(len(data))[:8]
            optimizer.zero_grad()
            (small(data[chosen]) - wanted[chosen]).square().mean().backward()
            nn.utils.clip_grad_norm_(small.parameters(), 1.0)
            optimizer.step()

    return tune


@pytest.mark.parametrize("share", [0.95, 0.8, 0.6, 0.3])
def test_the_count_is_the_largest_that_wins_enough(share: float) -> None:
    analysis = analyse(tiny(), (images(2),))
    space, cost = Space.of(analysis), CostModel.of(analysis).macs
    goal = share * cost(space.full())
    for variable in space.variables:
        able = [
            count
            for count in range(variable.least, variable.size)
            if cost({**space.full(), variable.axis: count}) <= goal
        ]
        found = chosen_count(space, cost, variable, goal)
        assert (found is None) == (not able)
        if found is not None:
            assert found == {**space.full(), variable.axis: max(able)}


def trial(score: float, cost: float, error: str | None = None) -> Trial:
    counts = {"a": int(cost)}
    return Trial(key_of(counts), counts, {}, score, cost, error=error)


def test_the_winner_has_the_highest_score_or_the_best_exchange() -> None:
    before = trial(0.9, 100)
    near, cheap, failed = trial(0.89, 95), trial(0.85, 60), trial(0.95, 90, "refused")
    assert winner([near, cheap, failed], before, "score") is near
    assert winner([near, cheap, failed], before, "score_per_cost") is cheap  # 0.05 / 40 against 0.01 / 5
    assert winner([failed], before, "score") is None


def test_rounds_are_those_of_a_second_account() -> None:
    """Each round: cost before, minus the step; every axis alone to the largest count; the best goes on."""
    model = tiny()
    score = nearness(model)
    problem = Problem(model, images(2), score, {"macs": 0.7})
    result = run_search(problem, NetAdapt(step=0.12, decay=0.9))
    current, step = copy.deepcopy(model), 0.12
    whole = CostModel.of(analyse(model, (images(2),))).macs({})
    seen: list[float] = []
    while True:
        analysis = analyse(current, (images(2),))
        cost = CostModel.of(analysis).macs
        now = cost({})
        if now <= 0.7 * whole:
            break
        goal = max(now - step * whole, 0.7 * whole)
        candidates = []
        here = Problem(current, images(2), score, {"macs": 1.0})
        for variable in here.space.variables:
            counts = chosen_count(here.space, here.cost.predicted, variable, goal)
            if counts is not None:
                small = here.build(counts).model
                with torch.no_grad():
                    candidates.append((score(small), small))
        seen += [value for value, _ in candidates]
        current = max(candidates, key=lambda own: own[0])[1]
        step *= 0.9
    assert [own.score for own in result.trials] == pytest.approx(seen, rel=1e-6)
    assert torch.equal(result.model(images()), current(images()))
    assert whole * 0.6 < now <= 0.7 * whole
    assert len(result.proofs) >= 2
    assert all(proof.proven for proof in result.proofs)


def test_it_adapts_with_fine_tuning_and_leaves_the_model_alone() -> None:
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    problem = Problem(model, images(2), nearness(model), {"params": 0.6}, fine_tune=toward(model))
    result = run_search(problem, NetAdapt(step=0.2))
    assert sum(p.numel() for p in result.model.parameters()) <= problem.limit
    with torch.no_grad():
        assert nearness(model)(result.model.eval()) == pytest.approx(result.best.score, rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(proof.proven for proof in result.proofs)
    with pytest.raises(ConfigError, match=r"result\.model"):
        result.realize()


def test_a_broken_search_goes_on_with_the_weights_of_its_rounds(tmp_path: Path) -> None:
    model = tiny()
    tune, score = toward(model), nearness(model)
    algorithm = NetAdapt(step=0.15)

    def problem(tuning=tune) -> Problem:
        return Problem(model, images(2), score, {"macs": 0.6}, fine_tune=tuning)

    tuned = []

    def counting(small: nn.Module) -> None:
        tuned.append(1)
        tune(small)

    unbroken = run_search(problem(counting), algorithm)
    every = len(tuned)
    tuned.clear()

    def breaking(small: nn.Module) -> None:
        if len(tuned) == every // 2:
            raise KeyboardInterrupt
        counting(small)

    with pytest.raises(KeyboardInterrupt):
        run_search(problem(breaking), algorithm, storage=tmp_path)
    resumed = run_search(problem(counting), algorithm, storage=tmp_path)
    assert [t.score for t in resumed.trials] == [t.score for t in unbroken.trials]
    assert torch.equal(resumed.model(images()), unbroken.model(images()))
    assert len(tuned) == every  # nothing that was finished was trained again
    again = run_search(problem(lambda small: pytest.fail("run again")), algorithm, storage=tmp_path)
    assert torch.equal(again.model(images()), unbroken.model(images()))
    assert [p.to_json() for p in again.proofs] == [p.to_json() for p in resumed.proofs]


def test_a_budget_of_the_whole_needs_no_round() -> None:
    model = tiny()
    result = run_search(Problem(model, images(2), nearness(model), {"macs": 1.0}), NetAdapt())
    assert result.trials == []
    assert result.best == result.baseline


def test_what_cannot_be_reached_is_refused_before_the_first_round() -> None:
    model = tiny()
    problem = Problem(model, images(2), nearness(model), {"macs": 0.05}, largest_ratio=0.4)
    with pytest.raises(ConfigError, match="cannot be reached"):
        run_search(problem, NetAdapt())
    for arguments in ({"step": 0.0}, {"decay": 1.2}, {"pick": "scores"}):
        with pytest.raises(ConfigError):
            NetAdapt(**arguments)
