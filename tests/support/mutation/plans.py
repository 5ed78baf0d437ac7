"""Deliberately wrong steps behind the rules: positions, plans, counts, attributes, constraints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from dwindle.graph import analysis as analysis_module
from dwindle.graph import positions as positions_module
from dwindle.graph import propagate as propagate_module
from dwindle.graph.counts import CountSolver
from dwindle.realize import shrink as shrink_module
from support.mutation.rules import MUTATIONS, Hits, Mutation


def changed_plan(change: Callable[[Any, Hits], None]) -> Mutation:
    """A mutation of every plan that is made."""

    @contextmanager
    def apply(hits: Hits) -> Iterator[None]:
        make = shrink_module.make_plan

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            plan = make(*args, **kwargs)
            change(plan, hits)
            return plan

        with mock.patch.object(shrink_module, "make_plan", wrapped):
            yield

    return apply


def shifted(choose: Callable[[str, int], bool], number: int = 0) -> Mutation:
    """One index of one dimension of one tensor is off by one."""

    def change(plan: Any, hits: Hits) -> None:
        places = [(name, dim) for name, dims in plan.keep.items() for dim in dims if choose(name, dim)]
        if len(places) > number:
            name, dim = places[number]
            index = plan.keep[name][dim]
            moved = _one_moved(index)
            if moved is not None:
                plan.keep[name][dim] = moved
                hits.append(f"{name}[{dim}]")

    return changed_plan(change)


def _one_moved(index: torch.Tensor) -> torch.Tensor | None:
    """The last index that can step down by one does so."""
    held = index.tolist()
    for place in range(len(held) - 1, -1, -1):
        if held[place] > 0 and held[place] - 1 not in held:
            return torch.tensor(sorted([*held[:place], held[place] - 1, *held[place + 1 :]]))
    return None


for place in range(6):
    MUTATIONS[f"index off by one, dimension {place} of the plan"] = shifted(lambda name, dim: True, place)
MUTATIONS["index off by one in a bias"] = shifted(lambda name, dim: name.endswith("bias"))
MUTATIONS["index off by one in columns"] = shifted(lambda name, dim: dim == 1)
MUTATIONS["index off by one in a running mean"] = shifted(lambda name, dim: "running_mean" in name)
MUTATIONS["index off by one in a running variance"] = shifted(lambda name, dim: "running_var" in name)


def _other_order(plan: Any, hits: Hits) -> None:
    """The kept rows of one weight stand in another order."""
    for name, dims in plan.keep.items():
        if 0 in dims and dims[0].numel() > 1:
            dims[0] = dims[0].roll(1)
            hits.append(name)
            return


MUTATIONS["kept rows in another order"] = changed_plan(_other_order)


def _no_attributes(plan: Any, hits: Hits) -> None:
    if plan.attributes:
        hits.append("attributes")
        plan.attributes = []


def _attributes_off(plan: Any, hits: Hits) -> None:
    for change in plan.attributes:
        change.new += 1
        hits.append(change.key)


MUTATIONS["attributes are not corrected"] = changed_plan(_no_attributes)
MUTATIONS["attributes are off by one"] = changed_plan(_attributes_off)


@contextmanager
def _rolled_segments(hits: Hits) -> Iterator[None]:
    original = positions_module._concatenated

    def wrapped(axis: Any, memory: Any) -> Any:
        found = original(axis, memory)
        hits.append("concatenation")
        return {leaf: index.roll(1) for leaf, index in found.items()}

    with mock.patch.object(positions_module, "_concatenated", wrapped):
        yield


@contextmanager
def _mirrored_products(hits: Hits) -> Iterator[None]:
    original = positions_module._multiplied

    def wrapped(axis: Any, memory: Any) -> Any:
        found = original(axis, memory)
        if len(found) < 1 or len(axis.parts) != 2:
            return found
        first, second = (part.find().size for part in axis.parts)
        hits.append("product")
        return {leaf: index.view(first, second).T.reshape(-1) for leaf, index in found.items()}

    with mock.patch.object(positions_module, "_multiplied", wrapped):
        yield


MUTATIONS["positions of concatenations off by one"] = _rolled_segments
MUTATIONS["positions of products inner first"] = _mirrored_products


@contextmanager
def _no_counts(hits: Hits) -> Iterator[None]:
    def solve(self: CountSolver, desired: Any, multiple: int = 1) -> Any:
        if self.constraints:
            hits.append("counts")
        return dict(desired)

    with mock.patch.object(CountSolver, "solve", solve):
        yield


@contextmanager
def _no_scales(hits: Hits) -> Iterator[None]:
    def nothing(*args: Any) -> list[Any]:
        hits.append("scales")
        return []

    with mock.patch.object(shrink_module, "plan_scalings", nothing):
        yield


@contextmanager
def _wrong_scales(hits: Hits) -> Iterator[None]:
    original = shrink_module.plan_scalings

    def wrapped(*args: Any) -> Any:
        found = original(*args)
        for scaling in found:
            hits.append(scaling.parameter)
            scaling.factor *= 1.001
        return found

    with mock.patch.object(shrink_module, "plan_scalings", wrapped):
        yield


@contextmanager
def _outputs_may_shrink(hits: Hits) -> Iterator[None]:
    original = propagate_module.algebra.freeze

    def freeze(axis: Any, reason: str, where: str | None = None) -> None:
        if reason == "model output":
            hits.append(reason)
            return
        original(axis, reason, where)

    with mock.patch.object(propagate_module.algebra, "freeze", freeze):
        yield


@contextmanager
def _inputs_may_shrink(hits: Hits) -> Iterator[None]:
    original = propagate_module.algebra.leaf

    def leaf(size: int, frozen: str | None = None, where: str | None = None) -> Any:
        if frozen == "model input":
            hits.append(frozen)
            frozen = None
        return original(size, frozen, where)

    with mock.patch.object(propagate_module.algebra, "leaf", leaf):
        yield


@contextmanager
def _no_training(hits: Hits) -> Iterator[None]:
    """The training graph is not looked at."""
    original = analysis_module.propagate

    def wrapped(traces: Any) -> Any:
        hits.append("training")
        del traces[1:]
        return original(traces)

    with mock.patch.object(analysis_module, "propagate", wrapped):
        yield


MUTATIONS["sizes that must agree are not solved"] = _no_counts
MUTATIONS["temperatures are not compensated"] = _no_scales
MUTATIONS["temperatures are compensated by too much"] = _wrong_scales
MUTATIONS["outputs may shrink"] = _outputs_may_shrink
MUTATIONS["inputs may shrink"] = _inputs_may_shrink
MUTATIONS["the training graph is not looked at"] = _no_training
