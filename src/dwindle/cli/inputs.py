"""Example inputs from the command line: ``--input-shape 1,3,224,224`` or ``--input-shape ids=2,16:int64``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, did_you_mean

__all__ = ["example_inputs", "parse_arguments", "parse_shape"]

_TYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}


def parse_shape(text: str) -> tuple[str | None, Tensor]:
    """Make a tensor from ``[name=]2,3,224,224[:dtype]``.

    Returns:
        The name of the keyword argument (None: positional), and the tensor: normal random numbers, or ones for
        integers and booleans, which are valid token numbers and masks alike.

    Raises:
        ConfigError: The text is not of this form.
    """
    name, equals, rest = text.rpartition("=")
    sizes, _, type_name = rest.partition(":")
    dtype = type_name or "float32"
    if dtype not in _TYPES:
        raise ConfigError(
            f"--input-shape {text}: there is no type {dtype!r}{did_you_mean(dtype, _TYPES)}; "
            f"known are {', '.join(_TYPES)}"
        )
    try:
        shape = [int(size) for size in sizes.replace("x", ",").split(",")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 1:
        raise ConfigError(
            f"--input-shape {text}: write sizes above 0 with commas between, such as 1,3,224,224"
        )
    kind = _TYPES[dtype]
    tensor = torch.randn(shape, dtype=kind) if kind.is_floating_point else torch.ones(shape, dtype=kind)
    return (name if equals else None), tensor


def example_inputs(shapes: Sequence[str], model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword inputs for a model.

    Args:
        shapes: What stood behind each ``--input-shape``; empty: the model's own ``dummy_inputs`` (as Hugging
            Face's models have them).
        model: The model.

    Raises:
        ConfigError: A shape cannot be read, or none is given and the model brings no inputs.
    """
    torch.manual_seed(0)
    args: list[Tensor] = []
    kwargs: dict[str, Any] = {}
    for text in shapes:
        name, tensor = parse_shape(text)
        if name is None:
            args.append(tensor)
        else:
            kwargs[name] = tensor
    if not args and not kwargs:
        own = getattr(model, "dummy_inputs", None)
        if not isinstance(own, dict) or not own:
            raise ConfigError(
                "which inputs does the model take? Give them with --input-shape, such as 1,3,224,224"
            )
        kwargs = dict(own)
    return tuple(args), kwargs


def parse_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """Read ``--argument key=value`` pairs; values are YAML.

    Raises:
        ConfigError: There is no ``=``.
    """
    import yaml

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--argument {pair}: write key=value")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--argument {pair}: {value!r} is not valid YAML") from error
    return found
