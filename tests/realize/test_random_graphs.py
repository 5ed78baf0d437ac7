"""Random small models of the supported operators: whatever is cut is proven, or it was frozen.

Every failure found so far stays below as an explicit example.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field

import torch
from hypothesis import given
from hypothesis import strategies as st

import dwindle as dw
from support.architectures.example import Example
from support.independent import compare
from support.random_graphs import STEPS, Specification, build
from support.random_graphs.network import STARTS
from support.thoroughness import EXAMPLES, thoroughness

#: Examples in `make test`.
QUICK = 100
KINDS = (
    None,
    None,
    None,
    ("channels", "feed_forward", "embedding"),
    ("channels", "head_width"),
    ("channels", "heads"),
)


@dataclass(frozen=True, slots=True)
class Wish:
    """How a random model is pruned."""

    ratio: float = 0.5
    exact: bool = False
    scope: str = "local"
    round_to: int = 1
    kinds: tuple[str, ...] | None = None
    ratios: tuple[float, ...] = ()
    seed: int = 0


specifications = st.builds(
    Specification,
    st.sampled_from(STARTS),
    st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9999)), min_size=4, max_size=10).map(
        tuple
    ),
    st.integers(0, 99),
)
wishes = st.builds(
    Wish,
    st.sampled_from([0.5, 0.25, 0.7, 0.9]),
    st.booleans(),
    st.sampled_from(["local", "local", "global"]),
    st.sampled_from([1, 1, 2, 4]),
    st.sampled_from(KINDS),
    st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.8]), max_size=6).map(tuple),
    st.integers(0, 10**6),
)


def prune(example: Example, wish: Wish) -> dw.ShrinkResult:
    """Prune with random scores, and a random ratio for some of the parameters."""
    generator = torch.Generator().manual_seed(wish.seed)
    names = [name for name, _ in example.model.named_parameters()]
    order = torch.randperm(len(names), generator=generator).tolist()
    return dw.prune(
        example.model,
        example.args,
        ratio=wish.ratio,
        ratios={names[place]: own for place, own in zip(order, wish.ratios, strict=False)},
        importance=lambda weight, dim: torch.rand(weight.shape[dim], generator=generator),
        scope=wish.scope,
        round_to=wish.round_to,
        axes=wish.kinds,
        exact=wish.exact,
    )


@dataclass(slots=True)
class Tally:
    """What the examples of one run amounted to, so that the test cannot pass by doing nothing."""

    runs: int = 0
    cut: int = 0
    plain: int = 0
    inside: int = 0
    in_training: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)


def check(specification: Specification, wish: Wish, tally: Tally) -> None:
    """Prune one random model; raises where the proof fails, or the independent one, or a training step."""
    example = build(specification)
    original = copy.deepcopy(example.model)
    result = prune(example, wish)
    tally.runs += 1
    tally.steps.update(name for name, _ in specification.steps)
    assert result.verification is not None
    assert result.verification.proven
    if not result.plan.keep:
        assert result.parameters_after == result.parameters_before
        return
    tally.cut += 1
    assert result.parameters_after < result.parameters_before
    tally.kinds.update(entry["kind"] for entry in result.plan.cuts)
    sizes = {(entry["before"], *entry["parameters"]): entry["after"] for entry in result.plan.cuts}
    cut = [
        info
        for info in result.analysis.axes
        if (info.size, *(f"{name}[{dim}]" for name, dim in info.parameter_dims)) in sizes
    ]
    assert len(cut) >= len(sizes)
    if all(info.exact for info in cut):
        tally.plain += 1
        found = compare(original, result.model, result.plan.keep, example)
        assert found.difference < 1e-9
        if found.training_difference is not None:
            tally.in_training += 1
            assert found.training_difference < 1e-6
    else:
        tally.inside += 1
        assert not wish.exact
    result.model.train()
    result.model(*example.args).square().sum().backward()
    assert any(parameter.grad is not None for parameter in result.model.parameters())


def test_random_models_are_proven_or_frozen() -> None:
    tally = Tally()

    @given(specifications, wishes)
    @thoroughness(QUICK)
    def run(specification: Specification, wish: Wish) -> None:
        check(specification, wish, tally)

    run()
    # not by doing nothing
    assert tally.runs >= (EXAMPLES or QUICK)
    assert tally.cut > 0.6 * tally.runs
    assert tally.plain > 0.3 * tally.runs
    assert tally.inside > 0.03 * tally.runs
    assert tally.in_training > 0.15 * tally.runs
    print(tally)


def test_start_and_length_of_the_same_number_are_told_apart() -> None:
    """``x.narrow(1, 4, 4)``: the length was taken for the start, and stayed."""
    specification = Specification("image", (("space", 945), ("split", 301)), 95)
    split = build(specification).model.steps[1]  # type: ignore[index]
    assert (split.way, split.first, split.second) == ("narrow", 4, 4)
    for seed in range(3):
        check(specification, Wish(seed=seed), Tally())


def test_every_step_is_built_and_pruned_alone() -> None:
    """Each step between two layers, in whatever layout takes it."""
    tally = Tally()
    missing = set(STEPS)
    for name in sorted(STEPS):
        for seed in range(40):
            start = STARTS[seed % len(STARTS)]
            specification = Specification(start, (("dense", seed), (name, seed), ("dense", seed + 1)), seed)
            if name in missing and len(list(build(specification).model.steps)) == 3:  # type: ignore[arg-type]
                check(specification, Wish(seed=seed), tally)
                missing.discard(name)
    assert not missing - {"tokens_to_vector"}
    assert tally.cut > 0.8 * len(STEPS)
