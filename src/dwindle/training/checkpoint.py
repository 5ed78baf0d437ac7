"""Nested training state in one file, without pickle: tensors by safetensors, the rest as JSON in its header.

A state is made of dicts, lists, tuples, tensors, NumPy arrays, numbers, strings, booleans and None: what
``state_dict()`` of models, optimizers, learning rate schedulers and random generators gives. What is read
back is equal bit by bit, memory format included.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dwindle.config.errors import FileFormatError
from dwindle.training.atomic_file import replaced_when_whole

__all__ = ["copy_of_state", "load_state", "random_state", "restore_random_state", "save_state"]

FORMAT = "dwindle-state-1"


def save_state(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a nested state to one file, atomically: the old file stays until the new one is whole.

    Args:
        state: Dicts, lists, tuples, tensors (any dtype and device), arrays, numbers, strings, None.
        path: Where to; the folder must exist.

    Raises:
        TypeError: Something in it cannot be written without pickle; the message says where it stands.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, "state", tensors)
    with replaced_when_whole(Path(path)) as part:
        save_file(tensors, part, metadata={"format": FORMAT, "tree": json.dumps(tree)})


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a state that :func:`save_state` wrote; its tensors lie on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        FileFormatError: The file is truncated, altered, or was not written by :func:`save_state`.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"no training state at {source}")
    try:
        with safe_open(source, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise FileFormatError(
                    f"{source} is no training state of dwindle (format {metadata.get('format')!r}, "
                    f"expected {FORMAT!r})"
                )
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        state = _decode(json.loads(metadata["tree"]), tensors)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise FileFormatError(f"{source} is truncated or altered: {error}") from error
    if not isinstance(state, dict):
        raise FileFormatError(f"{source} holds no dict of states")
    return state


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """Return a JSON tree for ``value``; its tensors go into ``tensors``. Special nodes have one ``$`` key."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float | np.integer | np.floating):
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, Tensor):
        key = str(len(tensors))
        # A copy of its own: safetensors refuses tensors that share memory (tied weights).
        tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"$tensor": key, **_memory_format(value)}
    if isinstance(value, np.ndarray):
        key = str(len(tensors))
        tensors[key] = torch.from_numpy(np.array(value, order="C"))
        return {"$array": key}
    if isinstance(value, list):
        return [_encode(entry, f"{where}[{index}]", tensors) for index, entry in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": _encode(list(value), where, tensors)}
    if isinstance(value, dict):
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        if plain:
            return {key: _encode(entry, f"{where}[{key!r}]", tensors) for key, entry in value.items()}
        pairs = [[key, entry] for key, entry in value.items()]
        return {"$items": _encode(pairs, where, tensors)}
    raise TypeError(
        f"{where} is a {type(value).__name__}, which cannot be saved without pickle; a state_dict() may hold "
        "tensors, arrays, numbers, strings, lists, tuples and dicts"
    )


def _memory_format(tensor: Tensor) -> dict[str, str]:
    if tensor.dim() != 4 or tensor.is_contiguous():
        return {}
    last = tensor.is_contiguous(memory_format=torch.channels_last)
    return {"memory_format": "channels_last"} if last else {}


def _decode(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(entry, tensors) for entry in node]
    if not isinstance(node, dict):
        return node
    if "$tensor" in node:
        tensor = tensors[node["$tensor"]]
        if node.get("memory_format") == "channels_last":
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor
    if "$array" in node:
        return tensors[node["$array"]].numpy()
    if "$tuple" in node:
        return tuple(_decode(node["$tuple"], tensors))
    if "$items" in node:
        return dict(_decode(node["$items"], tensors))
    return {key: _decode(entry, tensors) for key, entry in node.items()}


def copy_of_state(value: Any) -> Any:
    """Return a deep copy of nested dicts, lists and tuples, tensors detached."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: copy_of_state(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copy_of_state(entry) for entry in value)
    return value


def random_state() -> dict[str, Any]:
    """Return the state of all random generators that training uses: Python, NumPy, torch, CUDA."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what :func:`random_state` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
