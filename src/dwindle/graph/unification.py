"""Which dimensions are the same thing: unification of axes, and cutting an axis into consecutive segments.

Refinement of a leaf into a product or a concatenation holds for the whole model at once, which is how
``hidden = heads x head width`` is discovered rather than configured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from dwindle.graph.structures import (
    CONCATENATION,
    INTERLEAVED,
    LEAF,
    PARALLEL,
    PRODUCT,
    Axis,
    concatenation,
    factors,
    freeze,
    interleaved,
    leaf,
    occurs,
    product,
    refine,
    segments,
    turns,
)


def unify(first: Axis, second: Axis, where: str | None = None) -> None:
    """State that two axes are the same axis: index i of one always goes with index i of the other."""
    first, second = collapse(first, where), collapse(second, where)
    if first is second:
        return
    if first.size != second.size:
        freeze(first, f"meets an axis of another size ({second.size})", where)
        freeze(second, f"meets an axis of another size ({first.size})", where)
        return
    if first.size == 1:
        return
    if first.kind == LEAF:
        refine(first, second)
    elif second.kind == LEAF:
        refine(second, first)
    elif INTERLEAVED in (first.kind, second.kind):
        _unify_interleaved(first, second, where)
        return
    elif first.kind == PRODUCT and second.kind == PRODUCT:
        _unify_products(first, second, where)
    elif first.kind == CONCATENATION and second.kind == CONCATENATION:
        _unify_concatenations(first, second, where)
    elif first.kind == CONCATENATION:
        _unify_mixed(second, first, where)
    else:
        _unify_mixed(first, second, where)
    _merge(first, second)


def _unify_interleaved(first: Axis, second: Axis, where: str | None) -> None:
    """An interleaved axis meets something that is no leaf."""
    if first.kind != INTERLEAVED:
        first, second = second, first
    same = second.kind == INTERLEAVED and len(first.parts) == len(second.parts)
    if same and _terms(first.before) == _terms(second.before):
        for one, other in zip(first.parts, second.parts, strict=True):
            unify(one, other, where)
    elif second.kind == CONCATENATION:
        _unify_mixed(first, second, where)
    elif second.kind == PRODUCT and not first.before and factors(second)[-1].size == len(first.parts):
        *outer, inner = factors(second)
        freeze(inner, "numbers the parts of a shuffle", where)
        for part in first.parts:
            unify(part, product(outer), where)
    else:
        give_up([first, second], "a shuffled axis meets an axis in another order", where)


def _terms(axes: Iterable[Axis]) -> list[tuple[int, ...]]:
    """What the total size of some axes is the sum of: leaves, and products of leaves."""
    found: list[tuple[int, ...]] = []
    for axis in axes:
        own = axis.find()
        if own.kind in (CONCATENATION, INTERLEAVED):
            found += _terms(own.parts)
        else:
            found.append(tuple(leaf.number for leaf in own.leaves()))
    return sorted(found)


def collapse(axis: Axis, where: str | None = None) -> Axis:
    """Return ``axis`` without choice: the parts of a parallel axis become one axis."""
    axis = axis.find()
    if axis.kind != PARALLEL:
        return axis
    for part in axis.parts[1:]:
        unify(axis.parts[0], part, where)
    one = axis.parts[0].find()
    axis.parent = one
    return one


def _merge(first: Axis, second: Axis) -> None:
    """Join two roots that now have the same leaves, so that the next comparison is immediate."""
    first, second = first.find(), second.find()
    if first is not second and list(first.leaves()) == list(second.leaves()) and first.kind == second.kind:
        second.parent = first


def give_up(axes: Iterable[Axis], reason: str, where: str | None) -> None:
    """Freeze all of ``axes`` for the same reason."""
    for axis in axes:
        freeze(axis, reason, where)


def _unify_products(first: Axis, second: Axis, where: str | None) -> None:
    """Align two factorizations from the innermost factor outwards, refining leaves where they are coarser."""
    left, right = factors(first), factors(second)
    while left and right:
        a, b = left.pop().find(), right.pop().find()
        if a.size == b.size:
            unify(a, b, where)
            left, right = _again(left), _again(right)
            continue
        if a.size < b.size:
            a, b, left, right = b, a, right, left
        # a is the coarser one: a = rest x b
        if a.size % b.size == 0 and a.kind == LEAF and not occurs(a, b):
            rest = leaf(a.size // b.size)
            refine(a, product([rest, b]))
            left.append(rest)
        elif a.kind == CONCATENATION and a.size % b.size == 0 and _cut_inside(a, b, right, where):
            return
        else:
            give_up([a, b, *left, *right], "two reshapes cut this axis in incompatible ways", where)
            return


def _again(axes: list[Axis]) -> list[Axis]:
    """Flatten factors anew: a unification may have refined some of them."""
    return [factor for axis in axes for factor in factors(axis)]


def _cut_inside(coarse: Axis, inner: Axis, others: list[Axis], where: str | None) -> bool:
    """Match a concatenation with ``... x inner`` by cutting every segment into multiples of ``inner``."""
    inside = segments(coarse)
    if not others or any(segment.size % inner.size for segment in inside):
        return False
    outer = others[-1].find()
    if outer.size * inner.size != coarse.size or outer.kind != LEAF or len(others) != 1:
        return False
    parts = [leaf(segment.size // inner.size) for segment in inside]
    refine(outer, concatenation(parts))
    for segment, part in zip(inside, parts, strict=True):
        unify(segment, product([part, inner]), where)
    return True


def _unify_concatenations(first: Axis, second: Axis, where: str | None) -> None:
    """Align two lists of segments, splitting the longer one of each pair."""
    left, right = segments(first)[::-1], segments(second)[::-1]
    while left and right:
        a, b = left.pop().find(), right.pop().find()
        if a.kind == CONCATENATION or b.kind == CONCATENATION:
            left += segments(a)[::-1]
            right += segments(b)[::-1]
            continue
        if a.size == b.size:
            unify(a, b, where)
            continue
        if a.size < b.size:
            a, b, left, right = b, a, right, left
        head, tail = split(a, [b.size, a.size - b.size], where)
        unify(head, b, where)
        left.append(tail)


def _unify_mixed(multiplied: Axis, concatenated: Axis, where: str | None) -> None:
    """A product meets a concatenation: cut the product at the borders of the segments."""
    borders = [segment.size for segment in segments(concatenated)]
    pieces = split(multiplied, borders, where)
    for piece, segment in zip(pieces, segments(concatenated), strict=True):
        unify(piece, segment, where)


def split(axis: Axis, sizes: Sequence[int], where: str | None = None) -> list[Axis]:
    """Cut ``axis`` into consecutive segments of the given sizes and return them.

    A leaf is refined into a concatenation; a product is cut at multiples of its inner factors by cutting its
    outermost factor; a cut inside an inner factor freezes the axis.
    """
    axis = axis.find()
    if len(sizes) == 1:
        return [axis]
    if axis.kind == LEAF:
        parts = [leaf(size) for size in sizes]
        if axis.frozen is not None:
            for part in parts:
                freeze(part, axis.frozen, axis.where)
        refine(axis, Axis(axis.size, CONCATENATION, tuple(parts)))
        return parts
    if axis.kind == PARALLEL:
        return split(collapse(axis, where), sizes, where)
    if axis.kind == INTERLEAVED:
        return _split_interleaved(axis, sizes, where)
    if axis.kind == PRODUCT:
        flat = factors(axis)
        inner = math.prod(factor.size for factor in flat[1:])
        if any(size % inner for size in sizes):
            freeze(axis, "cut inside a factor of a flattened axis", where)
            return [leaf(size, "cut inside a factor of a flattened axis", where) for size in sizes]
        outer = split(flat[0], [size // inner for size in sizes], where)
        pieces = [product([piece, *flat[1:]]) for piece in outer]
        replacement = concatenation(pieces)
        if replacement is not axis and axis.parent is None:
            axis.parent = replacement
        return pieces
    return _split_concatenation(axis, sizes, where)


def _split_interleaved(axis: Axis, sizes: Sequence[int], where: str | None) -> list[Axis]:
    """Cut every part where its turns cross a border; the pieces go on taking turns."""
    count = len(axis.parts)
    start = sum(piece.size for piece in axis.before)
    columns: list[list[Axis]] = []
    for number, part in enumerate(axis.parts):
        own, position = [], start
        for size in sizes:
            own.append(turns(position, position + size, number, count))
            position += size
        cut = iter(split(part, [size for size in own if size], where))
        columns.append([next(cut) if size else Axis(0, frozen="empty") for size in own])
    pieces: list[Axis] = []
    for place in range(len(sizes)):
        parts = [column[place] for column in columns]
        pieces.append(interleaved(parts, [*axis.before, *pieces]))
    return pieces


def _split_concatenation(axis: Axis, sizes: Sequence[int], where: str | None) -> list[Axis]:
    stock = segments(axis)[::-1]
    pieces: list[Axis] = []
    for size in sizes:
        taken: list[Axis] = []
        missing = size
        while missing > 0:
            segment = stock.pop().find()
            if segment.kind == CONCATENATION:
                stock += segments(segment)[::-1]
            elif segment.size <= missing:
                taken.append(segment)
                missing -= segment.size
            else:
                stock += split(segment, [missing, segment.size - missing], where)[::-1]
        pieces.append(concatenation(taken) if taken else Axis(0, frozen="empty"))
    return pieces
