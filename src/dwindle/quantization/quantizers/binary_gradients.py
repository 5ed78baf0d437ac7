"""Binary forwards and the gradients that their papers give them, as pure functions of tensors.

The sign of 0 is +1 everywhere. Its derivative is zero or infinite, so every paper puts another one in its place:

- ``clipped``: 1 where ``|r| <= 1``, else 0 (Hubara et al., BNN, https://arxiv.org/abs/1602.02830, eq. 4).
- ``polynomial``: ``2 - 2 |r|`` where that is positive, else 0 (Liu et al., https://arxiv.org/abs/1808.00278, eq. 6).
- ``identity``: 1 (Zhou et al., DoReFa, https://arxiv.org/abs/1606.06160, eq. 7).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dwindle.config.errors import ConfigError, did_you_mean

__all__ = ["SCALED_GRADIENTS", "SIGN_GRADIENTS", "scaled_sign", "sign", "step"]

#: What may stand for the derivative of the sign.
SIGN_GRADIENTS = ("clipped", "polynomial", "identity")

#: What may stand for the derivative of the sign times the mean magnitude.
SCALED_GRADIENTS = ("identity", "xnor", "magnitude")


def _slope(value: Tensor, kind: str) -> Tensor:
    if kind == "clipped":
        return (value.abs() <= 1).to(value.dtype)
    return (2 - 2 * value.abs()).clamp(min=0)


class _Sign(torch.autograd.Function):
    """The sign, and a derivative by its name."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, kind: str) -> Tensor:
        ctx.kind = kind
        if kind != "identity":
            ctx.save_for_backward(value)
        return torch.where(value >= 0, 1.0, -1.0).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        (gradient,) = gradients
        if ctx.kind == "identity":
            return gradient, None
        (value,) = ctx.saved_tensors
        return gradient * _slope(value, ctx.kind), None


def sign(value: Tensor, gradient: str = "clipped") -> Tensor:
    """Return +1 where ``value >= 0`` and -1 elsewhere.

    Args:
        value: Any floating tensor.
        gradient: One of :data:`SIGN_GRADIENTS`.

    Raises:
        ConfigError: There is no such gradient.
    """
    check_name("gradient", gradient, SIGN_GRADIENTS)
    result: Tensor = _Sign.apply(value, gradient)
    return result


class _ScaledSign(torch.autograd.Function):
    """The sign times the mean magnitude."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, dims: tuple[int, ...], kind: str) -> Tensor:
        # Kept to float32, so that sums of many equal terms are exact in float64: proofs compare there.
        scale = value.abs().mean(dims, keepdim=True).float().to(value.dtype)
        ctx.kind, ctx.count = kind, value.numel() // max(scale.numel(), 1)
        if kind != "identity":
            ctx.save_for_backward(value, scale)
        return torch.where(value >= 0, scale, -scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = gradients
        if ctx.kind == "identity":
            return gradient, None, None
        value, scale = ctx.saved_tensors
        slope = _slope(value, "clipped") * scale
        if ctx.kind == "xnor":
            slope = slope + 1 / ctx.count
        return gradient * slope, None, None


def scaled_sign(value: Tensor, dims: tuple[int, ...], gradient: str = "identity") -> Tensor:
    """Return ``sign(value) * mean(|value|)``: the nearest tensor of two levels in least squares.

    ``identity`` passes gradients on unchanged (DoReFa, and NNCF's XNOR). ``xnor`` is the paper's own,
    ``g * (1 / n + mean * [|value| <= 1])`` with the ``n`` numbers behind one mean (Rastegari et al.,
    https://arxiv.org/abs/1603.05279, section 3.1). ``magnitude`` is Bi-Real's ``g * mean * [|value| <= 1]``
    (https://arxiv.org/abs/1808.00278, section 3.3).

    Args:
        value: A weight of any shape.
        dims: The dimensions that share one mean.
        gradient: One of :data:`SCALED_GRADIENTS`.

    Raises:
        ConfigError: There is no such gradient.
    """
    check_name("gradient", gradient, SCALED_GRADIENTS)
    result: Tensor = _ScaledSign.apply(value, dims, gradient)
    return result


class _Step(torch.autograd.Function):
    """A step at a learned threshold, of a learned height."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: Tensor, threshold: Tensor) -> Tensor:
        height = scale.to(value.dtype)
        output = torch.where(value > threshold * scale, height, torch.zeros_like(height))
        ctx.save_for_backward(value, scale, threshold, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (gradient,) = gradients
        value, scale, threshold, output = ctx.saved_tensors
        below = value <= scale
        to_value = gradient.masked_fill((value < 0) | ~below, 0.0) if ctx.needs_input_grad[0] else None
        to_scale = to_threshold = None
        if ctx.needs_input_grad[1]:
            slope = torch.where(below, (output - value) / scale, 1.0)
            to_scale = (gradient * slope).sum().to(scale.dtype).reshape(scale.shape)
        if ctx.needs_input_grad[2]:
            inside = gradient.masked_fill((value <= 0) | (value >= scale), 0.0)
            to_threshold = -inside.sum_to_size(threshold.shape).to(threshold.dtype)
        return to_value, to_scale, to_threshold


def step(value: Tensor, scale: Tensor, threshold: Tensor) -> Tensor:
    """Return ``scale`` where ``value > threshold * scale`` and 0 elsewhere.

    The gradients are NNCF's (https://arxiv.org/abs/2002.08679, section 3.2): ``g [0 <= x <= s]`` for the value,
    ``sum g ([x <= s] (out - x) / s + [x > s])`` for the scale, ``-sum g [0 < x < s]`` for the threshold.

    Args:
        value: Any floating tensor.
        scale: One positive number.
        threshold: Between 0 and 1, of a shape that broadcasts to the value.
    """
    result: Tensor = _Step.apply(value, scale, threshold)
    return result


def check_name(argument: str, name: str, choices: tuple[str, ...]) -> str:
    """Return a name that is one of the choices.

    Raises:
        ConfigError: It is not.
    """
    if name not in choices:
        raise ConfigError(
            f"{argument} {name!r} is not one of {', '.join(choices)}{did_you_mean(name, choices)}"
        )
    return name
