"""Channels whose scale nobody sees: multiply what makes a channel, divide what reads it, and the model is the same.

A ReLU, a pooling, a reshape, a sum of two tensors with the same factor and the value path of an attention all keep a
positive factor; a sigmoid, a norm or a clip does not. This module follows the channels that convolutions, linear
layers, embeddings and norms make through a recording of the model. Where the same factor meets again (a residual
sum) two channels become one *unit*; where a factor would be noticed, the unit is frozen. What is left are all the
free scales of the model, with the elements of parameters that make and that read each: equalization and SmoothQuant
choose the factors, no architecture is known by name.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.graph import record
from dwindle.quantization.scale_rules import FROZEN, Following, Role
from dwindle.quantization.scale_units import Units


@dataclass(frozen=True)
class FreeScales:
    """The free scales of a model.

    Attributes:
        count: Number of units; number 0 is the one whose factor is always 1.
        made: For each parameter that makes units the unit of each element, broadcastable to the parameter.
        read: For each weight that reads units the unit of each element, broadcastable to the weight.
        channels: For each weight that reads units the unit of each channel of its input.
        norms: Parameters among ``made`` that only scale and shift what comes from elsewhere.
    """

    count: int
    made: dict[str, Tensor]
    read: dict[str, Tensor]
    channels: dict[str, Tensor]
    norms: frozenset[str]

    def apply(self, model: nn.Module, factors: Tensor) -> dict[str, Tensor]:
        """Change parameters in place so that every unit's values are multiplied by its factor.

        Args:
            model: The model that was analysed.
            factors: float64, positive, one for each unit; the first must be 1.

        Returns:
            By name what each changed parameter was multiplied by, broadcastable to it.
        """
        changed: dict[str, Tensor] = {}
        factors = factors.cpu()
        for name in {**self.made, **self.read}:
            change = torch.ones((), dtype=torch.float64)
            if name in self.made:
                change = change * factors[self.made[name]]
            if name in self.read:
                change = change / factors[self.read[name]]
            if bool((change == 1).all()):
                continue
            parameter = model.get_parameter(name)
            with torch.no_grad():
                parameter.copy_(parameter.double() * change.to(parameter.device))
            changed[name] = change
        return changed


def find_free_scales(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], passed_over: Container[str] = ()
) -> FreeScales:
    """Return all scales of a model that can be chosen freely. The model is not changed.

    Args:
        model: Any module, looked at in evaluation mode.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        passed_over: Paths of batch normalizations that are folded away.

    Raises:
        CaptureError: The model fails on the inputs.
    """
    trace = record(model, args, kwargs)
    following = Following(Units(), passed_over)
    for node in trace.live_nodes():
        following.node(node)
    for value in [*trace.outputs, *trace.flat_outputs]:
        if hasattr(value, "shape") and hasattr(value, "kind"):
            following.freeze_value(value)
    return _gather(model, following)


def _gather(model: nn.Module, following: Following) -> FreeScales:
    """Number the units that something makes and something reads; all others are frozen."""
    own = dict(model.named_parameters())
    units = following.units
    for name in {role.name for role in following.roles.values()} - set(own):
        following.freeze_parameter(name)
    for name in following.frozen:
        for role in following.roles_of(name):
            units.unite(role.units, FROZEN)
    made = {r.name: units.roots(r.units) for r in following.roles.values() if r.kind != "read"}
    read = {r.name: units.roots(r.units) for r in following.roles.values() if r.kind == "read"}
    channels = {name: units.roots(ids) for name, ids in following.channels.items()}
    free = _found_in(made.values(), len(units)) & _found_in(read.values(), len(units))
    free[0] = False
    numbers = torch.where(free, free.cumsum(0), 0)

    def renumbered(found: dict[str, Tensor]) -> dict[str, Tensor]:
        new = {name: numbers[ids] for name, ids in found.items()}
        return {name: ids for name, ids in new.items() if bool(ids.any())}

    return FreeScales(
        int(free.sum()) + 1,
        renumbered(made),
        renumbered(read),
        renumbered(channels),
        frozenset(role.name for role in following.roles.values() if role.kind == "elements"),
    )


def _found_in(every: Any, count: int) -> Tensor:
    found = torch.zeros(count, dtype=torch.bool)
    for ids in every:
        found[ids.reshape(-1)] = True
    return found


__all__ = ["FreeScales", "Role", "find_free_scales"]
