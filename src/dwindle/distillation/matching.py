"""Which module of the teacher corresponds to a module of the student: by path, else by shape and depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.graph.modes import modes_kept

__all__ = ["Feature", "ShapeMatcher", "corresponding_path", "evenly_spaced", "observed_features"]


@dataclass(frozen=True)
class Feature:
    """What a module gave when the model was run once.

    Attributes:
        module: Its path.
        shape: Of its (first) output.
        kind: Name of its class.
        is_leaf: Whether it has no modules inside.
    """

    module: str
    shape: tuple[int, ...]
    kind: str
    is_leaf: bool


def evenly_spaced(position: int, count: int, other_count: int) -> int:
    """Return the place among ``other_count`` that corresponds to a place among ``count``: the last to the last.

    The k-th of n corresponds to the (k * m / n)-th of m, as in Sun et al., "Patient Knowledge Distillation"
    (https://arxiv.org/abs/1908.09355, "skip") and TinyBERT (https://arxiv.org/abs/1909.10351, uniform).

    Args:
        position: From 0 on.
        count: How many there are.
        other_count: How many there are in the other model.
    """
    return max((2 * (position + 1) * other_count + count) // (2 * count) - 1, 0)


def corresponding_path(path: str, student: nn.Module, teacher: nn.Module) -> str | None:
    """Return the path in the teacher that corresponds to a path in the student, or None.

    It is the same path, except that entries of a list of blocks (numbered modules of one class) are spread evenly over
    the teacher's list where that is longer or shorter: of 6 and 12 layers, the first corresponds to the second.

    Args:
        path: Of a module of the student.
        student: The student.
        teacher: The teacher.
    """
    mine: nn.Module | None = student
    theirs: nn.Module | None = teacher
    found: list[str] = []
    for part in path.split(".") if path else []:
        assert mine is not None
        if theirs is None:
            break
        own, other = _entries(mine), _entries(theirs)
        step = part
        if part in own and other and len(own) != len(other):
            step = other[evenly_spaced(own.index(part), len(own), len(other))]
        mine, theirs = mine._modules.get(part), theirs._modules.get(step)
        found.append(step)
    if theirs is not None:
        return ".".join(found)
    return path if path in dict(teacher.named_modules()) else None


def _entries(module: nn.Module) -> list[str]:
    """Names of the numbered children of a module in their order, when all are of one class; else nothing."""
    numbered = {name: type(child) for name, child in module._modules.items() if name.isdigit() and child}
    if len(set(numbered.values())) != 1 or len(numbered) != len(module._modules):
        return []
    return sorted(numbered, key=int)


def observed_features(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Feature]:
    """Run a model once in evaluation mode and return what each of its modules gave, in the order in which they end.

    Args:
        model: Left as it was.
        args: Positional inputs.
        kwargs: Keyword inputs.
    """
    found: dict[str, Feature] = {}

    def keep(name: str, module: nn.Module, output: Any) -> None:
        first = output[0] if isinstance(output, list | tuple) and output else output
        if isinstance(first, Tensor) and first.is_floating_point() and name:
            leaf = next(module.children(), None) is None
            found.setdefault(name, Feature(name, tuple(first.shape), type(module).__name__, leaf))

    handles = [
        module.register_forward_hook(lambda own, _, output, name=name: keep(name, own, output))
        for name, module in model.named_modules()
    ]
    try:
        with modes_kept(model), torch.no_grad():
            model.eval()
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


class ShapeMatcher:
    """Find the teacher's modules that stand where the student's do, by their shapes and their order.

    A student's feature corresponds to a teacher's of the same sizes apart from the channels. Of several, those of the
    student's own class come first, else those that hold modules as it does. Among what is left, the k-th of the
    student's n features of these sizes that are to be matched takes the (k * m / n)-th of the teacher's m.

    Args:
        student: Features of the student, in the order in which they are computed.
        teacher: Features of the teacher.
        wanted: Paths of the student's modules that are to be matched.
    """

    def __init__(self, student: Sequence[Feature], teacher: Sequence[Feature], wanted: Sequence[str]):
        self.teacher = teacher
        self.student = {feature.module: feature for feature in student}
        self.wanted = [feature for feature in student if feature.module in set(wanted)]

    def match(self, module: str) -> str | None:
        """Return the path of the teacher's module, or None when there is none of this rank."""
        own = self.student.get(module)
        if own is None:
            return None
        candidates = self._candidates(own)
        if not candidates:
            return None
        peers = [other.module for other in self.wanted if _sizes(other.shape) == _sizes(own.shape)]
        return candidates[evenly_spaced(peers.index(module), len(peers), len(candidates))].module

    def _candidates(self, own: Feature) -> list[Feature]:
        found = [other for other in self.teacher if _sizes(other.shape) == _sizes(own.shape)]
        found = found or [other for other in self.teacher if len(other.shape) == len(own.shape)]
        for alike in (
            [other for other in found if other.kind == own.kind],
            [other for other in found if other.is_leaf == own.is_leaf],
        ):
            if alike:
                return alike
        return found


def _sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Rank and everything but the channels: sizes of maps, tokens of sequences."""
    return (len(shape), *(shape[2:] if len(shape) >= 4 else shape[1:-1]))
