"""Short names for what tensors hold: the same values, dtype and shape give the same name, anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["content_keys", "model_fingerprint", "versions_of"]

_BYTES = 20


def model_fingerprint(model: nn.Module) -> str:
    """Return a name for the weights of a model: parameters and all buffers, with their paths, and the class.

    Args:
        model: Only read.
    """
    digest = hashlib.blake2b(digest_size=_BYTES)
    digest.update(f"{type(model).__module__}.{type(model).__qualname__}".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"\0{name}\0".encode())
        _add(digest, tensor)
    return digest.hexdigest()


def versions_of(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Return something that differs once a weight was replaced or changed in place; cheap to ask for."""
    tensors = (*model.parameters(), *model.buffers())
    return tuple((id(tensor), -1 if tensor.is_inference() else tensor._version) for tensor in tensors)


def content_keys(args: Sequence[Any], kwargs: Mapping[str, Any], rows: int | None) -> list[str]:
    """Return names for what a model is called with.

    Args:
        args: Positional inputs: tensors in lists, tuples and mappings, beside numbers and texts.
        kwargs: Keyword inputs.
        rows: Give one name for each of so many samples, counted in dimension 0 of every tensor; None gives one name
            for all together.
    """
    plain: list[str] = []
    tensors: list[Tensor] = []
    _split((list(args), dict(sorted(kwargs.items()))), plain, tensors)
    held = [tensor.detach().cpu().contiguous() for tensor in tensors]
    keys = []
    for row in range(1 if rows is None else rows):
        digest = hashlib.blake2b("\0".join(plain).encode(), digest_size=_BYTES)
        for tensor in held:
            _add(digest, tensor if rows is None else tensor[row])
        keys.append(digest.hexdigest())
    return keys


def _split(value: Any, plain: list[str], tensors: list[Tensor]) -> None:
    """Describe the structure in texts, and collect the tensors."""
    if isinstance(value, Tensor):
        plain.append("tensor")
        tensors.append(value)
    elif isinstance(value, Mapping):
        plain.append("{")
        for key, entry in value.items():
            plain.append(str(key))
            _split(entry, plain, tensors)
        plain.append("}")
    elif isinstance(value, list | tuple):
        plain.append("[")
        for entry in value:
            _split(entry, plain, tensors)
        plain.append("]")
    else:
        plain.append(f"{type(value).__name__}:{value!r}")


def _add(digest: Any, tensor: Tensor) -> None:
    own = tensor.detach().cpu().contiguous()
    digest.update(f"{own.dtype}{tuple(own.shape)}".encode())
    digest.update(own.reshape(-1).view(torch.uint8).numpy())
