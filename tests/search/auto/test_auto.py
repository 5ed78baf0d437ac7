"""``dw.auto`` from the outside, on budgets that are counted and one that is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dwindle as dw
from dwindle import zoo
from dwindle.graph.macs import count_macs
from dwindle.search.auto import Training
from dwindle.training import TrainingOptions, fit


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, zoo.BatchLoader, list[Any]]:
    torch.manual_seed(0)
    model = zoo.digits_resnet((8, 16), (2, 1))
    data = zoo.digits().first(512, 200)
    loader = zoo.BatchLoader(data.train_images, data.train_labels, 64, shuffle=True)
    fit(model, loader, _sgd(model.parameters()), epochs=6, options=TrainingOptions(progress=False))
    validation = [(data.test_images, data.test_labels)]
    return model.eval(), loader, validation


def test_a_budget_of_macs_is_met_and_the_original_stays(
    case: tuple[nn.Module, zoo.BatchLoader, list[Any]],
) -> None:
    model, loader, validation = case
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = dw.auto(
        model,
        loader,
        budget={"macs": 0.4, "bit_operations": 0.03},
        validation=validation,
        training=Training(4, _sgd),
        trials=3,
        threads=1,
        max_drop=0.05,
    )
    assert result.within_budget
    assert result.costs["macs"] <= 0.4 * count_macs(model, (validation[0][0],), {}) * 1.0001
    assert result.score >= result.original_score - 0.15
    assert result.to_json()["within_budget"]
    assert "meets the budget" in result.summary()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_without_labels_and_training(case: tuple[nn.Module, zoo.BatchLoader, list[Any]]) -> None:
    model, _, validation = case
    inputs = [validation[0][0][:64], validation[0][0][64:128]]
    result = dw.auto(
        model,
        inputs,
        budget={"params": 0.6},
        metric="agreement",
        validation=inputs,
        loss=None,
        effort="seconds",
        methods=["widths", "blocks"],
        trials=3,
    )
    assert result.candidate.numbers == "float32"
    assert result.costs["params"] <= 0.6 * result.original_costs["params"]
    assert sum(own.numel() for own in result.model.parameters()) == result.costs["params"]
    assert result.score > 0.5


def test_a_latency_is_measured_in_its_runtime(case: tuple[nn.Module, zoo.BatchLoader, list[Any]]) -> None:
    model, loader, validation = case
    result = dw.auto(
        model,
        loader,
        budget={"latency:onnxruntime": 0.8},
        validation=validation,
        training=Training(2, _sgd),
        trials=2,
        threads=1,
        max_drop=1.0,
    )
    assert set(result.scores) == {"onnxruntime"}
    assert result.scores["onnxruntime"] == pytest.approx(result.score, abs=0.011)
    assert 0 < result.costs["latency:onnxruntime"] < result.original_costs["latency:onnxruntime"]


def test_the_other_way_round(case: tuple[nn.Module, zoo.BatchLoader, list[Any]]) -> None:
    """The smallest share whose score is good enough; a metric that falls with size has a known answer."""
    model, loader, validation = case
    whole = sum(own.numel() for own in model.parameters())

    def share(predict: Callable[..., Any]) -> float:
        assert isinstance(predict, nn.Module)
        return sum(own.numel() for own in predict.parameters()) / whole

    result = dw.auto(
        model,
        loader,
        minimize="params",
        max_drop=0.55,
        metric=share,
        validation=validation,
        effort="seconds",
        loss=None,
        methods=["widths"],
        trials=1,
    )
    assert result.met
    assert 0.45 <= result.costs["params"] / whole <= 0.55


def test_bad_input_is_named_before_any_work(case: tuple[nn.Module, zoo.BatchLoader, list[Any]]) -> None:
    model, loader, validation = case
    good: dict[str, Any] = {"budget": {"macs": 0.5}, "validation": validation}
    for changed, message in (
        ({"budget": None}, "give a budget"),
        ({"budget": {"mac": 0.5}}, "did you mean 'macs'"),
        ({"effort": "minute"}, "did you mean 'minutes'"),
        ({"methods": ["width"]}, "did you mean 'widths'"),
        ({"metric": "acuracy"}, "did you mean 'accuracy'"),
        ({"validation": None}, "needs validation="),
        ({"trials": 0}, "not a positive number"),
        ({"max_drop": -1}, "negative"),
        ({"minimize": "latency"}, "name the runtime"),
    ):
        with pytest.raises(dw.ConfigError, match=message):
            dw.auto(model, loader, **{**good, **changed})


def test_a_budget_out_of_reach_says_how_near(case: tuple[nn.Module, zoo.BatchLoader, list[Any]]) -> None:
    model, loader, validation = case
    with pytest.raises(dw.DwindleError, match="out of reach"):
        dw.auto(model, loader, budget={"params": 0.001}, validation=validation, trials=2)
