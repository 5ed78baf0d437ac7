"""Describes the layers of a model: how wide each is and how many of its weights are zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dwindle.factorization import FactorizedLayer

__all__ = ["describe_layers"]


def describe_layers(model: nn.Module) -> list[dict[str, Any]]:
    """List the modules that hold a weight with two dimensions or more, in the order of the model.

    Returns:
        One entry a module: its name, type, the weight's shape, its number of elements and how many are zero.
    """
    found: list[dict[str, Any]] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() < 2 or id(weight) in seen:
            continue
        if isinstance(module, FactorizedLayer):  # its parts are layers; the product is none
            continue
        seen.add(id(weight))
        found.append(
            {
                "name": name,
                "type": _type_name(module),
                "shape": list(weight.shape),
                "elements": weight.numel(),
                "zeros": int((weight.detach() == 0).sum()),
            }
        )
    return found


def _type_name(module: nn.Module) -> str:
    """The module's own class, seen through torch's parametrization (which puts a class before it)."""
    kind = type(module)
    return kind.__name__.removeprefix("Parametrized")
