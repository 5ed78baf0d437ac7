"""Carries out what :mod:`dwindle.graph.scales` found: weights take up the change of a temperature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dwindle.config.errors import RealizeError
from dwindle.graph.analysis import Analysis
from dwindle.graph.axes import Axis
from dwindle.graph.counts import CountSolver
from dwindle.graph.expressions import describe, evaluate
from dwindle.graph.origins import Elements
from dwindle.graph.rules.registry import recorded_value
from dwindle.realize.plan import Plan
from dwindle.realize.surgery import _held, tensor_slots


@dataclass(slots=True)
class Scaling:
    """One parameter whose elements are multiplied by a factor.

    Attributes:
        parameter: Its name.
        elements: Which elements, before the cut: a boolean tensor that broadcasts to its shape.
        factor: The factor.
    """

    parameter: str
    elements: torch.Tensor
    factor: float


def scalings_of(places: list[tuple[Elements, float]], change: float) -> list[Scaling]:
    """Return what a number needs that becomes ``change`` times what it was."""
    return [
        Scaling(name, elements, float(change**power))
        for group, power in places
        for name, elements in group.items()
    ]


def plan_scalings(
    plan: Plan, analysis: Analysis, solver: CountSolver, keep: Mapping[Axis, torch.Tensor]
) -> list[Scaling]:
    """Return the scalings that a cut needs, and enter them in the plan."""
    value_of = solver.value_of({leaf: int(chosen.sum()) for leaf, chosen in keep.items()})
    found: list[Scaling] = []
    for compensation in analysis.compensations:
        old = float(recorded_value(compensation.expression))
        new = float(evaluate(compensation.expression, value_of))
        if new == old:
            continue
        own = scalings_of(compensation.places, new / old)
        found += own
        enter(plan, own, describe(compensation.expression), old, new)
    for scaling in found:
        # parameters that lose nothing are replaced all the same, so that undoing works
        if scaling.parameter not in plan.keep:
            plan.keep[scaling.parameter] = {
                0: torch.arange(analysis.parameter_axes[scaling.parameter][0].size)
            }
    return found


def enter(plan: Plan, scalings: list[Scaling], label: str, old: float, new: float) -> None:
    """Write scalings into a plan."""
    names = sorted({scaling.parameter for scaling in scalings})
    plan.scales.append({"number": label, "old": old, "new": new, "parameters": names})


def after_cut(scaling: Scaling, keep: Mapping[str, Mapping[int, torch.Tensor]]) -> torch.Tensor:
    """Elements of a scaling that are still there."""
    elements = scaling.elements
    for dim, index in keep.get(scaling.parameter, {}).items():
        if elements.shape[dim] != 1:
            elements = elements.index_select(dim, index)
    return elements


def apply_scalings(
    model: nn.Module, keep: Mapping[str, Mapping[int, torch.Tensor]], scalings: list[Scaling]
) -> None:
    """Multiply the parameters of an already cut model.

    Args:
        model: The model.
        keep: What was kept of each parameter.
        scalings: What to multiply.

    Raises:
        RealizeError: The model has no such parameter.
    """
    slots: dict[str, Any] = tensor_slots(model) if scalings else {}
    for scaling in scalings:
        if scaling.parameter not in slots:
            raise RealizeError(f"the model has no parameter {scaling.parameter!r} to take up a scale")
        tensor = _held(*slots[scaling.parameter][0])
        elements = after_cut(scaling, keep)
        factor = torch.ones(elements.shape, dtype=torch.float64).masked_fill_(elements, scaling.factor)
        tensor.data.mul_(factor.to(device=tensor.device, dtype=tensor.dtype))
