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


def spread(parameter: Tensor, axis: int | None, value: Tensor) -> Tensor:
    """Return a per-channel parameter in a shape and dtype that multiply a tensor.

    Args:
        parameter: One value, or shape ``(channels,)``.
        axis: Dimension of the channels in ``value``, or None for one value.
        value: The tensor it will meet.
    """
    parameter = parameter.to(value.dtype)
    if axis is None:
        return parameter.reshape(())
    shape = [1] * value.dim()
    shape[axis] = -1
    return parameter.reshape(shape)


def positions(value: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None) -> Tensor:
    """Return a new tensor ``value / scale + zero_point``, not rounded.

    Args:
        value: Floating, at least float32.
        scale: One value or one per channel.
        zero_point: The same shape, or None for zero.
        axis: See :func:`spread`.
    """
    result = value * spread(scale, axis, value).reciprocal()
    return result if zero_point is None else result.add_(spread(zero_point, axis, value))


def round_to_levels(
    value: Tensor, scale: Tensor, zero_point: Tensor | None, form: NumberFormat, axis: int | None = None
) -> Tensor:
    """Return a tensor rounded to its levels and back, without gradient.

    Args:
        value: Any floating tensor; half precision is rounded in float32 and returned as it came.
        scale: float32, one value or one per index of ``axis``.
        zero_point: Integer, the same shape; None where it is zero for certain (two passes less).
        form: The levels.
        axis: The dimension with one scale for each index, or None.
    """
    wide = _widened(value)
    result = wide * spread(scale, axis, wide).reciprocal()
    result.round_()
    if zero_point is None:
        result.clamp_(form.lowest, form.highest)
    else:
        zero = spread(zero_point, axis, wide)
        result.add_(zero).clamp_(form.lowest, form.highest).sub_(zero)
    return result.mul_(spread(scale, axis, wide)).to(value.dtype)


def learned_round(
    value: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    form: NumberFormat,
    axis: int | None = None,
    *,
    offset: Tensor | None = None,
    gradient: Gradient = STRAIGHT_THROUGH,
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

    Returns:
        A tensor of the shape and dtype of ``value``. With ``q`` the level of an element, the scale's gradient is
        ``q - v`` inside (times ``gradient.rounding``); outside it is ``q - zero_point``, or ``q`` where there is an
        offset. The offset's is 1 outside, 0 inside.
    """
    result: Tensor = _LearnedRound.apply(value, scale, offset, zero_point, form, axis, gradient)
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
    ) -> Tensor:
        ctx.save_for_backward(value, scale, zero_point)
        ctx.lowest, ctx.highest, ctx.axis = form.lowest, form.highest, axis
        ctx.edges, ctx.rounding = gradient.edges, gradient.rounding
        ctx.with_offset = offset is not None
        return round_to_levels(value, scale, zero_point, form, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        value, scale, zero_point = ctx.saved_tensors
        wide, flow = _widened(value), _widened(upstream)
        place = positions(wide, scale, zero_point, ctx.axis)
        inside = _gate(flow, place, ctx.lowest, ctx.highest, ctx.edges)
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            return inside.to(value.dtype), None, None, None, None, None, None
        # Clamped, so that infinite values do not make NaN; half a level wider where rounding decides what is inside.
        margin = 0.5 if ctx.edges == "rounded" else 0.0
        place.clamp_(ctx.lowest - margin, ctx.highest + margin)
        slope = ctx.rounding * _inner(inside, place.round().sub_(place), ctx.axis) if ctx.rounding else 0.0
        outside = flow - inside
        escaped = _total(outside, ctx.axis)
        level = place.clamp_(ctx.lowest, ctx.highest) if margin else place
        slope = slope + _inner(outside, level, ctx.axis)
        if zero_point is not None and not ctx.with_offset:
            slope = slope - escaped * zero_point.reshape(escaped.shape)
        of_scale = slope.reshape(scale.shape).to(scale.dtype)
        of_offset = escaped.reshape(scale.shape).to(scale.dtype) if ctx.with_offset else None
        return inside.to(value.dtype), of_scale, of_offset, None, None, None, None


def _gate(flow: Tensor, place: Tensor, lowest: int, highest: int, edges: Edges) -> Tensor:
    """Let a gradient through where a place is between the levels; one pass of a vectorized kernel."""
    low, high = float(lowest), float(highest)
    if edges == "rounded":
        place, low, high = place.round(), low - 0.5, high + 0.5
    elif edges in ("closed", "upper_open"):
        low = _before(low)
        high = -_before(-high) if edges == "closed" else high
    return torch.ops.aten.hardtanh_backward(flow, place, low, high)


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
