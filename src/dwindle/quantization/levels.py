"""Values to their levels and back: what a quantizer of the simulation does to a tensor.

What torch's own ``fake_quantize`` kernels do, a few times as fast (see
:mod:`dwindle.quantization.quantizers.rounding`), with differences that a simulation needs. NaN stays NaN, and
infinity becomes the highest level; torch's kernels give the lowest level for both. Values are divided by the scale, as
ONNX says and its runtimes do, where torch multiplies by the reciprocal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.quantizers.rounding import learned_round, round_to_levels


def fake_quantize(
    value: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    form: NumberFormat,
    axis: int | None = None,
    block: int | None = None,
) -> Tensor:
    """Round a tensor to its quantized levels and back, with straight-through gradients inside the range.

    Nothing is read back to the host.

    Args:
        value: Any floating tensor.
        scale: float32: one value, one for each index of ``axis``, or one for each block, channel after channel.
        zero_point: int32, the same shape as ``scale``.
        form: The levels.
        axis: The dimension that has a scale for each index, or None for one scale.
        block: So many neighbours along the other dimension of a matrix share a scale; None for the whole of it.

    Returns:
        A tensor of the shape and dtype of ``value``.
    """
    if block is None:
        return _rounded(value, scale.float(), zero_point, form, axis)
    assert axis is not None
    rows = as_blocks(value, axis, block)
    return from_blocks(_rounded(rows, scale.float(), zero_point, form, 0), value, axis)


def _rounded(
    value: Tensor, scale: Tensor, zero_point: Tensor, form: NumberFormat, axis: int | None
) -> Tensor:
    if torch.is_grad_enabled() and value.requires_grad:
        return learned_round(value, scale, zero_point, form, axis)
    return round_to_levels(value, scale, zero_point, form, axis, divide=True)


def as_blocks(matrix: Tensor, axis: int, block: int) -> Tensor:
    """Return a matrix with a row for each block, ``[channels * blocks, block]``.

    Args:
        matrix: Two dimensions; the size of the one that is not ``axis`` is a multiple of ``block``.
        axis: The dimension of the channels, 0 or 1.
        block: Neighbours that share a scale.
    """
    return (matrix if axis % 2 == 0 else matrix.t()).reshape(-1, block)


def from_blocks(rows: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Return what :func:`as_blocks` made in the shape of the matrix again."""
    if axis % 2 == 0:
        return rows.reshape(matrix.shape)
    return rows.reshape(matrix.shape[::-1]).t()


def spread_over(parameter: Tensor, value: Tensor, axis: int | None, block: int | None = None) -> Tensor:
    """Return scales or zero points in a shape that multiplies a tensor. Arguments as :func:`fake_quantize`."""
    if axis is None:
        return parameter.reshape(())
    if block is not None:
        return from_blocks(parameter.reshape(-1, 1).expand(-1, block), value, axis)
    return parameter.reshape([-1 if dim == axis % value.dim() else 1 for dim in range(value.dim())])


__all__ = ["as_blocks", "fake_quantize", "from_blocks", "spread_over"]
