"""From whatever a data loader gives to the arguments of a model's forward."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_LABELS = frozenset(("labels", "label", "targets", "target"))


def forward_inputs(model: nn.Module, batch: Any, adapt: Callable[[Any], Any] | None = None) -> Inputs:
    """Return positional and keyword arguments for one batch.

    Args:
        model: Its forward's signature says how many leading elements of a tuple are inputs: the parameters
            without a default, at least one. The rest (labels) is left out.
        batch: A tensor or array, a tuple or list, or a mapping by argument name (``labels`` are left out). The
            inputs of ``(inputs, labels)`` may themselves be a tuple or a mapping of all arguments.
        adapt: Applied first; whatever it returns is read by the same rules, except that a tuple is then taken
            whole.

    Raises:
        ConfigError: The batch is of another kind.
    """
    if adapt is not None:
        batch = adapt(batch)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    whole = adapt is not None
    if (
        not whole
        and isinstance(batch, tuple | list)
        and len(batch) == 2
        and _is_all_arguments(model, batch[0])
    ):
        batch, whole = batch[0], True
    if isinstance(batch, Mapping):
        known = _keyword_names(model)
        chosen = {
            str(name): _tensor(value, device)
            for name, value in batch.items()
            if name not in _LABELS and (known is None or name in known)
        }
        if not chosen:
            raise ConfigError(
                f"no key of the batch ({', '.join(map(str, batch))}) is an argument of the forward"
            )
        return (), chosen
    if isinstance(batch, tuple | list):
        if not batch:
            raise ConfigError("a batch is empty")
        count = len(batch) if whole else max(1, min(len(batch), _required(model)))
        return tuple(_tensor(value, device) for value in batch[:count]), {}
    if isinstance(batch, Tensor | np.ndarray):
        return (_tensor(batch, device),), {}
    raise ConfigError(
        f"a batch is a {type(batch).__name__}; tensors, tuples and mappings are understood, "
        "for others give adapt=function"
    )


def _is_all_arguments(model: nn.Module, inputs: Any) -> bool:
    """Whether the first part of a pair holds every argument, and is not one that is a tuple (a list of images)."""
    if isinstance(inputs, Mapping):
        known = _keyword_names(model)
        return known is None or bool(known.intersection(inputs))
    if not isinstance(inputs, tuple | list):
        return False
    parameters = _parameters(model)
    most = math.inf if any(own.kind is own.VAR_POSITIONAL for own in parameters) else len(parameters)
    least = _required(model)
    return least <= len(inputs) <= most and (least > 1 or isinstance(inputs, tuple))


def input_batches(
    model: nn.Module,
    data: Any,
    adapt: Callable[[Any], Any] | None = None,
    limit: int | None = None,
    name: str = "data",
) -> Iterator[Inputs]:
    """Yield the arguments of one forward after the other.

    Args:
        model: Whose forward it is.
        data: An iterable of batches, or one tensor, which is one batch.
        adapt: See :func:`forward_inputs`.
        limit: At most so many batches; None for all.
        name: What the caller's argument is called, for messages.

    Raises:
        ConfigError: ``data`` cannot be iterated or holds nothing.
    """
    seen = 0
    for batch in batches_of(data, name):
        if limit is not None and seen >= limit:
            break
        yield forward_inputs(model, batch, adapt)
        seen += 1
    if not seen:
        raise ConfigError(f"{name} gave no batch")


def batches_of(data: Any, name: str = "data") -> Iterable[Any]:
    """Return an iterable of batches; one tensor, array or mapping is one batch.

    Raises:
        ConfigError: ``data`` cannot be iterated.
    """
    batches: Iterable[Any] = [data] if isinstance(data, Tensor | np.ndarray | Mapping) else data
    if not isinstance(batches, Iterable):
        raise ConfigError(f"{name} is a {type(data).__name__}, not an iterable of batches")
    return batches


def _tensor(value: Any, device: torch.device) -> Any:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, tuple | list) and any(isinstance(entry, Tensor) for entry in value):
        return (
            type(value)([_tensor(entry, device) for entry in value])
            if type(value) in (tuple, list)
            else value
        )
    return value.to(device) if isinstance(value, Tensor) else value


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(model.forward).parameters.values())


def _required(model: nn.Module) -> int:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in _parameters(model))


def _keyword_names(model: nn.Module) -> set[str] | None:
    parameters = _parameters(model)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters}
