"""One place where compression acts: a parameter, an input or an output of a module."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

INPUT_PREFIX = "_input_"
OUTPUT_PREFIX = "_output_"


@dataclass(frozen=True, order=True)
class Target:
    """One place where compression acts.

    Attributes:
        module: Path of the module in the model, ``""`` for the model itself.
        name: A parameter's own name (``"weight"``), ``"_output_0"``, ``"_input_0"``, or
            ``"_input_{argument}"`` for an argument by its name.
    """

    module: str
    name: str

    @property
    def is_input(self) -> bool:
        """Whether it is an input of the module."""
        return self.name.startswith(INPUT_PREFIX)

    @property
    def is_output(self) -> bool:
        """Whether it is an output of the module."""
        return self.name.startswith(OUTPUT_PREFIX)

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter of the module."""
        return not (self.is_input or self.is_output)

    @property
    def path(self) -> str:
        """The module's path and the name, as in ``layer1.0.conv1.weight``."""
        return f"{self.module}.{self.name}" if self.module else self.name

    @classmethod
    def parse(cls, path: str) -> Target:
        """Read :attr:`path` back.

        Args:
            path: Such as ``"layer1.0.conv1.weight"``.
        """
        module, _, name = path.rpartition(".")
        return cls(module, canonical_name(name))

    def __str__(self) -> str:
        return self.path


def canonical_name(name: str) -> str:
    """Return NNI's short forms in full: ``_input_`` is ``_input_0``, ``_output_`` is ``_output_0``."""
    return f"{name}0" if name in (INPUT_PREFIX, OUTPUT_PREFIX) else name


def forward_arguments(module: nn.Module) -> list[str]:
    """Return the names of the arguments of ``forward``, in order, without ``*args`` and ``**kwargs``."""
    skipped = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind not in skipped]


def input_position(module: nn.Module, name: str) -> tuple[int | None, str | None]:
    """Return where an input target is found in a call: its position and its argument name.

    Args:
        module: The module.
        name: ``"_input_0"`` or ``"_input_{argument}"``.

    Returns:
        The position (None for an argument that is only taken by name or through ``**kwargs``) and the name
        (None for a position that is only reached through ``*args``).
    """
    wanted = name.removeprefix(INPUT_PREFIX)
    arguments = forward_arguments(module)
    if wanted.isdigit():
        position = int(wanted)
        return position, arguments[position] if position < len(arguments) else None
    keyword_only = inspect.signature(module.forward).parameters.get(wanted)
    if keyword_only is not None and keyword_only.kind is inspect.Parameter.KEYWORD_ONLY:
        return None, wanted
    return (arguments.index(wanted), wanted) if wanted in arguments else (None, wanted)


def parameter_names(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters that are not None, in their order.

    A parameter that stands under a parametrization (a mask, a fake quantizer) counts under its own name.
    """
    names = [name for name, value in module._parameters.items() if value is not None]
    if not parametrize.is_parametrized(module):
        return names
    hidden = list(module.parametrizations)  # type: ignore[arg-type]
    # the order is lost when parametrization takes names away; weights stand before biases as in torch
    return sorted({*names, *hidden}, key=lambda name: ("bias" in name, name))


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """Return a module's own parameter or buffer as it is stored, without running parametrizations on it."""
    if parametrize.is_parametrized(module, name):
        original = module.parametrizations[name]._parameters.get("original")  # type: ignore[index,union-attr]
        return original if original is not None else getattr(module, name)
    value = module._parameters.get(name)
    return value if value is not None else module._buffers.get(name)


def buffer_names(module: nn.Module) -> list[str]:
    """Return the names of a module's own buffers that are not None, in their order."""
    return [name for name, value in module._buffers.items() if value is not None]
