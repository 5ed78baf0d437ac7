"""Takes nested values apart into tensors and puts them together again.

A runtime such as ONNX Runtime knows a flat list of named tensors; a model knows positional and keyword
arguments and may return dicts or dataclasses (such as a Hugging Face ``ModelOutput``). The classes here
carry the one to the other, so that a session can be called exactly like the model it was made from.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.graph.nested_values import flatten, open_level


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors inside a nested value, in order."""
    return [tensor for _, tensor in flatten(value)[0]]


class InputStructure:
    """How the arguments of a model become a flat list of named tensors.

    Arguments are bound by the signature of ``forward``, so a tensor is found whether it is passed by
    position or by keyword, and the flat names are the names that the model's author gave (``x``,
    ``input_ids``; ``batch_image`` for the key ``image`` of a dict argument ``batch``).

    Args:
        model: The model whose ``forward`` is called.
        args: Example positional arguments.
        kwargs: Example keyword arguments.
    """

    def __init__(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self._signature = inspect.signature(model.forward)
        self.args = tuple(args)
        self.kwargs = dict(kwargs or {})
        named = self._bind(self.args, self.kwargs)
        leaves, _ = flatten(named)
        if not leaves:
            raise ConfigError(
                "the example inputs hold no tensor; give at least one, such as example_inputs=(x,)"
            )
        self.names: list[str] = _unique([_identifier(name) for name, _ in leaves])
        self.example: list[Tensor] = [tensor for _, tensor in leaves]
        self._paths = [name for name, _ in leaves]

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ConfigError(
                f"the example inputs do not fit the model's forward{self._signature}: {error}"
            ) from error
        named: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = self._signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                named.update({str(key): value[key] for key in value})
            else:
                named[name] = value
        return named

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> list[Tensor]:
        """Return the tensors of a call in the order of :attr:`names`.

        Args:
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call, in any order.

        Raises:
            ConfigError: The call has other tensors than the example had.
        """
        found = dict(flatten(self._bind(args, kwargs or {}))[0])
        missing = [path for path in self._paths if path not in found]
        extra = [path for path in found if path not in self._paths]
        if missing or extra:
            raise ConfigError(
                f"this call has other tensors than the example had: missing {missing}, unexpected {extra}"
            )
        return [found[path] for path in self._paths]

    def unflatten(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return ``(args, kwargs)`` of the example with its tensors replaced, in the order of
        :attr:`names`.
        """
        by_path = dict(zip(self._paths, tensors, strict=True))
        # The positional arguments and the keywords are flattened apart from the bound names; identity of the
        # example tensors would not tell equal ones apart, so the same walk is done with placeholders.
        marks = {path: _Mark(path) for path in self._paths}
        _, rebuild = flatten(self._bind(self.args, self.kwargs))
        marked = rebuild([marks[path] for path in self._paths])
        args, kwargs = self._unbind(marked)
        return _replace_marks(args, by_path), _replace_marks(kwargs, by_path)

    def _unbind(self, named: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Turn bound names back into the positional and keyword arguments that the example had."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for name, value in named.items():
            parameter = self._signature.parameters.get(name)
            if parameter is not None and parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                args.extend(value)
            elif name in self.kwargs:
                kwargs[name] = value
            else:
                args.append(value)
        return tuple(args), kwargs


class _Mark:
    """Stands for a tensor while a structure is rebuilt."""

    def __init__(self, path: str) -> None:
        self.path = path


def _replace_marks(value: Any, by_path: Mapping[str, Any]) -> Any:
    if isinstance(value, _Mark):
        return by_path[value.path]
    keys, children, rebuild = open_level(value)
    return rebuild([_replace_marks(child, by_path) for child in children]) if keys else value


def _identifier(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter == "_" else "_" for letter in name)


def _unique(names: list[str]) -> list[str]:
    seen: dict[str, int] = {}
    result = []
    for name in names:
        count = seen.get(name, 0)
        seen[name] = count + 1
        result.append(name if count == 0 else f"{name}_{count}")
    return result


def output_names(output: Any) -> list[str]:
    """Return the flat names of a model's output: ``["output"]``, ``["output_0", ...]`` or the dict's keys."""
    path = "" if isinstance(output, Mapping) or dataclasses.is_dataclass(output) else "output"
    return _unique([_identifier(name) for name, _ in flatten(output, path)[0]])


def batch_size(tensors: Sequence[Tensor]) -> int | None:
    """Return the batch size: the size of dimension 0 of the first tensor that has one, or None."""
    return next((tensor.shape[0] for tensor in tensors if tensor.dim() > 0), None)


def batched_inputs(tensors: Sequence[Tensor]) -> list[bool]:
    """Tell for each tensor whether its dimension 0 is the batch: it has as many entries as the first
    tensor's.
    """
    size = batch_size(tensors)
    return [size is not None and tensor.dim() > 0 and tensor.shape[0] == size for tensor in tensors]


def with_batch(tensors: Sequence[Tensor], batch: int) -> list[Tensor]:
    """Repeat or cut the batched tensors so that they hold ``batch`` samples.

    Args:
        tensors: Flat tensors, the batch in dimension 0.
        batch: Wanted number of samples, at least 1.
    """
    result = []
    for tensor, batched in zip(tensors, batched_inputs(tensors), strict=True):
        if not batched or tensor.shape[0] == batch or tensor.shape[0] == 0:
            result.append(tensor)
            continue
        repeats = -(-batch // tensor.shape[0])
        result.append(torch.cat([tensor] * repeats)[:batch].contiguous())
    return result


def example_call(
    model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Bring the example inputs of a public function into ``(args, kwargs)``.

    A single tensor counts as ``(tensor,)``; a dict in place of the tuple counts as keyword arguments. A
    Hugging Face model whose config says ``use_cache`` gets ``use_cache=False`` unless the caller said
    otherwise: a cache object can be neither exported nor compared.

    Raises:
        ConfigError: The example inputs are none of these.
    """
    kwargs = dict(example_kwargs or {})
    if isinstance(example_inputs, Tensor):
        args: tuple[Any, ...] = (example_inputs,)
    elif isinstance(example_inputs, Mapping):
        args, kwargs = (), {**example_inputs, **kwargs}
    elif isinstance(example_inputs, (tuple, list)):
        args = tuple(example_inputs)
    elif example_inputs is None and kwargs:
        args = ()
    else:
        raise ConfigError(
            "example_inputs must be a tensor, a tuple of positional or a dict of keyword arguments, "
            f"not {type(example_inputs).__name__}"
        )
    if getattr(getattr(model, "config", None), "use_cache", False) and "use_cache" not in kwargs:
        parameters = inspect.signature(model.forward).parameters
        if "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            kwargs["use_cache"] = False
    return args, kwargs
