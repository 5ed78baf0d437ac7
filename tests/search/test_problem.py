"""The trial interface: trials repeat in any order, the user's model stays, bad input is refused at the door."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.search import LeGR, Problem, SimulatedAnnealing, run_search
from search.models import images, nearness, tiny

SHORT = SimulatedAnnealing(stop_temperature=12)


def shake(model: nn.Module) -> None:
    """A fine-tuning that depends on the global random generator alone."""
    assert model.training
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))


def test_a_trial_gives_the_same_in_any_order() -> None:
    model = tiny()
    problem = Problem(model, images(2), nearness(model), {"macs": 0.5}, fine_tune=shake)
    several = [problem.space.counts({"wide.weight[0]": ratio}) for ratio in (0.25, 0.5, 0.75)]
    forward = [problem.assess(counts) for counts in several]
    torch.rand(3)
    backward = [problem.assess(counts) for counts in several[::-1]][::-1]
    assert [t.score for t in forward] == [t.score for t in backward]
    assert len({t.score for t in forward}) == 3


def test_trials_leave_the_generators_and_the_model_alone() -> None:
    model = tiny().train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    problem = Problem(model, images(2), nearness(model), {"macs": 0.5}, fine_tune=shake)
    result = run_search(problem, SHORT)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert result.model is not model
    assert sum(p.numel() for p in result.model.parameters()) < sum(p.numel() for p in model.parameters())


def test_the_result_is_realized_with_proof_and_in_place_on_request() -> None:
    model = tiny()
    optimizer = torch.optim.Adam(model.parameters())
    problem = Problem(model, images(2), nearness(model), {"params": 0.6})
    result = run_search(problem, SHORT)
    assert [proof.proven for proof in result.proofs] == [True]
    realized = result.realize(in_place=True, optimizer=optimizer)
    assert realized.model is model
    assert realized.verification is not None
    assert realized.verification.proven
    assert realized.parameters_after == result.best.cost <= 0.6 * realized.parameters_before
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert known == {id(parameter) for parameter in model.parameters()}


def test_a_masked_trial_scores_as_the_small_one() -> None:
    model = tiny()
    for share in (0.3, 0.7):
        scores = []
        for masked in (False, True):
            problem = Problem(model, images(2), nearness(model), {"macs": share}, masked=masked)
            counts = problem.space.fit({}, problem.cost.predicted, problem.limit)
            scores.append(problem.assess(counts).score)
        assert scores[0] == pytest.approx(scores[1], rel=1e-5)
        assert scores[0] < 1


def test_searches_share_a_storage(tmp_path) -> None:
    model = tiny()
    calls = []
    score = nearness(model)

    def counting(small: nn.Module) -> float:
        calls.append(1)
        return score(small)

    problem = Problem(model, images(2), counting, {"macs": 0.5})
    first = run_search(problem, SHORT, storage=tmp_path)
    done = len(calls)
    assert done == len({trial.key for trial in [first.baseline, *first.trials]})
    second = run_search(problem, SHORT, storage=tmp_path)
    assert len(calls) == done
    assert second.to_json() == first.to_json()
    run_search(problem, LeGR(generations=3, population=2, samples=1), storage=tmp_path)
    assert len(calls) <= done + 3  # the whole model was known


def test_the_curve_tells_every_trial() -> None:
    model = tiny()
    result = run_search(Problem(model, images(2), nearness(model), {"bytes": 0.5}), SHORT)
    rows = result.curve()
    assert [row["trial"] for row in rows] == list(range(1, len(result.trials) + 1))
    assert rows[-1]["best"] == max(row["score"] for row in rows) == result.best.score
    assert all(row["fits"] and row["cost"] <= 0.5 for row in rows)
    assert "bytes" in result.summary()


def test_a_score_that_is_no_number_is_refused_before_the_search(tmp_path) -> None:
    model = tiny()
    with pytest.raises(ConfigError, match="score is nan"):
        run_search(Problem(model, images(2), lambda small: math.nan, {"macs": 0.5}), SHORT)


def test_a_trial_without_a_score_has_failed_and_never_wins() -> None:
    model = tiny()
    score, whole = nearness(model), sum(p.numel() for p in model.parameters())
    seen = []

    def sometimes(small: nn.Module) -> float:
        seen.append(1)
        small_enough = sum(p.numel() for p in small.parameters()) < whole
        return math.inf if small_enough and len(seen) % 2 else score(small)

    result = run_search(Problem(model, images(2), sometimes, {"macs": 0.5}), SHORT)
    failed = [trial for trial in result.trials if trial.error is not None]
    assert failed
    assert all(trial.score == -math.inf and "inf" in trial.error for trial in failed)
    assert result.best.error is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": {"macs": 0.0}}, "share"),
        ({"budget": {"macs": 1.5}}, "share"),
        ({"budget": {"macs": 0.5, "params": 0.5}}, "exactly one"),
        ({"budget": {"mac": 0.5}}, "did you mean 'macs'"),
        ({"importance": "l3"}, "importance"),
        ({"axes": ["channel"]}, "did you mean 'channels'"),
        ({"axes": ["heads"]}, "no axis"),
        ({"minimum": 0}, "minimum"),
        ({"largest_ratio": 1.0}, "emptied"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    model = tiny()
    given = {"budget": {"macs": 0.5}, **arguments}
    with pytest.raises(ConfigError, match=message):
        Problem(model, images(2), nearness(model), given.pop("budget"), **given)


def test_a_budget_below_the_smallest_model_is_refused() -> None:
    model = tiny()
    problem = Problem(model, images(2), nearness(model), {"macs": 0.1}, largest_ratio=0.3)
    with pytest.raises(ConfigError, match="cannot be reached"):
        run_search(problem, SHORT)


def test_an_importance_that_runs_the_model_ranks_by_data() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        model[0].bias[2] = 100.0  # by its output the largest, by its weights the smallest
        model[0].weight[2] = 1e-3
    data = [torch.randn(16, 6) for _ in range(3)]
    by_weights = Problem(model, data[0], lambda own: 0.0, {"macs": 0.5})
    by_outputs = Problem(model, data[0], lambda own: 0.0, {"macs": 0.5}, importance="outputs", data=data)
    for problem, stays in ((by_weights, False), (by_outputs, True)):
        axis = next(variable.axis for variable in problem.space.variables if variable.size == 8)
        assert bool(problem.scores[axis].argsort(descending=True)[:4].eq(2).any()) is stays
    names = [problem.identity()["importance"] for problem in (by_weights, by_outputs)]
    assert names == ["l1", "outputs"]
    with pytest.raises(ConfigError, match="give data="):
        Problem(model, data[0], lambda own: 0.0, {"macs": 0.5}, importance="taylor")
    with pytest.raises(ConfigError, match="leave data= out"):
        Problem(model, data[0], lambda own: 0.0, {"macs": 0.5}, data=data)
