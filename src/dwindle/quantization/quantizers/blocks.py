"""Tensors in pieces that stay in a processor's cache while several passes go over them.

The gradients of rounding are a dozen vectorized passes. Over a whole activation each would travel to memory and back;
over a piece of 128 thousand values a thread they do not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

VALUES = 1 << 17
"""Values of a piece, for each of torch's threads."""


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


def in_blocks(value: Tensor, axis: int | None) -> bool:
    """Return True where going piece by piece is possible and pays.

    Args:
        value: The tensor, dense.
        axis: Dimension of the channels, or None. Pieces are cut along it only if it is the first.
    """
    if torch.compiler.is_compiling() or value.device.type != "cpu":
        return False
    if value.numel() <= VALUES * torch.get_num_threads():
        return False
    return axis is None or (axis % value.dim() == 0 and value.is_contiguous())


def blocks(
    tensors: list[Tensor], parameters: list[Tensor | None], axis: int | None
) -> Iterator[tuple[list[Tensor], list[Tensor | None]]]:
    """Yield matching pieces of tensors, as views, with the parameters that belong to each.

    Args:
        tensors: Of one shape and one dense layout; see :func:`in_blocks` and :func:`dense`.
        parameters: Of one value or one per channel, or None.
        axis: 0 for channels, or None.

    Yields:
        Pieces, one-dimensional or ``(channels, values)``; and parameters that multiply them.
    """
    size = VALUES * torch.get_num_threads()
    if axis is None:
        whole = [None if held is None else held.reshape(()) for held in parameters]
        for pieces in zip(*(_flat(tensor).split(size) for tensor in tensors), strict=True):
            yield list(pieces), whole
        return
    rows = max(1, size * tensors[0].shape[0] // tensors[0].numel())
    flat = [
        tensor.flatten(1).split(rows) if tensor.dim() > 1 else tensor[:, None].split(rows)
        for tensor in tensors
    ]
    for index, pieces in enumerate(zip(*flat, strict=True)):
        part = slice(index * rows, (index + 1) * rows)
        yield list(pieces), [None if held is None else held[part, None] for held in parameters]


def dense(value: Tensor, *others: Tensor) -> list[Tensor]:
    """Return tensors in the layout of the first, or contiguous where that has gaps; copies only where needed.

    Args:
        value: Its layout is kept if it is contiguous or channels-last.
        others: Of the same shape.
    """
    layout = torch.contiguous_format
    if (
        not value.is_contiguous()
        and value.dim() == 4
        and value.is_contiguous(memory_format=torch.channels_last)
    ):
        layout = torch.channels_last
    return [tensor.contiguous(memory_format=layout) for tensor in (value, *others)]


def _flat(value: Tensor) -> Tensor:
    return value.view(-1) if value.is_contiguous() else value.permute(0, 2, 3, 1).view(-1)
