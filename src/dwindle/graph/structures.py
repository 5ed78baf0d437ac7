"""What a tensor dimension is made of: leaves, products and concatenations, and the forest that joins them.

An :class:`Axis` is a node of a union-find forest. It is a *leaf* (channels of a stage, heads, tokens), a
*product* of axes (a row-major flattening, outermost factor first) or a *concatenation* of axes. What
cannot be related is *frozen*: never pruned, always safe.

A channel shuffle makes two more kinds. Where a concatenation of equal segments is viewed as (segments, width), the
width is *parallel*: at segment g it stands for the indices of segment g, so that segments need equal counts but not
equal indices. Where the segments then become the inner dimension, the flattened axis is *interleaved*: its positions
take one index of each part in turn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

LEAF, PRODUCT, CONCATENATION = "leaf", "product", "concatenation"
PARALLEL, INTERLEAVED = "parallel", "interleaved"

_numbers = count()


@dataclass(eq=False, slots=True)
class Axis:
    """One axis. Use :meth:`find` before reading any other field: axes are merged while rules run.

    Attributes:
        size: Number of indices.
        kind: ``"leaf"``, ``"product"``, ``"concatenation"``, ``"parallel"`` or ``"interleaved"``.
        parts: The factors (outermost first), the segments, or what takes turns; empty for a leaf.
        frozen: Why no index of this axis may be removed; None when it is free.
        where: Source line of what froze it, ``"file.py:12"``, when known.
        before: Of an interleaved axis: the pieces of the same whole in front of it, whose size says whose turn it is.
        selector: Of a parallel axis: the dimension that says which part is meant.
    """

    size: int
    kind: str = LEAF
    parts: tuple[Axis, ...] = ()
    frozen: str | None = None
    where: str | None = None
    parent: Axis | None = None
    before: tuple[Axis, ...] = ()
    selector: Axis | None = None
    number: int = field(default_factory=lambda: next(_numbers))

    def find(self) -> Axis:
        """Return the representative of the class this axis was merged into."""
        root = self
        while root.parent is not None:
            root = root.parent
        node = self
        while node.parent is not None:
            node.parent, node = root, node.parent
        return root

    def leaves(self) -> Iterator[Axis]:
        """Yield the representatives of the leaves below this axis, in order, repeated where they repeat."""
        axis = self.find()
        if axis.kind == LEAF:
            yield axis
        else:
            for part in axis.parts:
                yield from part.leaves()

    def __repr__(self) -> str:
        axis = self.find()
        if axis.kind == LEAF:
            return f"{axis.size}{'!' if axis.frozen else ''}#{axis.number}"
        sign = {PRODUCT: " x ", CONCATENATION: " + ", PARALLEL: " | ", INTERLEAVED: " ~ "}[axis.kind]
        return "(" + sign.join(repr(part) for part in axis.parts) + ")"


#: The axis of every dimension of size one. It has nothing to remove.
UNIT = Axis(1, frozen="size 1")


def freeze(axis: Axis, reason: str, where: str | None = None) -> None:
    """Forbid removal of any index of ``axis``; the first reason given stays."""
    for leaf in axis.leaves():
        if leaf.frozen is None:
            leaf.frozen, leaf.where = reason, where


def leaf(size: int, frozen: str | None = None, where: str | None = None) -> Axis:
    """Return a new leaf axis (:data:`UNIT` when ``size`` is 1)."""
    return UNIT if size == 1 else Axis(size, frozen=frozen, where=where)


def factors(axis: Axis) -> list[Axis]:
    """Return the flattened factors of ``axis``, outermost first, without factors of size 1."""
    axis = axis.find()
    if axis.kind != PRODUCT:
        return [] if axis.size == 1 else [axis]
    return [factor for part in axis.parts for factor in factors(part)]


def segments(axis: Axis) -> list[Axis]:
    """Return the flattened segments of ``axis``, in order."""
    axis = axis.find()
    if axis.kind != CONCATENATION:
        return [axis]
    return [segment for part in axis.parts for segment in segments(part)]


def product(parts: Sequence[Axis]) -> Axis:
    """Return the row-major flattening of ``parts`` (outermost first).

    A concatenation as outermost factor distributes: ``(a + b) x c = a x c + b x c``, with the same ``c``.
    """
    flat = [factor for part in parts for factor in factors(part)]
    if not flat:
        return UNIT
    if len(flat) == 1:
        return flat[0]
    outer = flat[0].find()
    if outer.kind == CONCATENATION:
        return concatenation([product([segment, *flat[1:]]) for segment in segments(outer)])
    size = math.prod(factor.size for factor in flat)
    repeated = {id(lf) for lf in _repeated(flat)}
    for factor in flat:
        for lf in factor.leaves():
            if id(lf) in repeated:
                freeze(lf, "a factor that is multiplied with itself")
    return Axis(size, PRODUCT, tuple(flat))


def _repeated(flat: Iterable[Axis]) -> list[Axis]:
    """Leaves that occur in more than one of the factors."""
    seen: set[int] = set()
    twice = []
    for factor in flat:
        own = {id(lf): lf for lf in factor.leaves()}
        twice += [lf for key, lf in own.items() if key in seen and lf.size > 1]
        seen |= set(own)
    return twice


def freeze_diagonals(axis: Axis) -> None:
    """Freeze leaves that came to stand in more than one factor of a product after the product was made."""
    axis = axis.find()
    if axis.kind == PRODUCT:
        for lf in _repeated(factors(axis)):
            freeze(lf, "a factor that is multiplied with itself")
    for part in axis.parts:
        freeze_diagonals(part)


def concatenation(parts: Sequence[Axis]) -> Axis:
    """Return the concatenation of ``parts`` in order."""
    flat = [segment for part in parts for segment in segments(part) if segment.size > 0]
    if len(flat) == 1:
        return flat[0]
    return Axis(sum(segment.size for segment in flat), CONCATENATION, tuple(flat))


def parallel(parts: Sequence[Axis], selector: Axis) -> Axis:
    """Return the axis that stands for one of ``parts`` (of equal size), as the index on ``selector`` says."""
    return Axis(parts[0].size, PARALLEL, tuple(parts), selector=selector)


def interleaved(parts: Sequence[Axis], before: Sequence[Axis] = ()) -> Axis:
    """Return the axis whose positions take one index of each part in turn.

    Args:
        parts: What takes turns. Their sizes differ by one at most.
        before: Pieces of the same whole in front of it: position 0 belongs to part ``sum of sizes % len(parts)``.
    """
    # a piece of size 1 is no UNIT: whose turn it is still depends on the pieces before
    return Axis(sum(part.size for part in parts), INTERLEAVED, tuple(parts), before=tuple(before))


def turns(start: int, end: int, part: int, parts: int) -> int:
    """How many of the positions ``start <= t < end`` belong to one of the parts that take turns."""
    return (end - part + parts - 1) // parts - (start - part + parts - 1) // parts


def occurs(needle: Axis, haystack: Axis) -> bool:
    """Whether leaf ``needle`` is one of the leaves below ``haystack``."""
    needle = needle.find()
    return any(lf is needle for lf in haystack.leaves())


def refine(axis: Axis, structure: Axis) -> bool:
    """Make leaf ``axis`` stand for ``structure``; False (both frozen) where that would be circular."""
    axis, structure = axis.find(), structure.find()
    if axis is structure:
        return True
    if occurs(axis, structure):
        freeze(structure, "an axis that would contain itself")
        return False
    if axis.frozen is not None:
        freeze(structure, axis.frozen, axis.where)
    axis.parent = structure
    return True
