"""Row-major regrouping of dimensions: the axes of a reshape."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dwindle.graph.structures import (
    CONCATENATION,
    LEAF,
    PARALLEL,
    PRODUCT,
    UNIT,
    Axis,
    concatenation,
    factors,
    freeze,
    interleaved,
    leaf,
    parallel,
    product,
    refine,
    segments,
)
from dwindle.graph.unification import collapse, give_up, unify


def reshape(axes: Sequence[Axis], sizes: Sequence[int], where: str | None = None) -> list[Axis]:
    """Return the axes of a row-major reshape of a tensor with ``axes`` to ``sizes``.

    Runs of input and output dimensions with equal extent are matched; within a run the output dimensions are
    factorizations of the input ones.
    """
    left, right = list(axes), list(sizes)
    if 0 in right:
        return _reshape_empty(left, right, where)
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


def _reshape_empty(left: list[Axis], right: list[int], where: str | None) -> list[Axis]:
    """Regroup a tensor without elements: what stands before and behind the dimension of size 0, each by itself."""
    empty = [place for place, axis in enumerate(left) if axis.size == 0]
    if len(empty) == right.count(0) == 1:
        old, new = empty[0], right.index(0)
        before, after = left[:old], left[old + 1 :]
        fits = math.prod(axis.size for axis in before) == math.prod(right[:new])
        if fits and math.prod(axis.size for axis in after) == math.prod(right[new + 1 :]):
            behind = reshape(after, right[new + 1 :], where)
            return [*reshape(before, right[:new], where), left[old].find(), *behind]
    for axis in left:
        freeze(axis, "reshaped while empty", where)
    return [leaf(size, "reshaped while empty", where) for size in right]


def _regroup(axes: list[Axis], sizes: list[int], where: str | None) -> list[Axis]:
    """Axes of ``sizes`` whose product is the product of ``axes``."""
    if len(axes) == 1 and len(sizes) == 1:
        return [axes[0].find()]
    axes = _paired(axes, where)
    if len(sizes) == 1:
        return [product(axes)]
    if len(axes) == 1 and axes[0].find().kind == LEAF:
        parts = [leaf(size) for size in sizes]
        refine(axes[0], product(parts))
        return parts
    whole = product(axes)
    return _take_factors(whole, sizes, where)


def _paired(axes: list[Axis], where: str | None) -> list[Axis]:
    """Flatten parallel axes with their selectors, in either order; collapse those that stand alone."""
    result: list[Axis] = []
    for axis in axes:
        axis = axis.find()
        last = result[-1].find() if result else None
        if axis.kind == PARALLEL and last is not None and _selects(last, axis):
            result[-1] = concatenation(axis.parts)
        elif last is not None and last.kind == PARALLEL and _selects(axis, last):
            result[-1] = interleaved(last.parts)
        else:
            result.append(axis)
    return [collapse(axis, where) for axis in result]


def _selects(selector: Axis, axis: Axis) -> bool:
    return axis.selector is not None and axis.selector.find() is selector


def _take_factors(whole: Axis, sizes: list[int], where: str | None) -> list[Axis]:
    """Cut a structured axis into row-major factors of ``sizes``."""
    parts = [leaf(size) for size in sizes]
    inner = math.prod(sizes[1:])
    if whole.find().kind == CONCATENATION:
        groups = _grouped(segments(whole), inner)
        if groups is not None and len(sizes) == 2 and all(group.size == inner for group in groups):
            parts[0] = leaf(sizes[0], "numbers the parts of a concatenation", where)
            parts[1] = parallel(groups, parts[0])
            return parts
        if groups is not None:
            outer = [leaf(group.find().size // inner) for group in groups]
            for group, part in zip(groups, outer, strict=True):
                unify(group, product([part, *parts[1:]]), where)
            parts[0] = concatenation(outer)
            return parts
        freeze(whole, "a reshape that mixes segments of a concatenation", where)
        give_up(parts, "a reshape that mixes segments of a concatenation", where)
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
            refine(factor, product([outer, inner]))
            stock.append(outer)
            taken.insert(0, inner)
            missing = 1
        else:
            reason = "two reshapes cut this axis in incompatible ways"
            give_up([factor, *stock, *taken], reason, where)
            rest = math.prod([factor.size, *[axis.size for axis in stock]])
            stock[:] = [leaf(rest // missing, reason, where)] if rest % missing == 0 else []
            taken.insert(0, leaf(missing, reason, where))
            missing = 1
    return product(taken)
