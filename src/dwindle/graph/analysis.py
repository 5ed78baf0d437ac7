"""What one model's recordings say about its axes: which are coupled, which may shrink, and why not the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dwindle.graph import axes as algebra
from dwindle.graph.axes import LEAF, PRODUCT, Axis
from dwindle.graph.blocks import Block, find_blocks
from dwindle.graph.capture import capture
from dwindle.graph.counts import CountSolver
from dwindle.graph.exactness import inexact_leaves
from dwindle.graph.experts import Mixture, find_mixtures
from dwindle.graph.nodes import Value
from dwindle.graph.own_sizes import observe_own_sizes
from dwindle.graph.positions import Positions, positions
from dwindle.graph.propagate import propagate
from dwindle.graph.rules.registry import Scope
from dwindle.graph.scales import Compensation, find_compensations
from dwindle.graph.shuffles import observe_shuffles, shuffled_leaves
from dwindle.graph.trace import Trace

#: Axes smaller than this are not pruned (gates, the three of q, k, v); heads have their own limit.
SMALLEST_AXIS = 4
SMALLEST_HEADS = 2


#: What is normalized over is an embedding; norms written by hand take a mean (of squares) over it.
_NORMALIZING = (
    "layer_norm",
    "native_layer_norm",
    "rms_norm",
    "_fused_rms_norm",
    "mean",
    "var",
    "var_mean",
    "std",
)


@dataclass(eq=False, slots=True)
class AxisInfo:
    """One leaf axis that parameters have.

    Attributes:
        id: Number within the analysis.
        size: Number of indices.
        kind: ``"channels"``, ``"heads"``, ``"head_width"``, ``"embedding"`` or ``"feed_forward"``.
        parameter_dims: Every (parameter or buffer name, dimension) that contains it.
        frozen_reason: Why nothing of it may be removed; None when it may shrink.
        source_line: Source line behind the reason.
        selected: Whether pruning shrinks it by default (one factor of each product is).
        axis: The axis itself.
        inexact: Operator and source line that keep it from being exact, such as a norm over it; None when zeros at
            the removed indices of the parameters are all the masking it needs.
    """

    id: int
    size: int
    kind: str
    parameter_dims: list[tuple[str, int]]
    frozen_reason: str | None
    source_line: str | None
    selected: bool
    axis: Axis
    inexact: str | None = None

    @property
    def exact(self) -> bool:
        """Whether removal equals plain masking of the parameters."""
        return self.inexact is None

    @property
    def trivial(self) -> bool:
        """Whether it is the kernel of a convolution, which nobody would expect to shrink."""
        kernel = self.frozen_reason in ("kernel", "spatial")
        return kernel and all(dim >= 2 for _, dim in self.parameter_dims)


@dataclass(slots=True)
class Analysis:
    """The axes of a model.

    Attributes:
        traces: The recordings: evaluation first, then training when it could be recorded.
        scope: What the rules observed.
        parameter_axes: Axes of each parameter and buffer by name.
        axes: Every leaf axis that a parameter has, frozen ones too.
        solver: Constraints between counts.
        notes: What the user should know (training mode not recorded, unknown operators).
        example_args: The inputs that were recorded (batch of at least two where possible).
        example_kwargs: Likewise.
        by_axis: The entry of ``axes`` for each leaf.
        memory: Positions that were worked out already.
        compensations: Weights that take up the change of numbers computed from sizes (temperatures).
        found_blocks: What :attr:`blocks` found, once it was asked for.
        found_mixtures: Likewise of :attr:`mixtures`.
    """

    traces: list[Trace]
    scope: Scope
    parameter_axes: dict[str, list[Axis]]
    axes: list[AxisInfo]
    solver: CountSolver
    notes: list[str]
    example_args: tuple[Any, ...]
    example_kwargs: dict[str, Any]
    by_axis: dict[Axis, AxisInfo] = field(default_factory=dict)
    memory: dict[Axis, Positions] = field(default_factory=dict)
    compensations: list[Compensation] = field(default_factory=list)
    found_blocks: list[Block] | None = None
    found_mixtures: list[Mixture] | None = None

    @property
    def blocks(self) -> list[Block]:
        """The residual blocks, those that must stay included, in the order in which they run."""
        if self.found_blocks is None:
            self.found_blocks = find_blocks(self.traces)
        return self.found_blocks

    @property
    def mixtures(self) -> list[Mixture]:
        """The mixtures of experts, in the order in which they run."""
        if self.found_mixtures is None:
            self.found_mixtures = find_mixtures(self.traces)
        return self.found_mixtures

    @property
    def trace(self) -> Trace:
        """The recording in evaluation mode."""
        return self.traces[0]

    def positions(self, parameter: str, dim: int) -> Positions:
        """Return for each leaf of that dimension its index at each position."""
        return positions(self.parameter_axes[parameter][dim], self.memory)

    def units(self, parameter: str, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return, for each index of a parameter's dimension, what must go together with it.

        Args:
            parameter: Parameter name.
            dim: Dimension of it.

        Returns:
            Two int64 tensors as long as the dimension: the id of the selected axis there (-1 where frozen) and
            the index on that axis.
        """
        size = self.parameter_axes[parameter][dim].size
        ids, index = torch.full((size,), -1), torch.full((size,), -1)
        for leaf, own in self.positions(parameter, dim).items():
            info = self.by_axis.get(leaf)
            if info is not None and info.selected:
                ids[own >= 0] = info.id
                index = torch.where(own >= 0, own, index)
        return ids, index

    def selected(self) -> list[AxisInfo]:
        """Return the axes that shrink by default."""
        return [info for info in self.axes if info.selected]

    def prunable_share(self) -> float:
        """Share of all parameter elements that lie on at least one axis that may shrink."""
        total = free = 0
        for name, value in self.trace.parameters.items():
            if value.kind != "parameter":
                continue
            elements = 1
            for size in value.shape:
                elements *= size
            total += elements
            infos = [self.by_axis.get(leaf) for axis in self.parameter_axes[name] for leaf in axis.leaves()]
            free += elements if any(info is not None and info.selected for info in infos) else 0
        return free / total if total else 0.0


