"""Stores tensors with many zeros as their other values and one bit a number, the bits deflated.

Half zeros take about half the room, 90 % zeros about a seventh; whole blocks of zeros cost next to nothing, as their
bits deflate away. Reading gives the same tensor back; only the sign of negative zeros is lost.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dwindle.config.errors import FileFormatError

VALUES, PLACES = "::values", "::places"
"""What the two parts of a stored tensor are called, behind its own name."""

_SMALLEST = 1024
"""Tensors of fewer numbers are stored as they are."""

_WORTH = 0.9
"""Packed tensors take at most this share of the dense ones."""

_KINDS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
)


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Replace tensors by their packed parts, where that is smaller by a tenth at least.

    Args:
        tensors: By name, on the CPU.

    Returns:
        What goes into the file, and for each packed tensor what :func:`unpack` needs beside (JSON values).
    """
    stored: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for name, tensor in tensors.items():
        parts = _packed(tensor)
        if parts is None:
            stored[name] = tensor
            continue
        stored[name + VALUES], stored[name + PLACES] = parts
        described[name] = {"shape": list(tensor.shape)}
    return stored, described


def _packed(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the values and the deflated bits; None where that is not worth it."""
    dense = tensor.numel() * tensor.element_size()
    if tensor.numel() < _SMALLEST or tensor.dtype not in _KINDS:
        return None
    flat = tensor.detach().reshape(-1)
    held = flat != 0
    values = int(held.sum()) * tensor.element_size()
    if values > _WORTH * dense:
        return None
    places = zlib.compress(np.packbits(held.numpy()).tobytes(), 6)
    if values + len(places) > _WORTH * dense:
        return None
    return flat[held], torch.frombuffer(bytearray(places), dtype=torch.uint8)


def unpack(stored: Mapping[str, Tensor], described: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Undo :func:`pack`.

    Args:
        stored: What the file holds.
        described: The packed tensors.
        where: The file, for messages.

    Raises:
        FileFormatError: A part is missing, or the parts do not belong together.
    """
    tensors = dict(stored)
    for name, entry in described.items():
        missing = [name + part for part in (VALUES, PLACES) if name + part not in tensors]
        if missing:
            raise FileFormatError(f"{where} lacks the tensor {missing[0]!r}")
        values, places = tensors.pop(name + VALUES), tensors.pop(name + PLACES)
        tensors[name] = _unpacked(values, places, tuple(map(int, entry["shape"])), f"{where}: {name!r}")
    return tensors


def _unpacked(values: Tensor, places: Tensor, shape: tuple[int, ...], where: str) -> Tensor:
    count = math.prod(shape)
    length = -(-count // 8)
    try:
        inflater = zlib.decompressobj()
        bits = inflater.decompress(places.numpy().tobytes(), length + 1)  # never more than the shape allows
    except zlib.error as error:
        raise FileFormatError(f"{where} cannot be inflated: {error}") from error
    if len(bits) != length or not inflater.eof:
        raise FileFormatError(f"{where} holds the places of another number of values than {count}")
    held = torch.from_numpy(np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=count)).bool()
    if int(held.sum()) != values.numel():
        raise FileFormatError(f"{where} has {values.numel()} values for {int(held.sum())} places")
    dense = torch.zeros(count, dtype=values.dtype)
    dense[held] = values.reshape(-1)
    return dense.reshape(shape)
