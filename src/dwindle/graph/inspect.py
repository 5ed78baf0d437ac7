"""A readable dump of an analysis: what ``dwindle inspect`` prints."""

from __future__ import annotations

from typing import Any

from dwindle.graph.analysis import Analysis, AxisInfo
from dwindle.graph.axes import CONCATENATION, LEAF, PRODUCT, Axis
from dwindle.graph.unknown import unknown_operators


def structure(analysis: Analysis, axis: Axis) -> str:
    """Return the make-up of an axis, such as ``"4 heads x 8 head_width"`` or ``"64 channels + 64 channels"``."""
    axis = axis.find()
    if axis.kind == LEAF:
        info = analysis.by_axis.get(axis)
        return f"{axis.size} {info.kind}" if info is not None else str(axis.size)
    sign = {CONCATENATION: " + ", PRODUCT: " x "}.get(axis.kind, " in turn with ")
    parts = [structure(analysis, part) for part in axis.parts]
    return sign.join(
        f"({part})" if sign != " + " and (" + " in part or " in turn " in part) else part for part in parts
    )


def to_json(analysis: Analysis) -> dict[str, Any]:
    """Return the whole analysis as JSON-ready data.

    Keys: ``axes`` (id, size, kind, prunable, exact, inexact_by, reason, line, parameters), ``parameters`` (for each,
    the make-up of every dimension), ``blocks`` (path, stage, removable, reason, line, parameters: how many),
    ``mixtures`` (path, experts, chosen, removable, reason), ``prunable_share``, ``operators``,
    ``unknown_operators`` (name, source line, and the parameters that it froze, with their share), ``notes``.
    """
    return {
        "axes": [_axis_json(info) for info in analysis.axes if not info.trivial],
        "parameters": {
            name: [structure(analysis, axis) for axis in axes]
            for name, axes in analysis.parameter_axes.items()
            if axes
        },
        "blocks": [
            {
                "path": block.path,
                "stage": list(block.stage),
                "removable": block.reason is None,
                "reason": block.reason,
                "line": block.where or None,
                "parameters": len(block.parameters),
            }
            for block in analysis.blocks
        ],
        "mixtures": [
            {
                "path": mixture.path,
                "experts": mixture.size,
                "chosen": mixture.chosen,
                "removable": mixture.reason is None,
                "reason": mixture.reason,
                "line": mixture.where,
                "parameters": [f"{name}[{dim}]" for name, dim in mixture.tensors.items()] + mixture.lists,
            }
            for mixture in analysis.mixtures
        ],
        "prunable_share": analysis.prunable_share(),
        "operators": len(analysis.trace.nodes),
        "unknown_operators": [operator.to_json() for operator in unknown_operators(analysis)],
        "constraints": [f"{constraint} ({constraint.where})" for constraint in analysis.solver.constraints],
        "notes": list(analysis.notes),
    }


def _axis_json(info: AxisInfo) -> dict[str, Any]:
    return {
        "id": info.id,
        "size": info.size,
        "kind": info.kind,
        "prunable": info.selected,
        "exact": info.exact,
        "inexact_by": info.inexact,
        "reason": info.frozen_reason if not info.selected else None,
        "line": info.source_line if not info.selected else None,
        "parameters": [f"{name}[{dim}]" for name, dim in info.parameter_dims],
    }


def describe(analysis: Analysis, *, parameters: bool = True) -> str:
    """Return the analysis as text: prunable axes, then frozen ones with their reasons, then the parameters.

    Args:
        analysis: What to print.
        parameters: Whether to list the make-up of every parameter's dimensions.
    """
    lines = [
        f"{len(analysis.trace.nodes)} operators; "
        f"{analysis.prunable_share():.1%} of the parameters lie on axes that may shrink",
        "",
        "axes that may shrink",
    ]
    shown = [info for info in analysis.axes if not info.trivial]
    for info in [info for info in shown if info.selected]:
        inside = f" (mask inside {info.inexact})" if info.inexact else ""
        lines.append(f"  #{info.id:<4} {info.size:>6} {info.kind:<13} {_places(info)}{inside}")
    lines += ["", "axes that stay"]
    for info in [info for info in shown if not info.selected]:
        reason = info.frozen_reason or f"fewer than {4 if info.kind != 'heads' else 2} indices"
        where = f" ({info.source_line})" if info.source_line else ""
        lines.append(f"  #{info.id:<4} {info.size:>6} {info.kind:<13} {_places(info)}: {reason}{where}")
    if analysis.blocks:
        lines += ["", "residual blocks"]
        for block in analysis.blocks:
            where = f" ({block.where})" if block.where else ""
            state = "may go" if block.reason is None else f"stays: {block.reason}{where}"
            lines.append(f"  {block.path} (of {len(block.stage)}): {state}")
    if analysis.mixtures:
        lines += ["", "mixtures of experts"]
        for mixture in analysis.mixtures:
            chosen = f"{mixture.chosen} chosen" if mixture.chosen else "all weighed"
            state = "some may go" if mixture.reason is None else f"stay: {mixture.reason} ({mixture.where})"
            lines.append(f"  {mixture.path or 'the model'}: {mixture.size} experts, {chosen}: {state}")
    if parameters:
        lines += ["", "parameters"]
        for name, axes in analysis.parameter_axes.items():
            if axes and any(axis.size > 1 for axis in axes):
                lines.append(f"  {name}: " + "; ".join(structure(analysis, axis) for axis in axes))
    if analysis.solver.constraints:
        lines += ["", "sizes that must agree"]
        lines += [f"  {constraint} ({constraint.where})" for constraint in analysis.solver.constraints[:40]]
    unknown = unknown_operators(analysis)
    if unknown:
        lines += ["", "operators that are not followed (a rule is a few lines: see docs/axis_rules.md)"]
        lines += [f"  {operator}" for operator in unknown]
    lines += [f"note: {note}" for note in analysis.notes]
    return "\n".join(lines)


def _places(info: AxisInfo) -> str:
    names = [f"{name}[{dim}]" for name, dim in info.parameter_dims]
    return ", ".join(names[:4]) + (f", and {len(names) - 4} more" if len(names) > 4 else "")
