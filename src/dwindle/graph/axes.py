"""The axis algebra: what a tensor dimension is made of, and which dimensions are the same thing.

An :class:`Axis` is a node of a union-find forest. It is a *leaf* (channels of a stage, heads, tokens), a
*product* of axes (a row-major flattening, outermost factor first) or a *concatenation* of axes. Rules of
operators only ever call :meth:`Axes.unify`, :meth:`Axes.reshape`, :meth:`Axes.split` and their like; refinement
of a leaf into a product or a concatenation then holds for the whole model at once, which is how
``hidden = heads x head width`` is discovered rather than configured.

What cannot be related is *frozen*: never pruned, always safe.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

LEAF, PRODUCT, CONCATENATION = "leaf", "product", "concatenation"

_numbers = count()


@dataclass(eq=False, slots=True)
class Axis:
    """One axis. Use :meth:`find` before reading any other field: axes are merged while rules run.

    Attributes:
        size: Number of indices.
        kind: ``"leaf"``, ``"product"`` or ``"concatenation"``.
        parts: The factors (outermost first) or the segments; empty for a leaf.
        frozen: Why no index of this axis may be removed; None when it is free.
        where: Source line of what froze it, ``"file.py:12"``, when known.
    """

    size: int
    kind: str = LEAF
    parts: tuple[Axis, ...] = ()
    frozen: str | None = None
    where: str | None = None
    parent: Axis | None = None
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
        sign = " x " if axis.kind == PRODUCT else " + "
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


def occurs(needle: Axis, haystack: Axis) -> bool:
    """Whether leaf ``needle`` is one of the leaves below ``haystack``."""
    needle = needle.find()
    return any(lf is needle for lf in haystack.leaves())


def _refine(axis: Axis, structure: Axis) -> bool:
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


def unify(first: Axis, second: Axis, where: str | None = None) -> None:
    """State that two axes are the same axis: index i of one always goes with index i of the other."""
    first, second = first.find(), second.find()
    if first is second:
        return
    if first.size != second.size:
        freeze(first, f"meets an axis of another size ({second.size})", where)
        freeze(second, f"meets an axis of another size ({first.size})", where)
        return
    if first.kind == LEAF:
        _refine(first, second)
    elif second.kind == LEAF:
        _refine(second, first)
    elif first.kind == PRODUCT and second.kind == PRODUCT:
        _unify_products(first, second, where)
    elif first.kind == CONCATENATION and second.kind == CONCATENATION:
        _unify_concatenations(first, second, where)
    elif first.kind == CONCATENATION:
        _unify_mixed(second, first, where)
    else:
        _unify_mixed(first, second, where)
    _merge(first, second)


def _merge(first: Axis, second: Axis) -> None:
    """Join two roots that now have the same leaves, so that the next comparison is immediate."""
    first, second = first.find(), second.find()
    if first is not second and list(first.leaves()) == list(second.leaves()) and first.kind == second.kind:
        second.parent = first


def _give_up(axes: Iterable[Axis], reason: str, where: str | None) -> None:
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
            _refine(a, product([rest, b]))
            left.append(rest)
        elif a.kind == CONCATENATION and a.size % b.size == 0 and _cut_inside(a, b, right, where):
            return
        else:
            _give_up([a, b, *left, *right], "two reshapes cut this axis in incompatible ways", where)
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
    _refine(outer, concatenation(parts))
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
        _refine(axis, Axis(axis.size, CONCATENATION, tuple(parts)))
        return parts
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


def reshape(axes: Sequence[Axis], sizes: Sequence[int], where: str | None = None) -> list[Axis]:
    """Return the axes of a row-major reshape of a tensor with ``axes`` to ``sizes``.

    Runs of input and output dimensions with equal extent are matched; within a run the output dimensions are
    factorizations of the input ones.
    """
    left, right = list(axes), list(sizes)
    if 0 in right:
        return [leaf(size, "empty tensor", where) for size in right]
    result: list[Axis] = []
    i = j = 0
    while i < len(left) or j < len(right):
        if j < len(right) and right[j] == 1:
            result.append(UNIT)
            j += 1
            continue
        if i < len(left) and left[i].size == 1:
            i += 1
            continue
        if i >= len(left) or j >= len(right):
            break
        i_end, j_end, have, want = i + 1, j + 1, left[i].size, right[j]
        while have != want:
            if have < want:
                have *= left[i_end].size
                i_end += 1
            else:
                want *= right[j_end]
                j_end += 1
        result += _regroup(left[i:i_end], right[j:j_end], where)
        i, j = i_end, j_end
    return result


def _regroup(axes: list[Axis], sizes: list[int], where: str | None) -> list[Axis]:
    """Axes of ``sizes`` whose product is the product of ``axes``."""
    if len(axes) == 1 and len(sizes) == 1:
        return [axes[0].find()]
    if len(sizes) == 1:
        return [product(axes)]
    if len(axes) == 1 and axes[0].find().kind == LEAF:
        parts = [leaf(size) for size in sizes]
        _refine(axes[0], product(parts))
        return parts
    whole = product(axes)
    return _take_factors(whole, sizes, where)


def _take_factors(whole: Axis, sizes: list[int], where: str | None) -> list[Axis]:
    """Cut a structured axis into row-major factors of ``sizes``."""
    parts = [leaf(size) for size in sizes]
    inner = math.prod(sizes[1:])
    if whole.find().kind == CONCATENATION:
        groups = _grouped(segments(whole), inner)
        if groups is not None:
            outer = [leaf(group.find().size // inner) for group in groups]
            for group, part in zip(groups, outer, strict=True):
                unify(group, product([part, *parts[1:]]), where)
            parts[0] = concatenation(outer)
            return parts
        freeze(whole, "a reshape that mixes segments of a concatenation", where)
        _give_up(parts, "a reshape that mixes segments of a concatenation", where)
        return parts
    # from the innermost factor outwards: gather whole factors, or refine one
    stock = factors(whole)
    for position in range(len(sizes) - 1, -1, -1):
        parts[position] = _take_innermost(stock, sizes[position], where)
    return parts


def _grouped(inside: list[Axis], inner: int) -> list[Axis] | None:
    """Join consecutive segments until each group is a multiple of ``inner``; None where none fits."""
    groups: list[Axis] = []
    open_group: list[Axis] = []
    for segment in inside:
        open_group.append(segment)
        if sum(axis.size for axis in open_group) % inner == 0:
            groups.append(concatenation(open_group))
            open_group = []
    return None if open_group or len(groups) < 2 else groups


def _take_innermost(stock: list[Axis], size: int, where: str | None) -> Axis:
    """Remove factors worth ``size`` from the inner end of ``stock`` and return their product."""
    taken: list[Axis] = []
    missing = size
    while missing > 1:
        if not stock:
            taken.insert(0, leaf(missing, "two reshapes cut this axis in incompatible ways", where))
            break
        factor = stock.pop().find()
        if factor.kind == PRODUCT:
            stock += factors(factor)
        elif missing % factor.size == 0:
            taken.insert(0, factor)
            missing //= factor.size
        elif factor.size % missing == 0 and factor.kind == LEAF:
            outer, inner = leaf(factor.size // missing), leaf(missing)
            _refine(factor, product([outer, inner]))
            stock.append(outer)
            taken.insert(0, inner)
            missing = 1
        else:
            reason = "two reshapes cut this axis in incompatible ways"
            _give_up([factor, *stock, *taken], reason, where)
            rest = math.prod([factor.size, *[axis.size for axis in stock]])
            stock[:] = [leaf(rest // missing, reason, where)] if rest % missing == 0 else []
            taken.insert(0, leaf(missing, reason, where))
            missing = 1
    return product(taken)
