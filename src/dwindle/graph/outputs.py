"""Which tensors of a model's output count."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested containers and dataclasses. Other objects (caches) are not entered."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from tensors_in(item)
    elif isinstance(tree, list | tuple | set):
        for item in tree:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for entry in dataclasses.fields(tree):
            yield from tensors_in(getattr(tree, entry.name))


#: Ends of the names under which models return, beside their result, what they computed on the way.
_BESIDE = ("hidden_states", "attentions", "past_key_values", "cache_params", "encoder_last_hidden_state")


def main_outputs(result: Any) -> list[torch.Tensor]:
    """Return the tensors of a model's output whose shape must stay.

    Where the output is a mapping with logits or predictions, only those (and losses) count: hidden states and
    caches beside them may shrink with the model. Of another mapping everything counts but hidden states,
    attention weights and caches, unless it holds nothing else.
    """
    if isinstance(result, Mapping):
        names = [str(key) for key in result]
        if any("logits" in name or "pred" in name for name in names):
            chosen = [name for name in names if "logits" in name or "pred" in name or name == "loss"]
        else:
            chosen = [name for name in names if not name.endswith(_BESIDE)] or names
        found = list(tensors_in([held for key, held in result.items() if str(key) in chosen]))
        if found:
            return found
    return list(tensors_in(pytree.tree_leaves(result)))
