"""Writes and reads a state dict as ``.safetensors``, shared tensors stored once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dwindle.config.errors import ExportError, FileFormatError
from dwindle.export.sparse_tensors import pack, unpack


def split_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """Sort the entries of a model's state dict.

    Args:
        model: The model.

    Returns:
        The tensors to store (contiguous, on the CPU), the aliases (name left out → name stored) of tensors
        that are one and the same, and the extra state that is not a tensor.

    Raises:
        ExportError: An entry can be stored neither as a tensor nor as JSON.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    extra: dict[str, Any] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            extra[name] = _as_json(name, value)
            continue
        value = value.detach()
        if value.layout is not torch.strided or value.is_quantized or value.device.type == "meta":
            kind = "on the meta device" if value.device.type == "meta" else f"of layout {value.layout}"
            raise ExportError(f"{name!r} cannot be stored: it is {kind}; only plain dense tensors can")
        key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), str(value.device))
        if value.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        tensors[name] = value.cpu().contiguous()
    return _without_overlap(tensors), aliases, extra


def _as_json(name: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ExportError(
            f"{name!r} in the state dict is a {type(value).__name__}, which can be stored neither as a "
            "tensor nor as JSON (and dwindle writes no pickle)"
        ) from error


def _without_overlap(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that look into one storage from different places; a file stores each on its own."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if storage in seen and tensor.numel() else tensor
        seen.add(storage)
    return result


@dataclass(frozen=True)
class StateFile:
    """What reading a written state dict needs beside the file itself; all of it JSON values.

    Attributes:
        aliases: Name left out → name stored, of tensors that are one and the same.
        extra_state: State that is no tensor.
        packed: Tensors that are stored without their zeros.
    """

    aliases: dict[str, str]
    extra_state: dict[str, Any]
    packed: dict[str, Any]


def write_state(model: nn.Module, path: Path, *, without_zeros: bool = False) -> StateFile:
    """Write a model's state dict to ``path``.

    Args:
        model: The model.
        path: The file.
        without_zeros: Leave the zeros of tensors out that hold many.
    """
    tensors, aliases, extra = split_state(model)
    tensors, packed = pack(tensors) if without_zeros else (tensors, {})
    save_file(tensors, str(path), metadata={"format": "pt"})
    return StateFile(aliases, extra, packed)


def read_state(
    path: Path, aliases: Mapping[str, str], packed: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Read a state dict that :func:`write_state` wrote, with zeros and aliases filled in.

    Raises:
        FileFormatError: The file is no whole ``.safetensors`` file, or lacks a tensor.
    """
    try:
        tensors = load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(f"{path} is not a whole .safetensors file: {error}") from error
    tensors = unpack(tensors, packed or {}, str(path))
    for name, stored in aliases.items():
        if stored not in tensors:
            raise FileFormatError(f"{path} lacks the tensor {stored!r}, which {name!r} shares")
        tensors[name] = tensors[stored]
    return tensors
