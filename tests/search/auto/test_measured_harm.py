"""Curves of sensitivity as the harm of the joint search."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import dwindle as dw
from dwindle.config.errors import ConfigError
from dwindle.search.auto.allocation import uniform_counts
from dwindle.search.auto.candidate import Candidate
from dwindle.search.auto.joint import Wish
from dwindle.search.auto.limits import Limit
from dwindle.search.auto.measured_harm import HarmCurves, equal_drop_share
from dwindle.search.auto.predicting import PredictedCosts
from dwindle.search.auto.variant import Variant, Workpiece

RATIOS = (0.25, 0.5, 0.75)


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the sum."""
        hidden: Tensor = self.second(self.first(inputs).relu())
        return inputs + hidden


@pytest.fixture(scope="module")
def workpiece() -> Workpiece:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), _Residual(), _Residual(), nn.Linear(16, 4)).eval()
    return Workpiece(model, (torch.randn(2, 8),), {}, [torch.randn(64, 8)], None)


@pytest.fixture(scope="module")
def curves(workpiece: Workpiece) -> HarmCurves:
    found = dw.sensitivity(
        workpiece.model, workpiece.batches, kinds=["pruning"], ratios=RATIOS, progress=False
    )
    return HarmCurves.of(workpiece.variant().space, found)


def _costs(variant: Variant, share: float) -> PredictedCosts:
    whole = PredictedCosts(
        variant.problem.analysis, [Limit("macs", 1.0, False)], {"macs": 1.0},
        integers=False, float_layers=(), latencies={},
    ).predicted("macs", variant.space.full())  # fmt: skip
    return PredictedCosts(
        variant.problem.analysis, [Limit("macs", share, False)], {"macs": share * whole},
        integers=False, float_layers=(), latencies={},
    )  # fmt: skip


def _noise(workpiece: Workpiece, counts: dict[str, int]) -> float:
    small = workpiece.variant().cut(workpiece.variant().space.from_names(counts), "l1")
    with torch.no_grad():
        whole = workpiece.model(workpiece.batches[0])
        change = small(workpiece.batches[0]) - whole
    return float(change.square().sum() / whole.square().sum())


def test_the_harm_of_one_axis_is_what_its_cut_was_measured_to_leave(
    workpiece: Workpiece, curves: HarmCurves
) -> None:
    for variable in workpiece.variant().space.variables:
        assert curves.harm(variable, variable.size) == 0
        noise = _noise(workpiece, {variable.name: 3 * variable.size // 4})
        assert noise < 0.9
        assert curves.harm(variable, 3 * variable.size // 4) == pytest.approx(-math.log(1 - noise), rel=1e-4)
        harms = [curves.harm(variable, count) for count in range(variable.size, 0, -1)]
        assert harms == sorted(harms)


def test_a_ruined_axis_goes_on_harming() -> None:
    place = ("0.weight", 0)
    own = HarmCurves({place: ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.75, 1.0))})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    variable = (
        Workpiece(model, (torch.randn(1, 4),), {}, [torch.randn(8, 4)], None).variant().space.variables[0]
    )
    assert own.harm(variable, 6) == pytest.approx(math.log(2))
    assert own.harm(variable, 5) == pytest.approx((math.log(2) + math.log(20) + 1) / 2)
    assert own.harm(variable, 4) == pytest.approx(math.log(20) + 1)


def test_curves_hold_for_a_variant_without_a_block(workpiece: Workpiece, curves: HarmCurves) -> None:
    whole, less = workpiece.variant(), workpiece.variant(("3",))
    assert len(less.space.variables) == len(whole.space.variables) - 1
    for variable in less.space.variables:
        same = whole.space.by_name[variable.name]
        assert curves.harm(variable, variable.size // 2) == curves.harm(same, same.size // 2) > 0


@pytest.mark.parametrize("share", [0.4, 0.7])
def test_equal_drop_within_the_limit(workpiece: Workpiece, curves: HarmCurves, share: float) -> None:
    variant = workpiece.variant()
    costs = _costs(variant, share)
    counts = equal_drop_share(curves)(variant, costs)
    assert counts is not None
    assert 0.8 < costs.over(counts)[0] <= 1
    uniform = uniform_counts(variant.space, costs.over)
    assert uniform is not None
    largest = [max(curves.harm(v, own[v.axis]) for v in variant.space.variables) for own in (counts, uniform)]
    assert largest[0] <= largest[1]  # no share within the limit has a smaller largest drop


def test_wishes_need_curves(workpiece: Workpiece, curves: HarmCurves) -> None:
    variant = workpiece.variant()
    costs = _costs(variant, 0.5)
    for share in ("measured", "equal drop"):
        wish = Wish.from_json(Wish(Candidate(), share, {}).to_json())
        with pytest.raises(ConfigError, match="needs measured harm"):
            wish.how(lambda own: None)
        counts = wish.how(lambda own: None, curves)(variant, costs)
        assert counts is not None
        assert costs.over(counts)[0] <= 1
    greedy = Wish(Candidate(), "measured", {}).how(lambda own: None, curves)(variant, costs)
    uniform = Wish(Candidate(), "uniform", {}).how(lambda own: None)(variant, costs)
    assert greedy is not None
    assert uniform is not None
    harms = [sum(curves.harm(v, own[v.axis]) for v in variant.space.variables) for own in (greedy, uniform)]
    assert harms[0] <= harms[1]
