"""Recordings of one model: in evaluation and in training mode, and of branches that the example inputs do not take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from dwindle.config.errors import CaptureError
from dwindle.graph.recorder import record
from dwindle.graph.trace import Trace

#: At most this many choices by value are tried the other way.
_MOST_CHOICES = 8

#: At most so many other inputs are recorded where values decide which modules run.
_MOST_INPUTS = 4
_DECIDING = frozenset(
    {"nonzero", "nonzero_numpy", "masked_select", "_unique2", "unique_consecutive", "unique_dim"}
)


def larger_batch(args: tuple[Any, ...], kwargs: Mapping[str, Any], size: int = 2) -> tuple[Any, Any] | None:
    """Return the inputs with dimension 0 of every tensor repeated to ``size``; None when they share no batch.

    A batch of one hides merges of the batch with another axis.
    """
    flat, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    tensors = [item for item in flat if isinstance(item, torch.Tensor) and item.dim() > 0]
    sizes = {tensor.shape[0] for tensor in tensors}
    if len(sizes) != 1:
        return None
    own = sizes.pop()
    if own == 0:
        return None

    def resize(item: Any) -> Any:
        if not isinstance(item, torch.Tensor) or item.dim() == 0:
            return item
        return torch.cat([item] * -(-size // own))[:size]

    return pytree.tree_unflatten([resize(item) for item in flat], spec)


def capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, training: bool = True
) -> tuple[list[Trace], tuple[Any, ...], dict[str, Any]]:
    """Record evaluation and training mode; returns the traces and the inputs that were used.

    Where the code chooses by values and some parameters were not reached, the choices are also recorded the other
    way, so that a branch that the example inputs do not take stays intact.

    Args:
        model: Any module; it is left as it was.
        args: Positional example inputs.
        kwargs: Example inputs by name.
        training: Record the training mode, too.

    Raises:
        CaptureError: The model does not run on these inputs.
    """
    attempts: list[tuple[Any, Any]] = [(args, dict(kwargs))]
    flat = [item for item in pytree.tree_leaves((args, dict(kwargs))) if isinstance(item, torch.Tensor)]
    if any(tensor.dim() and tensor.shape[0] == 1 for tensor in flat):
        larger = larger_batch(args, kwargs)
        if larger is not None:
            attempts.insert(0, larger)
    failure: CaptureError | None = None
    for own_args, own_kwargs in attempts:
        try:
            evaluation = record(model, own_args, own_kwargs)
        except CaptureError as error:
            failure = error
            continue
        traces = [evaluation]
        if training:
            # code that draws numbers to decide (layer drop, sampled attention) does so in training only
            for device in dict.fromkeys([evaluation.executed_on, "real"]):
                with contextlib.suppress(CaptureError):
                    traces.append(record(model, own_args, own_kwargs, training=True, device=device))
                    break
            else:
                note = "training mode could not be recorded: parameters used only there are left alone"
                evaluation.notes.append(note)
        traces += _other_inputs(model, own_args, own_kwargs, traces)
        traces += _other_branches(model, own_args, own_kwargs, traces)
        return traces, tuple(own_args), dict(own_kwargs)
    raise failure if failure is not None else CaptureError("no example inputs")


def unreached(traces: Iterable[Trace]) -> set[str]:
    """Return the parameters (no buffers) that no recording used."""
    traces = list(traces)
    names = {name for trace in traces for name, held in trace.parameters.items() if held.kind == "parameter"}
    for trace in traces:
        used = {id(value) for node in trace.live_nodes() for value in node.inputs()}
        names -= {name for name in names if name in trace.parameters and id(trace.parameters[name]) in used}
    return names


def _other_inputs(model: nn.Module, args: Any, kwargs: Any, traces: list[Trace]) -> list[Trace]:
    """Recordings on other inputs, where values decide which modules run (a loop over the experts that were chosen)."""
    found: list[Trace] = []
    if not any(node.name in _DECIDING for node in traces[0].nodes):
        return found
    missing = unreached(traces)
    generator = torch.Generator().manual_seed(0)
    wider = larger_batch(args, kwargs, 16) or (args, kwargs)
    for _ in range(_MOST_INPUTS):
        if not missing:
            break
        flat, spec = pytree.tree_flatten(wider)
        drawn = pytree.tree_unflatten([_drawn(item, generator) for item in flat], spec)
        try:
            other = record(model, *drawn, device="real")
        except CaptureError:
            break
        left = unreached([*traces, *found, other])
        if left == missing:
            break
        found.append(other)
        missing = left
    return found


def _drawn(item: Any, generator: torch.Generator) -> Any:
    """A tensor like ``item``: noise, or its own integers (those between them too) in another order."""
    if not isinstance(item, torch.Tensor) or item.dtype is torch.bool or item.numel() < 2:
        return item
    if item.is_floating_point():
        return torch.randn(item.shape, generator=generator, dtype=torch.float32).to(item)
    low, high = int(item.min()), int(item.max())
    return torch.randint(low, high + 1, item.shape, generator=generator).to(item)


def _other_branches(model: nn.Module, args: Any, kwargs: Any, traces: list[Trace]) -> list[Trace]:
    """Recordings in which one choice by value went the other way and new parameters were reached."""
    evaluation = traces[0]
    missing = unreached(traces) if evaluation.choices else set()
    found: list[Trace] = []
    for number, choice in enumerate(evaluation.choices):
        if not missing or number >= _MOST_CHOICES:
            break
        if choice.free:
            with contextlib.suppress(CaptureError):
                other = record(model, args, kwargs, device="real", turned=number)
                left = unreached([*traces, *found, other])
                if left < missing:
                    found.append(other)
                    missing = left
    if missing and evaluation.choices:
        where = ", ".join(dict.fromkeys(choice.where for choice in evaluation.choices))
        evaluation.notes.append(
            f"the code reads values of tensors ({where}), and no recorded run reached {len(missing)} parameters "
            f"({', '.join(sorted(missing)[:3])}, ...): if other values lead there, give inputs that do"
        )
    return found
