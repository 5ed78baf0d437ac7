"""One wrong rule on one model: was it caught, did it freeze, did it change nothing that matters, or did it survive?"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn

import dwindle as dw
from dwindle.config.errors import DwindleError
from dwindle.graph.analysis import Analysis, analyse
from dwindle.graph.positions import kept_positions, positions
from support.architectures.example import Example
from support.independent import independent_difference
from support.mutation.models import MODELS
from support.mutation.rules import OPERATORS, Hits, Mutation

#: Kinds of axes to prune in turn: heads first, then the width of heads.
WAYS = (None, ("channels", "embedding", "feed_forward", "head_width"))


@dataclass(slots=True)
class Outcome:
    """What became of one mutation over all models on which it acted.

    Attributes:
        caught: Trials in which ``prune`` raised and left the model as it was.
        frozen: Trials in which nothing was cut.
        equivalent: Trials in which the cut was a right one all the same.
        survived: Trials in which a wrong result was handed out: model, and what is wrong with it.
    """

    caught: Counter[str] = field(default_factory=Counter)
    frozen: Counter[str] = field(default_factory=Counter)
    equivalent: Counter[str] = field(default_factory=Counter)
    survived: list[str] = field(default_factory=list)


def build(name: str, seed: int) -> tuple[nn.Module, torch.Tensor]:
    """A model and its input, always the same for a seed."""
    torch.manual_seed(seed)
    model, x = MODELS[name]()
    return model.double(), x.double() if x.is_floating_point() else x


@cache
def operators(name: str) -> frozenset[str]:
    """Names of the operators that a model calls, in either mode."""
    model, x = build(name, 0)
    return frozenset(node.name for trace in analyse(model, (x,)).traces for node in trace.nodes)


def models_for(mutation: Mutation) -> list[str]:
    """Models that call an operator which the mutation concerns."""
    own = OPERATORS.get(mutation)
    return [name for name in MODELS if own is None or operators(name) & set(own)]


def prune(model: nn.Module, x: torch.Tensor, seed: int) -> dw.ShrinkResult:
    """Prune with random scores."""
    generator = torch.Generator().manual_seed(seed)
    return dw.prune(
        model,
        (x,),
        ratio=0.5,
        importance=lambda weight, dim: torch.rand(weight.shape[dim], generator=generator),
        axes=WAYS[seed % len(WAYS)],
        scope=("local", "global")[seed % 2],
    )


def try_mutation(mutation: Mutation, name: str, seed: int, outcome: Outcome) -> None:
    """Prune one model under a wrong rule and enter what happened."""
    model, x = build(name, seed)
    before = copy.deepcopy(model)
    hits: Hits = []
    refusal: DwindleError | None = None
    with mutation(hits):
        try:
            result = prune(model, x, seed)
        except DwindleError as error:
            refusal = error
    if refusal is not None:
        if not hits:
            raise refusal
        _assert_untouched(model, before, x)
        outcome.caught[name] += 1
        return
    if not hits:
        return
    if not result.plan.keep:
        outcome.frozen[name] += 1
        return
    wrong = what_is_wrong(before, result, x)
    if wrong is None or _is_plainly_equal(before, result, x):
        outcome.equivalent[name] += 1
    else:
        outcome.survived.append(f"{name}: {wrong}")


def _is_plainly_equal(before: nn.Module, result: dw.ShrinkResult, x: torch.Tensor) -> bool:
    """Whether the result is a masked copy all the same: another cut than the rules would make, but a right one."""
    try:
        return independent_difference(before, result.model, result.plan.keep, Example(before, (x,))) < 1e-9
    except Exception:
        return False


def _assert_untouched(model: nn.Module, before: nn.Module, x: torch.Tensor) -> None:
    assert type(model) is type(before)
    assert repr(model) == repr(before)
    own, other = model.state_dict(), before.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[key], other[key]) for key in own)
    for one, two in zip(model.modules(), before.modules(), strict=True):
        numbers = {
            key: held for key, held in vars(one).items() if isinstance(held, int | float | tuple | str)
        }
        assert numbers == {key: vars(two)[key] for key in numbers}
    model.eval()
    before.eval()
    assert torch.equal(model(x), before(x))


def what_is_wrong(before: nn.Module, result: dw.ShrinkResult, x: torch.Tensor) -> str | None:
    """Hold a result that was handed out against the right analysis; None where it is a right cut after all."""
    analysis = analyse(before, (x,))
    keep = _keep_of(analysis, result.plan.keep)
    for name, axes in analysis.parameter_axes.items():
        for dim, axis in enumerate(axes):
            stay = kept_positions(axis, keep, analysis.memory)
            wanted = list(range(axis.size)) if stay is None else stay.tolist()
            given = result.plan.keep.get(name, {}).get(dim)
            found = list(range(axis.size)) if given is None else given.tolist()
            if wanted != found:
                return f"{name}[{dim}] keeps {found}, coupled to what keeps {wanted}"
    frozen = [leaf for leaf, chosen in keep.items() if leaf.frozen is not None and not bool(chosen.all())]
    if frozen:
        return f"an axis lost indices that is frozen: {frozen[0].frozen}"
    torch.manual_seed(9)
    small = result.model
    for training in (False, True):
        small.train(training)
        try:
            small(x)
        except Exception as error:
            return f"it does not run in {'training' if training else 'evaluation'} mode: {error}"
    return None


def _keep_of(analysis: Analysis, plan_keep: dict[str, dict[int, torch.Tensor]]) -> dict[Any, torch.Tensor]:
    """Which indices of each leaf stay, when an index goes where all of its positions in some dimension went."""
    keep: dict[Any, torch.Tensor] = {}
    for name, dims in plan_keep.items():
        for dim, index in dims.items():
            axis = analysis.parameter_axes[name][dim]
            here = torch.zeros(axis.size, dtype=torch.bool)
            here[index] = True
            for leaf, own in positions(axis).items():
                stays = torch.zeros(leaf.size, dtype=torch.bool)
                stays[own[here & (own >= 0)]] = True
                keep[leaf] = keep.get(leaf, torch.ones_like(stays)) & stays
    return keep
