"""What packing layers has in common: modules change places, outputs are compared, a failure puts everything back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import RealizeError
from dwindle.realize.module_places import ModulePlaces
from dwindle.training.inputs import Inputs

LEAST_SQNR = 30.0
"""Decibels that packed and simulated outputs must agree to, where nothing else is asked for."""


@dataclass
class PackResult:
    """A model with packed layers.

    Attributes:
        model: The model, changed in place.
        kernels: The kernel of each layer.
        bytes: Before and after: all parameters and buffers.
        sqnr: Decibels of the outputs over their difference to the simulation's; infinite when equal.
        left: Layers that stay as they were, with the reason.
    """

    model: nn.Module
    kernels: dict[str, str] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    sqnr: float = math.inf
    left: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """Return one line for people, and one for each layer that was left."""
        before, after = (self.bytes[key] / 1e6 for key in ("before", "after"))
        text = (
            f"{len(self.kernels)} layers packed: {before:.2f} MB -> {after:.2f} MB, "
            f"outputs equal to the simulation's to {self.sqnr:.1f} dB"
        )
        return "\n".join([text, *(f"  left: {name}: {reason}" for name, reason in self.left.items())])


def put_in_place(
    model: nn.Module, fresh: Mapping[str, nn.Module], inputs: Inputs, least_sqnr: float
) -> tuple[dict[str, nn.Module], float]:
    """Replace modules, and compare the outputs before and after.

    Args:
        model: Changed in place; as it was after an error.
        fresh: The new modules by path.
        inputs: Arguments of the forward that is compared.
        least_sqnr: Decibels that the outputs must agree to.

    Returns:
        The old modules, and the decibels.

    Raises:
        RealizeError: The outputs differ.
    """
    args, kwargs = inputs
    places = ModulePlaces(model)
    old = {name: model.get_submodule(name) for name in fresh}
    with torch.no_grad():
        before = list(floating_outputs(model(*args, **kwargs)))
        try:
            for name, layer in fresh.items():
                places.put(name, layer.train(old[name].training))
            found = sqnr(before, list(floating_outputs(model(*args, **kwargs))))
            if not found >= least_sqnr:
                raise RealizeError(
                    f"packed and simulated outputs agree to {found:.1f} dB only; the model is unchanged"
                )
        except BaseException:
            for name, module in old.items():
                places.put(name, module)
            raise
    return old, found


def held_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def sqnr(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return decibels of all outputs together."""
    power = noise = 0.0
    for old, new in zip(before, after, strict=True):
        power += float(old.double().square().sum())
        noise += float((old.double() - new.double()).square().sum())
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(power / noise) if power > 0 else -math.inf


def floating_outputs(output: Any) -> Iterator[Tensor]:
    """Yield copies of the floating tensors of a model's output."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output.clone()
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from floating_outputs(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from floating_outputs(value)