def analyse(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    training: bool = True,
    prefer: str = "heads",
) -> Analysis:
    """Record a model and work out its axes. The model is not changed.

    Args:
        model: Any module.
        args: Positional example inputs (a tuple).
        kwargs: Keyword example inputs.
        training: Also record the training mode, so that branches which exist only there stay intact.
        prefer: Which factor of heads x head width shrinks: ``"heads"`` or ``"head_width"``.

    Raises:
        CaptureError: The model fails on the inputs.
    """
    args, kwargs = tuple(args), dict(kwargs or {})
    traces, used_args, used_kwargs = capture(model, args, kwargs, training=training)
    return analyse_traces(traces, used_args, used_kwargs, prefer=prefer, notes=[])


def analyse_traces(
    traces: list[Trace],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    prefer: str = "heads",
    notes: list[str],
    literals: bool = True,
) -> Analysis:
    """Work out the axes from recordings that were already made.

    Args:
        traces: Evaluation, then training where there is one.
        args: The inputs that were recorded.
        kwargs: Likewise.
        prefer: As for :func:`analyse`.
        notes: What the user should know so far.
        literals: Whether a size that stands as a literal in the user's code freezes its axis. It does for
            surgery in place; a rewritten graph can change it.
    """
    parameter_axes, scope = propagate(traces)
    every = [axis for axes in parameter_axes.values() for axis in axes]
    every += [
        axis for trace in traces for node in trace.nodes for value in node.outputs for axis in value.axes
    ]
    observe_shuffles(every, scope)
    observe_own_sizes(traces, parameter_axes, scope)
    equalities = [pair for trace in traces for pair in trace.equalities]
    scope.literals_bind = literals
    if literals:
        _freeze_literals(scope)
    compensations = find_compensations(traces, scope)
    dims: dict[Axis, list[tuple[str, int]]] = {}
    for name, axes in parameter_axes.items():
        for dim, axis in enumerate(axes):
            for leaf in dict.fromkeys(axis.leaves()):
                dims.setdefault(leaf, []).append((name, dim))
    used = {id(value) for trace in traces for node in trace.live_nodes() for value in node.inputs()}
    unused = {
        name
        for name in parameter_axes
        if not any(name in trace.parameters and id(trace.parameters[name]) in used for trace in traces)
    }
    tensors = {name: value for trace in traces for name, value in trace.parameters.items()}
    kinds = _Kinds(scope)
    inexact = inexact_leaves(scope, traces)
    infos: list[AxisInfo] = []
    for leaf, places in dims.items():
        if leaf.size == 1:
            continue
        reason, where = leaf.frozen, leaf.where
        if reason is None:
            reason = _unfit(places, tensors, unused)
            if reason is not None:
                algebra.freeze(leaf, reason)
        infos.append(
            AxisInfo(
                len(infos),
                leaf.size,
                kinds.of(leaf, places),
                places,
                reason,
                where,
                False,
                leaf,
                inexact.get(leaf),
            )
        )
    by_axis = {info.axis: info for info in infos}
    _select(every, by_axis, prefer)
    candidates = [info.axis for info in infos if info.selected]
    notes = [*(note for trace in traces for note in trace.notes), *notes]
    for name, where in dict.fromkeys((node.name, node.where) for node in scope.unknown):
        notes.append(f"operator {name} at {where} is not followed; what it touches is frozen")
    solver = CountSolver(scope, equalities, candidates)
    return Analysis(
        traces,
        scope,
        parameter_axes,
        infos,
        solver,
        notes,
        args,
        kwargs,
        by_axis,
        compensations=compensations,
    )


