"""Variables of a model, and ratios that become counts within a budget."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dwindle.config.errors import ConfigError
from dwindle.graph import analyse
from dwindle.realize.cost import CostModel
from dwindle.search import Space
from pruning.models import Attention
from search.models import images, tiny

ANALYSIS = analyse(tiny(), (images(2),))
SPACE = Space.of(ANALYSIS)
COST = CostModel.of(ANALYSIS).macs


def test_every_axis_is_a_variable_in_the_order_of_the_forward() -> None:
    assert [(v.name, v.size) for v in SPACE.variables] == [
        ("stem.weight[0]", 8),
        ("inner.weight[0]", 16),
        ("wide.weight[0]", 24),
        ("hidden.weight[0]", 16),
    ]
    assert [v.least for v in SPACE.variables] == [1, 2, 2, 2]  # a tenth, rounded


def test_counts_and_ratios_are_inverse_of_each_other() -> None:
    counts = SPACE.counts({"stem.weight[0]": 0.5, "hidden.weight[0]": 0.25})
    assert SPACE.named(counts) == {
        "stem.weight[0]": 4,
        "inner.weight[0]": 16,
        "wide.weight[0]": 24,
        "hidden.weight[0]": 12,
    }
    assert SPACE.ratios(counts)["hidden.weight[0]"] == 0.25
    assert SPACE.from_names(SPACE.named(counts)) == counts


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.floats(0.05, 1), st.sampled_from([1, 2, 4]))
def test_a_fit_is_within_the_budget_to_one_block(ratios: list[float], share: float, multiple: int) -> None:
    space = Space.of(ANALYSIS, round_to=multiple)
    budget = share * COST(space.full())
    if COST(space.smallest()) > budget:
        with pytest.raises(ConfigError, match="cannot be reached"):
            space.fit({}, COST, budget)
        return
    names = [variable.name for variable in space.variables]
    counts = space.fit(dict(zip(names, ratios, strict=True)), COST, budget)
    assert COST(counts) <= budget
    for variable in space.variables:
        count = counts[variable.axis]
        assert variable.least <= count <= variable.size
        assert count % multiple == 0 or count == variable.size
        if count < variable.size:
            next_one = min(variable.size, count + multiple)
            assert COST({**counts, variable.axis: next_one}) > budget


def test_a_fit_keeps_ratios_that_meet_the_budget_already() -> None:
    ratios = {"stem.weight[0]": 0.25, "inner.weight[0]": 0.5, "wide.weight[0]": 0.25, "hidden.weight[0]": 0.5}
    counts = SPACE.counts(ratios)
    assert SPACE.fit(ratios, COST, COST(counts)) == counts


def test_constraints_between_counts_hold() -> None:
    torch.manual_seed(0)
    model = Attention()
    analysis = analyse(model, (torch.randn(2, 5, 24),))
    space = Space.of(analysis, largest_ratio=0.7)
    cost = CostModel.of(analysis).elements
    for share in (0.9, 0.6, 0.45):
        counts = space.fit({v.name: 0.5 for v in space.variables}, cost, share * cost(space.full()))
        assert all(space.solver.holds(constraint, counts) for constraint in space.solver.constraints)
        assert cost(counts) <= share * cost(space.full())


def test_names_tell_all_axes_apart() -> None:
    class Fused(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = torch.nn.Linear(6, 16)
            self.left, self.right = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = self.both(x).chunk(2, -1)
            return self.left(left.relu()) + self.right(right.relu())

    analysis = analyse(Fused(), (torch.randn(3, 6),))
    names = [variable.name for variable in Space.of(analysis).variables]
    assert len(names) == len(set(names)) == len(analysis.selected())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"largest_ratio": 1.0}, "emptied"),
        ({"largest_ratio": -0.1}, "largest_ratio"),
        ({"minimum": 0}, "minimum"),
        ({"round_to": 0}, "round_to"),
        ({"ignore": ["*"]}, "no axis"),
        ({"kinds": ["heads"]}, "no axis"),
    ],
)
def test_bad_bounds_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Space.of(ANALYSIS, **arguments)


def test_unknown_names_and_impossible_counts_are_refused() -> None:
    with pytest.raises(ConfigError, match="no variable"):
        SPACE.from_names({"nothing": 3})
    for count in itertools.chain([0, -1], [9]):
        with pytest.raises(ConfigError, match="cannot stay"):
            SPACE.from_names({"stem.weight[0]": count})
