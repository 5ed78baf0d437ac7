"""Rounding to levels with gradients: the arithmetic that all quantizers of this room share.

The forward gives the bits of torch's own ``fake_quantize`` kernels, but as a few passes in place: torch's kernels
go element by element on a CPU, these use its vector units. Behind the forward stands one of several published
gradients, told apart by :class:`Gradient`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.quantizers.blocks import VALUES, blocks, dense, in_blocks, spread

Edges = Literal["open", "closed", "upper_open", "rounded"]


@dataclass(frozen=True)
class Gradient:
    """Which published gradient stands behind the rounding. ``v`` is ``value / scale + zero_point``, unrounded.

    Attributes:
        edges: Where the gradient of the value passes: ``"open"``, lowest < v < highest (LSQ, LSQ+);
            ``"closed"``, lowest <= v <= highest (NNCF); ``"upper_open"``, lowest <= v < highest (PACT);
            ``"rounded"``, lowest <= round(v) <= highest (TQT, and torch's own kernels).
        rounding: How much the rounding error of values inside counts for the scale: 1 is its derivative, PACT has 0.
    """

    edges: Edges
    rounding: float = 1.0


STRAIGHT_THROUGH = Gradient("rounded")
"""The gradient of torch's own kernels."""


Bounds = tuple[float, float]
"""Where an activation function in front of a quantizer clips: ``(0, inf)`` is a ReLU."""


@torch.no_grad()
def round_to_levels(
    value: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    form: NumberFormat,
    axis: int | None = None,
    bounds: Bounds | None = None,
    *,
    divide: bool = False,
) -> Tensor:
    """Return a tensor rounded to its levels and back, without gradient.

    Args:
        value: Any floating tensor; half precision is rounded in float32 and returned as it came.
        scale: float32, one value or one per index of ``axis``.
        zero_point: Integer, the same shape; None where it is zero for certain (two passes less).
        form: The levels.
        axis: The dimension with one scale for each index, or None.
        bounds: Clip the tensor to these first.
        divide: Divide by the scale, as ONNX says, where torch's kernels multiply by its reciprocal: that is another
            level for one value in some hundred thousand.
    """
    wide = _widened(value.detach())
    if axis is None and in_blocks(wide, axis) and wide.dtype == torch.float32:
        return _round_in_blocks(wide, _Numbers.of(scale, zero_point, form, bounds), divide).to(value.dtype)
    step = spread(scale, axis, wide)
    clipped = wide if bounds is None else wide.clamp(*bounds)
    result = (clipped / step if divide else clipped * step.reciprocal()).round_()
    if zero_point is None:
        result.clamp_(form.lowest, form.highest)
    else:
        zero = spread(zero_point, axis, wide)
        result.add_(zero).clamp_(form.lowest, form.highest).sub_(zero)
    return result.mul_(step).to(value.dtype)


@dataclass(frozen=True)
class _Numbers:
    """One scale and zero point as Python numbers: a pass with numbers is faster than one with tensors of one value.

    Only for tensors on a CPU, outside of compilation: nothing waits for a device.

    Attributes:
        scale: The step.
        inverse: Its reciprocal, rounded to float32.
        lowest: The lowest level, counted from the zero point; that of the lower bound where that is higher.
        highest: The highest.
    """

    scale: float
    inverse: float
    lowest: float
    highest: float

    @classmethod
    def of(
        cls, scale: Tensor, zero_point: Tensor | None, form: NumberFormat, bounds: Bounds | None
    ) -> _Numbers:
        """Read the numbers from tensors of one value."""
        wide = scale.detach().reshape(()).float()
        zero = 0 if zero_point is None else int(zero_point)
        lowest, highest = float(form.lowest - zero), float(form.highest - zero)
        inverse = wide.reciprocal()
        if bounds is not None:
            low, high = (float((inverse * bound).round()) for bound in bounds)
            lowest, highest = min(max(low, lowest), highest), max(min(high, highest), lowest)
        return cls(float(wide), float(inverse), lowest, highest)


def _round_in_blocks(value: Tensor, numbers: _Numbers, divide: bool) -> Tensor:
    """Round a large tensor on a CPU, piece by piece."""
    (value,) = dense(value)
    result = torch.empty_like(value)
    for (piece, room), _ in blocks([value, result], [], None):
        if divide:
            torch.div(piece, numbers.scale, out=room)
        else:
            torch.mul(piece, numbers.inverse, out=room)
        room.round_().clamp_(numbers.lowest, numbers.highest).mul_(numbers.scale)
    return result


def learned_round(
    value: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    form: NumberFormat,
    axis: int | None = None,
    *,
    offset: Tensor | None = None,
    gradient: Gradient = STRAIGHT_THROUGH,
    bounds: Bounds | None = None,
) -> Tensor:
    """Round to levels with gradients for the value, the scale and the offset.

    Args:
        value: Any floating tensor.
        scale: Positive, one value or one per index of ``axis``; may carry gradient.
        zero_point: Integer level of zero, the same shape, or None for zero.
        form: The levels.
        axis: The dimension with one scale for each index, or None.
        offset: Where the zero point moves too: the value that level 0 stands for, ``-zero_point * scale`` before
            rounding. Only its gradient is used, and the scale's gradient is then taken with the offset held.
        gradient: The published rule.
        bounds: Clip the tensor to these first, as an activation function in front does; the gradient of the value
            passes strictly inside of them. The result is that of clipping first, with one pass of memory less each way.

    Returns:
        A tensor of the shape and dtype of ``value``. With ``q`` the level of an element, the scale's gradient is
        ``q - v`` inside (times ``gradient.rounding``); outside it is ``q - zero_point``, or ``q`` where there is an
        offset. The offset's is 1 outside, 0 inside.
    """
    result: Tensor = _LearnedRound.apply(value, scale, offset, zero_point, form, axis, gradient, bounds)
    return result


class _LearnedRound(torch.autograd.Function):
    """See :func:`learned_round`."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        zero_point: Tensor | None,
        form: NumberFormat,
        axis: int | None,
        gradient: Gradient,
        bounds: Bounds | None,
    ) -> Tensor:
        ctx.save_for_backward(value, scale, zero_point)
        ctx.form, ctx.axis, ctx.gradient, ctx.with_offset = form, axis, gradient, offset is not None
        ctx.bounds = bounds
        return round_to_levels(value, scale, zero_point, form, axis, bounds)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        value, scale, zero_point = ctx.saved_tensors
        learns = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        step = scale.to(_widened(value).dtype)
        zero = None if zero_point is None else zero_point.to(step.dtype)
        wide, flow = _widened(value), _widened(upstream)
        rule = _Rule(ctx.form, ctx.axis, ctx.gradient, ctx.bounds, learns, ctx.with_offset)
        inside, sums = _backward(wide, flow, step, zero, rule)
        of_scale = of_offset = None
        if sums is not None:
            slope, escaped = sums
            if ctx.with_offset:
                assert escaped is not None
                of_offset = escaped.reshape(scale.shape).to(scale.dtype)
            elif zero is not None and escaped is not None:
                slope = slope - escaped * zero.reshape(escaped.shape)
            of_scale = slope.reshape(scale.shape).to(scale.dtype)
        return inside.to(value.dtype), of_scale, of_offset, None, None, None, None, None


Sums = tuple[Tensor, Tensor | None]
"""The scale's gradient with levels counted from level 0, and the gradient that fell outside; None for the latter means
that levels were counted from the zero point."""


@dataclass(frozen=True)
class _Rule:
    """What a backward pass goes by; see :func:`learned_round`."""

    form: NumberFormat
    axis: int | None
    gradient: Gradient
    bounds: Bounds | None
    learns: bool
    with_offset: bool


def _backward(
    value: Tensor, flow: Tensor, scale: Tensor, zero: Tensor | None, rule: _Rule
) -> tuple[Tensor, Sums | None]:
    """Return the value's gradient, and sums over all or for each channel if the scale learns."""
    axis = rule.axis
    if axis is None and not rule.with_offset and in_blocks(value, axis) and value.dtype == torch.float32:
        return _backward_in_blocks(value, flow, _Numbers.of(scale, zero, rule.form, None), rule)
    if not in_blocks(value, axis):
        wide_zero = None if zero is None else spread(zero, axis, value)
        room = torch.empty_like(flow)
        return room, _piece(value, flow, room, spread(scale, axis, value), wide_zero, rule)
    value, flow = dense(value, flow)
    result = torch.empty_like(value)
    found = []
    for (piece, its_flow, room), (step, offset) in blocks([value, flow, result], [scale, zero], axis):
        assert step is not None
        found.append(_piece(piece, its_flow, room, step, offset, rule))
    sums = [pair for pair in found if pair is not None]
    if not sums:
        return result, None
    slopes, escapes = zip(*((slope, escaped) for slope, escaped in sums if escaped is not None), strict=True)
    if axis is None:
        return result, (torch.stack(slopes).sum(), torch.stack(escapes).sum())
    return result, (torch.cat(slopes), torch.cat(escapes))


def _backward_in_blocks(
    value: Tensor, flow: Tensor, numbers: _Numbers, rule: _Rule
) -> tuple[Tensor, Sums | None]:
    """Do the same for a large tensor with one scale on a CPU, in passes with Python numbers over pieces."""
    low, high = numbers.lowest, numbers.highest
    first, last = _edges(low, high, rule.gradient.edges)
    bounds = None if rule.bounds is None else [bound * numbers.inverse for bound in rule.bounds]
    if bounds is not None and not rule.learns:
        first, last = max(first, bounds[0]), min(last, bounds[1])
    margin = 0.5 if rule.gradient.edges == "rounded" else 0.0
    value, flow = dense(value, flow)
    result = torch.empty_like(value)
    size = min(VALUES * torch.get_num_threads(), value.numel())
    places, errors = value.new_empty(size), value.new_empty(size)
    slopes = []
    for (piece, its_flow, room), _ in blocks([value, flow, result], [], None):
        place, error = places[: piece.numel()], errors[: piece.numel()]
        torch.mul(piece, numbers.inverse, out=place)
        if bounds is not None and rule.learns:
            place.clamp_(*bounds)
        torch.ops.aten.hardtanh_backward.grad_input(its_flow, place, first, last, grad_input=room)
        if not rule.learns:
            continue
        place.clamp_(low - margin, high + margin)
        inside = torch.dot(room, torch.round(place, out=error).sub_(place)) if rule.gradient.rounding else 0.0
        if margin:
            place.clamp_(low, high)
        slopes.append(
            torch.dot(torch.sub(its_flow, room, out=error), place) + rule.gradient.rounding * inside
        )
        if rule.bounds is not None:
            torch.ops.aten.hardtanh_backward.grad_input(room, piece, *rule.bounds, grad_input=room)
    return result, ((torch.stack(slopes).sum(), None) if slopes else None)


def _piece(
    value: Tensor, flow: Tensor, room: Tensor, scale: Tensor, zero: Tensor | None, rule: _Rule
) -> Sums | None:
    """Write the value's gradient into a room of the same shape, and return the sums for the scale."""
    form, axis, edges = rule.form, rule.axis, rule.gradient.edges
    clipped = value if rule.bounds is None else value.clamp(*rule.bounds)
    place = clipped * scale.reciprocal() if rule.bounds is None else clipped.mul_(scale.reciprocal())
    if zero is not None:
        place.add_(zero)
    _gate(flow, place, form, edges, room)
    sums = None
    if rule.learns:
        # Clamped, so that infinite values do not make NaN; half a level wider where rounding decides what is inside.
        margin = 0.5 if edges == "rounded" else 0.0
        place.clamp_(form.lowest - margin, form.highest + margin)
        error = _inner(room, place.round().sub_(place), axis) if rule.gradient.rounding else None
        if margin:
            place.clamp_(form.lowest, form.highest)
        outside = flow - room
        slope = _inner(outside, place, axis)
        if error is not None:
            slope = slope + rule.gradient.rounding * error
        sums = slope, _total(outside, axis)
    if rule.bounds is not None:
        torch.ops.aten.hardtanh_backward.grad_input(room, value, *rule.bounds, grad_input=room)
    return sums


def _gate(flow: Tensor, place: Tensor, form: NumberFormat, edges: Edges, room: Tensor) -> None:
    """Let a gradient through where a place is between the levels; one pass of a vectorized kernel."""
    low, high = _edges(float(form.lowest), float(form.highest), edges)
    torch.ops.aten.hardtanh_backward.grad_input(flow, place, low, high, grad_input=room)


def _edges(low: float, high: float, edges: Edges) -> tuple[float, float]:
    """Return between which places, strictly, a gradient passes."""
    if edges == "rounded":
        return _rounded_edge(low, -1), _rounded_edge(high, 1)
    if edges in ("closed", "upper_open"):
        low = _before(low)
        high = -_before(-high) if edges == "closed" else high
    return low, high


def _rounded_edge(level: float, side: int) -> float:
    """Return the open edge of what rounds to a level or inside: half a level further, with it where that is even."""
    edge = level + side * 0.5
    if level % 2:
        return edge
    return _before(edge) if side < 0 else -_before(-edge)


def _before(edge: float) -> float:
    """Return a number below an edge that float32 tells from it, and nothing else of weight lies between."""
    return edge - max(abs(edge), 1e-20) * 1.2e-7


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _total(value: Tensor, axis: int | None) -> Tensor:
    """Return the sum over all, or over all dimensions but one."""
    if axis is None:
        return value.sum()
    others = [index for index in range(value.dim()) if index != axis % value.dim()]
    return value.sum(others) if others else value


def _inner(first: Tensor, second: Tensor, axis: int | None) -> Tensor:
    """Return the sum of products, over all or for each index of an axis."""
    if axis is None and first.is_contiguous() and second.is_contiguous():
        return torch.dot(first.reshape(-1), second.reshape(-1))
    return _total(first * second, axis)
