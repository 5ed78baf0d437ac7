"""Latency budgets: prices from measurements, and searches on a latency that is known exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.measure import count_macs_by_module
from dwindle.search import (
    AMC,
    AgentOptions,
    NetAdapt,
    Problem,
    SimulatedAnnealing,
    latency_problem,
    run_search,
)
from dwindle.search import problem as problem_module
from dwindle.search.latency import fit_prices
from dwindle.search.latency_prediction import preparing
from dwindle.search.storage import TrialStore
from search.latency_models import LawfulLayers, LawfulModels, by_macs
from search.models import images, nearness, tiny


def test_times_that_follow_the_law_are_fitted() -> None:
    generator = np.random.default_rng(0)
    macs = torch.tensor(generator.random((12, 4)) * 100)
    constant, prices = fit_prices(macs, 3.0 + 0.02 * macs.sum(1))
    assert constant == pytest.approx(3.0, rel=1e-9)
    assert prices.tolist() == pytest.approx([0.02] * 4, rel=1e-9)


def test_prices_of_modules_move_apart_and_never_below_zero() -> None:
    generator = np.random.default_rng(1)
    macs = torch.tensor(generator.random((60, 3)) * 100)
    true = torch.tensor([0.01, 0.05, 0.0], dtype=torch.float64)
    times = 0.5 + macs @ true
    constant, prices = fit_prices(macs, times, ridge=1e-6)
    assert prices[1] > prices[0] > prices[2] >= 0
    predicted = constant + macs @ prices
    assert float(((predicted - times).abs() / times).max()) < 0.3
    flat = fit_prices(macs, torch.full((60,), 2.0, dtype=torch.float64))
    assert flat[0] == pytest.approx(2.0)
    assert flat[1].max() < 1e-9


def test_the_ridge_regression_solves_its_equations() -> None:
    """The moves are where the gradient of squared relative errors plus ridge vanishes."""
    generator = np.random.default_rng(2)
    macs = torch.tensor(generator.random((20, 3)) + 0.5)
    times = macs @ torch.tensor([1.0, 1.2, 0.9], dtype=torch.float64) + 0.3
    constant, prices = fit_prices(macs, times, ridge=0.1)
    design = torch.stack([1 / times, macs.sum(1) / times], 1)
    line = torch.linalg.lstsq(design, torch.ones(20, 1, dtype=torch.float64)).solution.flatten()
    assert constant == pytest.approx(float(line[0]), rel=1e-9)
    moves = prices / line[1] - 1
    wrong = 1 - (line[0] + macs @ prices) / times
    gradient = -2 * (line[1] * macs / times[:, None]).T @ wrong + 0.2 * moves
    assert float(gradient.abs().max()) < 1e-9


@pytest.fixture
def law(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Latency by a law: a constant, and convolutions three times as dear as products. Counts its measurements."""
    measured: list[float] = []

    def milliseconds(model: nn.Module) -> float:
        macs = count_macs_by_module(model, (images(2),), {}).by_module
        return 20_000 + sum((1 if "h" in name[:1] else 3) * value for name, value in macs.items() if name)

    def share(model: nn.Module, whole: nn.Module, *args: object, **kwargs: object) -> float:
        measured.append(milliseconds(model) / milliseconds(whole))
        return measured[-1]

    monkeypatch.setattr(problem_module, "share_of_latency", share)
    return measured


@pytest.mark.parametrize(
    "algorithm",
    [
        SimulatedAnnealing(stop_temperature=10),
        NetAdapt(step=0.2),
        AMC(episodes=6, warmup=2, agent=AgentOptions(hidden=8, batch=4)),
    ],
    ids=["annealing", "netadapt", "amc"],
)
def test_searches_keep_a_budget_of_latency(law: list[float], algorithm) -> None:
    model = tiny()
    problem = Problem(model, images(2), nearness(model), {"latency": 0.6})
    result = run_search(problem, algorithm)
    assert 0.45 < result.best.cost <= 0.6 * 1.05
    assert law[0] == 1.0
    assert result.proofs[-1].proven


def test_measurements_are_kept_and_not_repeated(law: list[float], tmp_path) -> None:
    model = tiny()
    problems = [Problem(model, images(2), nearness(model), {"latency": 0.6}) for _ in range(2)]
    first = run_search(problems[0], SimulatedAnnealing(stop_temperature=10), storage=tmp_path)
    done = len(law)
    second = run_search(problems[1], SimulatedAnnealing(stop_temperature=10), storage=tmp_path)
    assert len(law) == done
    assert second.to_json() == first.to_json()


def test_a_real_latency_is_a_share_of_the_whole() -> None:
    """Half of the channels of a model that takes milliseconds, in torch: not slower than the whole."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 96, 3), nn.ReLU(), nn.Conv2d(96, 4, 3)
    ).eval()
    data = torch.randn(2, 3, 24, 24)
    problem = Problem(model, data, lambda small: 0.0, {"latency:torch": 0.5}, threads=1, repeats=5)
    counts = problem.space.counts({variable.name: 0.9 for variable in problem.space.variables})
    assert problem._share(problem.build(counts).model) < 0.7


def test_a_logarithm_of_a_share_is_refused(law: list[float]) -> None:
    model = tiny()
    problem = Problem(model, images(2), nearness(model), {"latency": 0.6})
    with pytest.raises(ConfigError, match="logarithm"):
        run_search(problem, AMC(reward="error_log_cost"))


def test_a_budget_in_a_runtime_is_predicted_from_layers(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Whole models are timed once and taken from the store afterwards; the law of the layers is found."""
    monkeypatch.setenv("DWINDLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(preparing, "kernel_timer", lambda runtime: LawfulLayers(by_macs))
    timed: list[int] = []

    class Models(LawfulModels):
        def __init__(self, runtime: object) -> None:
            super().__init__(by_macs)

        def __call__(self, models, feeds):
            timed.append(len(models))
            return super().__call__(models, feeds)

    monkeypatch.setattr(latency_problem, "WholeModelTimer", Models)
    model = tiny()
    store = TrialStore(tmp_path / "trials", {})
    problem = Problem(model, images(2), nearness(model), {"latency:onnxruntime": 0.5})
    problem.prepare(store)
    space = problem.space
    assert problem.cost.predicted(space.full()) == pytest.approx(1.0, rel=0.02)
    assert problem.cost.predicted(space.smallest()) < 0.5 == problem.limit
    counts = space.fit({}, problem.cost.predicted, problem.limit)
    assert problem.cost.predicted(counts) <= 0.5
    later = problem.of_round(problem.build(counts).model, "round")
    assert later.cost.predicted(later.space.full()) == pytest.approx(problem.cost.predicted(counts))
    again = Problem(model, images(2), nearness(model), {"latency:onnxruntime": 0.5})
    again.prepare(TrialStore(tmp_path / "trials", {}))
    assert len(timed) == 1
    named = space.named(counts)
    assert again.cost.predicted(again.space.from_names(named)) == pytest.approx(
        problem.cost.predicted(counts)
    )
