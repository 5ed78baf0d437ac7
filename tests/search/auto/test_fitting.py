"""Candidates are made to fit what is measured, however wrong the predictions are."""

from __future__ import annotations

import math

import pytest
import torch

from dwindle import zoo
from dwindle.graph.counts import Counts
from dwindle.search.auto.beginning import Beginning
from dwindle.search.auto.candidate import Candidate
from dwindle.search.auto.fitting import TOLERANCE, Fitter, uniform_share
from dwindle.search.auto.joint import Wish
from dwindle.search.auto.latencies import Latencies
from dwindle.search.auto.limits import Limit
from dwindle.search.auto.predicting import PredictedCosts
from dwindle.search.auto.variant import Workpiece
from dwindle.search.auto.workbench import Workbench

GREEDY = Wish(Candidate(importance="outputs"), "greedy", {}).how(lambda variant: None)


def _fitter(workpiece: Workpiece, share: float) -> Fitter:
    bench = Workbench(workpiece.model, workpiece.inputs, {}, ["macs"])
    latencies = Latencies(workpiece, bench, "onnxruntime", 1)
    return Fitter(workpiece, bench, [Limit("macs", share, False)], "onnxruntime", latencies)


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
@pytest.mark.parametrize(
    "share",
    [GREEDY, uniform_share()],
    ids=["greedy", "uniform"],
)
def test_wrong_predictions_are_mended(
    workpiece: Workpiece, share: object, power: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a power of 0.5 the smallest model is predicted far above the budget: it is tried, and found to be within."""
    right = PredictedCosts._predicted
    whole = right(_fitter(workpiece, 1.0)._costs(workpiece.variant(), Candidate()), "macs", {})

    def wrong(self: PredictedCosts, cost: str, counts: Counts) -> float:
        return whole * (right(self, cost, counts) / whole) ** power

    monkeypatch.setattr(PredictedCosts, "_predicted", wrong)
    fitter = _fitter(workpiece, 0.08)
    variant = workpiece.variant()
    costs = fitter._costs(variant, Candidate(numbers="float32"))
    out_of_reach = min(costs.over(variant.space.smallest())) > 1
    assert out_of_reach == (power == 0.5)

    found = fitter.fit(Candidate(numbers="float32"), share)  # type: ignore[arg-type]

    assert found is not None
    assert found.fits
    assert found.over <= 1 + TOLERANCE
    assert found.over > 0.7
    assert math.isclose(found.costs["macs"], found.over * fitter.allowed["macs"])


def test_a_lucky_measurement_is_not_believed(workpiece: Workpiece, monkeypatch: pytest.MonkeyPatch) -> None:
    fitter = _fitter(workpiece, 0.5)
    right = fitter.fit(Candidate(numbers="float32"), uniform_share())
    assert right is not None
    candidate, allowed = right.candidate, fitter.allowed["macs"]
    times = iter([0.9, 1.2])
    monkeypatch.setattr(
        type(fitter.bench), "measure", lambda self, *args, **kwargs: {"macs": next(times) * allowed}
    )
    fitter._measured.clear()
    assert fitter.measure(candidate).fits
    confirmed = fitter.confirmed(candidate)
    assert confirmed.over == pytest.approx(1.05)
    assert not confirmed.fits
    assert fitter.measure(candidate) == confirmed


def test_long_searches_may_leave_sensitive_layers_in_float(workpiece: Workpiece) -> None:
    """The layers whose output is farthest from its float self when they alone are rounded; searches begin without."""
    model = zoo.digits_resnet((8, 16), (2, 1)).eval()
    with torch.no_grad():  # one channel is so much larger that the others have few levels left
        model.stages[1][0].conv2.weight[:, 3] *= 300
        model.stages[1][0].bn1.weight[3] /= 300
    own = Workpiece(model, workpiece.inputs, {}, workpiece.batches, workpiece.loss)
    short, long = (
        Beginning(_fitter(own, 0.3), ("blocks", "widths", "int8"), True, trials, lambda variant: None)
        for trials in (10, 20)
    )
    few, many = short.choices(), long.choices()
    assert few.float_layers == many.float_layers[: len(few.float_layers)]
    added = many.float_layers[len(few.float_layers) :]
    assert [len(sets) - len(few.float_layers[0]) for sets in added] == [1, 2]
    assert added[0][-1] == "stages.1.0.conv2"
    assert all(wish.base.float_layers in few.float_layers for wish in long.wishes(many))


def test_a_budget_that_is_out_of_reach(workpiece: Workpiece) -> None:
    found = _fitter(workpiece, 0.001).fit(Candidate(numbers="float32"), uniform_share())
    assert found is None or not found.fits
