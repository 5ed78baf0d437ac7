"""Products of levels as an integer kernel computes them: whole numbers are summed, and scaled once at the end.

A product of two dequantized tensors has an error in its last bits that depends on the order of the sum, and a value
near a half is then rounded to another level than the integer kernel's. Whole numbers below 2**24 have no such error
in float32, in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dwindle.quantization.calls import Position, replace_at
from dwindle.quantization.levels import spread_over

_EXACT = (torch.float32, torch.float64)


def activation_position(operation: str, args: tuple[Any, ...]) -> Position:
    """Return where the activation of a call with a weight stands."""
    index, keyword = (1, "mat1") if operation == "addmm" else (0, "input")
    return (index,) if len(args) > index else (keyword,)


def output_axis(operation: str, weight: Tensor) -> int:
    """Return the dimension of a call's output, counted from its end, that is the channel."""
    return 1 - weight.dim() if operation.startswith("conv") else -1


def whole_numbers(value: Tensor, scale: Tensor) -> Tensor:
    """Return the levels (less the zero point) of a dequantized tensor, with the gradient of the division."""
    levels = value / scale
    if torch.is_grad_enabled() and levels.requires_grad:
        return levels + (levels.round() - levels).detach()
    return levels.round()


def summed_in_integers(
    func: Callable[..., Any],
    operation: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    scales: tuple[Tensor, Tensor],
    axis: int | None,
    positions: tuple[Position, Position | None],
    *,
    round_bias: bool = True,
) -> Tensor:
    """Run a convolution or product on the levels of its operands, and scale what it gives.

    Args:
        func: The call.
        operation: Its name.
        args: Its arguments, with dequantized activation, weight and bias.
        kwargs: The same.
        scales: Of the activation (one value) and of the weight (one value, or one per channel).
        axis: Dimension of the weight that has a scale for each index, or None.
        positions: Where the weight and the bias stand.
        round_bias: Whether the bias is whole numbers too.

    Returns:
        What the call gives, but for errors of float sums.
    """
    (weight_position, bias_position), (input_scale, weight_scale) = positions, scales
    where = activation_position(operation, args)
    weight = args[weight_position[0]] if isinstance(weight_position[0], int) else kwargs[weight_position[0]]
    value = args[where[0]] if isinstance(where[0], int) else kwargs[where[0]]
    if weight.dtype not in _EXACT or value.dtype != weight.dtype:
        return func(*args, **kwargs)  # type: ignore[no-any-return]
    product = input_scale * weight_scale
    per_weight = spread_over(weight_scale, weight, axis)
    args, kwargs = replace_at(args, kwargs, where, partial(whole_numbers, scale=input_scale))
    args, kwargs = replace_at(args, kwargs, weight_position, partial(whole_numbers, scale=per_weight))
    if bias_position is not None:
        counted = partial(_bias_levels, scale=product, rounded=round_bias)
        args, kwargs = replace_at(args, kwargs, bias_position, counted)
    output: Tensor = func(*args, **kwargs)
    return output * _per_output(product, output, output_axis(operation, weight))


def _bias_levels(bias: Tensor, scale: Tensor, rounded: bool) -> Tensor:
    scale = repeated(scale, bias.numel())
    return whole_numbers(bias, scale) if rounded else bias / scale


def repeated(scale: Tensor, count: int) -> Tensor:
    """Repeat the scales of a group (of a transposed convolution) for all of them."""
    return scale if scale.numel() in (1, count) else scale.repeat(count // scale.numel())


def _per_output(scale: Tensor, output: Tensor, axis: int) -> Tensor:
    scale = repeated(scale, output.shape[axis])
    return scale if scale.numel() == 1 else scale.reshape([-1] + [1] * (-axis - 1))
