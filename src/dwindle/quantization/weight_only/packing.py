"""Small unsigned numbers as a stream of bits: the first number in the lowest bits of the first byte."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def _word(bits: int) -> tuple[int, int]:
    """Return how many numbers and how many bytes make one whole word."""
    count = 8 // math.gcd(8, bits)
    return count, count * bits // 8


def packed_bytes(count: int, bits: int) -> int:
    """Return how many bytes ``count`` numbers of ``bits`` bits take (whole words)."""
    numbers, size = _word(bits)
    return -(-count // numbers) * size


def pack(levels: Tensor, bits: int) -> Tensor:
    """Pack numbers along the last dimension.

    For 2, 4 and 8 bits this is the layout of ONNX's ``uint2``, ``uint4`` and ``uint8``.

    Args:
        levels: ``[..., count]``, whole numbers from 0 to ``2**bits - 1``, of any dtype.
        bits: 1 to 8.

    Returns:
        uint8, ``[..., packed_bytes(count, bits)]``.
    """
    numbers, size = _word(bits)
    padded = functional.pad(levels, (0, -levels.shape[-1] % numbers)).to(torch.int64)
    words = padded.unflatten(-1, (-1, numbers))
    shifts = torch.arange(numbers, device=levels.device) * bits
    joined = (words << shifts).sum(-1, keepdim=True)
    parts = (joined >> (torch.arange(size, device=levels.device) * 8)) & 255
    return parts.to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo :func:`pack`.

    Args:
        packed: uint8, ``[..., bytes]``.
        bits: As in :func:`pack`.
        count: How many numbers there were.

    Returns:
        uint8, ``[..., count]``.
    """
    numbers, size = _word(bits)
    if numbers == 1:
        return packed[..., :count]
    mask = 2**bits - 1
    if size == 1:
        parts = [(packed >> (bits * index)) & mask for index in range(numbers)]
        return torch.stack(parts, -1).flatten(-2)[..., :count]
    joined = packed.unflatten(-1, (-1, size)).to(torch.int64)
    word = (joined << (torch.arange(size, device=packed.device) * 8)).sum(-1, keepdim=True)
    levels = (word >> (torch.arange(numbers, device=packed.device) * bits)) & mask
    return levels.to(torch.uint8).flatten(-2)[..., :count]
