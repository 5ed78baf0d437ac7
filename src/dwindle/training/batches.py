"""What a batch is made of, where it goes, and what a model's outputs mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.graph.modes import modes_kept

__all__ = ["accuracy", "logits_of", "move_batch", "predictions", "split_batch"]

Batch = tuple[tuple[Any, ...], dict[str, Any], Any]
"""Positional inputs, keyword inputs, target."""


def split_batch(batch: Any) -> Batch:
    """Split a batch into positional inputs, keyword inputs and target.

    Raises:
        ConfigError: The batch is neither ``(inputs, target)`` nor a mapping with ``labels`` or ``label``.
    """
    if isinstance(batch, Mapping):
        for key in ("labels", "label"):
            if key in batch:
                return (), {name: value for name, value in batch.items() if name != key}, batch[key]
        raise ConfigError(f"a batch that is a mapping needs the key 'labels'; it has {sorted(batch)}")
    if isinstance(batch, list | tuple) and len(batch) == 2:
        inputs, target = batch
        if isinstance(inputs, Mapping):
            return (), dict(inputs), target
        return (tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)), {}, target
    raise ConfigError(
        f"a batch must be (inputs, target) or a mapping with 'labels', got {type(batch).__name__}"
    )


def logits_of(outputs: Any) -> Any:
    """Return the logits in a model's output.

    A tensor is its own logits; of a mapping or an output object it is ``logits``, else ``out`` (torchvision's
    segmentation), else ``last_hidden_state`` (encoders of transformers, which have no logits); of a tuple or
    list the first floating tensor with at least two dimensions. Anything else comes back as it is.
    """
    if isinstance(outputs, Tensor):
        return outputs
    for name in ("logits", "out", "last_hidden_state"):
        if isinstance(outputs, Mapping) and name in outputs:
            return outputs[name]
        found = getattr(outputs, name, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(outputs, list | tuple):
        for entry in outputs:
            if isinstance(entry, Tensor) and entry.is_floating_point() and entry.dim() >= 2:
                return entry
    return outputs


def move_batch(value: Any, device: torch.device | str, *, channels_last: bool = False) -> Any:
    """Move every tensor in a batch to a device; lists become tuples.

    Args:
        value: Tensors in mappings, lists and tuples.
        device: Where to.
        channels_last: Give floating tensors with four dimensions the channels-last memory format.
    """
    if isinstance(value, Tensor):
        if channels_last and value.dim() == 4 and value.is_floating_point():
            return value.to(device, memory_format=torch.channels_last)
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: move_batch(entry, device, channels_last=channels_last) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return tuple(move_batch(entry, device, channels_last=channels_last) for entry in value)
    return value


def predictions(model: nn.Module, loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Run a classifier over a loader, in evaluation mode and without gradients.

    Returns:
        The predicted classes (the largest logit of the last dimension) and the targets, int64, on the CPU.
        The model's training flags are as before afterwards.
    """
    first = next(model.parameters(), None)
    device = first.device if first is not None else torch.device("cpu")
    predicted: list[Tensor] = []
    expected: list[Tensor] = []
    with modes_kept(model), torch.no_grad():
        model.eval()
        for batch in loader:
            args, kwargs, target = split_batch(move_batch(batch, device))
            predicted.append(logits_of(model(*args, **kwargs)).argmax(-1).cpu())
            expected.append(torch.as_tensor(target).cpu())
    if not predicted:
        raise ConfigError("the loader gave no batch")
    return torch.cat(predicted), torch.cat(expected)


def accuracy(model: nn.Module, loader: Iterable[Any]) -> float:
    """Return the share of samples (0 to 1) whose largest logit is their label.

    Args:
        model: A classifier.
        loader: As for :func:`dwindle.training.fit`.
    """
    predicted, expected = predictions(model, loader)
    return float((predicted == expected).double().mean())
