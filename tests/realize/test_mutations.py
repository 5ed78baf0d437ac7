"""Deliberately wrong rules are caught every time: ``prune`` refuses and leaves the model as it was.

A trial is one wrong rule on one small model. It may end in a refusal (caught), in nothing being cut (frozen), or in a
cut that is right all the same (equivalent): the right analysis makes the same cut, or the plainly masked original
equals the result. It must never end in a wrong result. Each wrong rule must be caught at least once, but for those
that are argued below to be no mistakes.
"""

from __future__ import annotations

import pytest

import support.mutation.plans  # noqa: F401  (adds its mutations to the table)
from support.mutation.models import MODELS
from support.mutation.rules import MUTATIONS
from support.mutation.trial import Outcome, build, models_for, prune, try_mutation
from support.thoroughness import EXAMPLES

#: Wrong rules that cannot do harm, and why.
HARMLESS = {
    "summed up indices may go": "a running sum over zeros is the running sum over what stays; the freeze is caution",
    "weight norm does not mix": "a norm over masked columns is the norm over what stays, and rows of zeros are read "
    "by zeros only",
}

#: In `make test` a wrong rule is tried until it was caught and acted on this many models; all otherwise.
ENOUGH = 3


@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_a_wrong_rule_is_caught(name: str) -> None:
    mutation, outcome = MUTATIONS[name], Outcome()
    trials = [(model, seed) for seed in (0, 1) for model in models_for(mutation)]
    for model, seed in trials:
        try_mutation(mutation, model, seed, outcome)
        assert not outcome.survived
        acted = len(outcome.caught) + len(outcome.frozen) + len(outcome.equivalent)
        if not EXAMPLES and outcome.caught and acted >= ENOUGH:
            break
    assert outcome.caught or outcome.equivalent or outcome.frozen, "the wrong rule was never used"
    assert bool(outcome.caught) is (name not in HARMLESS)


def test_there_are_enough_of_them() -> None:
    assert len(MUTATIONS) >= 60
    assert len(MODELS) >= 50
    assert set(HARMLESS) < set(MUTATIONS)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_models_are_pruned_where_no_rule_is_wrong(name: str) -> None:
    """Otherwise a refusal would say nothing about the wrong rule."""
    model, x = build(name, 0)
    result = prune(model, x, 0)
    assert result.verification is not None
    assert result.verification.proven
    frozen = {"by number", "rolled", "first channel", "summed up", "sorted", "flipped", "literal", "square"}
    assert bool(result.plan.keep) is (name not in frozen)