def _unfit(places: list[tuple[str, int]], tensors: Mapping[str, Value], unused: set[str]) -> str | None:
    """Why an axis that no rule froze should stay all the same."""
    if all(name in unused for name, _ in places):
        return "no recorded run uses it"
    if any(not tensors[name].is_floating for name, _ in places):
        return "a buffer of numbers has it"
    if len({name for name, _ in places if tensors[name].kind == "parameter"}) < 2:
        return "no other parameter shares it"
    return None


def _freeze_literals(scope: Scope) -> None:
    """A size that stands as a literal in the user's code cannot change in place."""
    for observation in scope.observations:
        if isinstance(observation.expression, int):
            where = observation.node.where if observation.node else None
            for axis in observation.axes:
                algebra.freeze(axis, f"its size {observation.expression} is a literal in the code", where)


class _Kinds:
    """Names the kind of a leaf from how it is used."""

    def __init__(self, scope: Scope) -> None:
        self.heads = {leaf for axis in scope.heads for leaf in axis.leaves()}
        self.widths = {leaf for axis in scope.head_widths for leaf in axis.leaves()}
        self.normalized = {
            leaf
            for mixing in scope.mixings
            if mixing.node.name in _NORMALIZING
            for axis in mixing.axes
            for leaf in axis.leaves()
        }

    def of(self, leaf: Axis, places: list[tuple[str, int]]) -> str:
        """Kind of a leaf that the given parameter dimensions contain."""
        if leaf in self.heads:
            return "heads"
        if leaf in self.widths:
            return "head_width"
        if leaf in self.normalized:
            return "embedding"
        names = " ".join(name for name, _ in places)
        return (
            "feed_forward"
            if len(places) <= 4 and ("fc" in names or "mlp" in names or "intermediate" in names)
            else "channels"
        )


def _select(every: list[Axis], by_axis: dict[Axis, AxisInfo], prefer: str) -> None:
    """Choose the axes that shrink: free, large enough, and one factor of each product."""
    pieces = shuffled_leaves(every)
    for info in by_axis.values():
        smallest = SMALLEST_HEADS if info.kind == "heads" else SMALLEST_AXIS
        smallest = 2 if info.axis in pieces else smallest
        info.selected = info.frozen_reason is None and info.size >= smallest
    seen: set[Axis] = set()
    for axis in every:
        root = axis.find()
        if root not in seen:
            seen.add(root)
            _select_in(root, by_axis, prefer, seen)


def _select_in(axis: Axis, by_axis: dict[Axis, AxisInfo], prefer: str, seen: set[Axis]) -> None:
    if axis.kind == LEAF:
        return
    if axis.kind != PRODUCT:
        for part in axis.parts:
            _select_in(part.find(), by_axis, prefer, seen)
        return
    free = []
    for factor in algebra.factors(axis):
        infos = [
            by_axis[leaf]
            for leaf in dict.fromkeys(factor.leaves())
            if leaf in by_axis and by_axis[leaf].selected
        ]
        if infos:
            free.append(infos)
        _select_in(factor.find(), by_axis, prefer, seen)
    if len(free) < 2:
        return
    wanted = [infos for infos in free if any(info.kind == prefer for info in infos)]
    chosen = wanted[0] if wanted else free[0]
    for infos in free:
        if infos is not chosen:
            for info in infos:
                info.selected = False
                info.frozen_reason = "another factor of the same product shrinks"
