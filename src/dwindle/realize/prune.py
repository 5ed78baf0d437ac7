"""``dw.prune``: structured pruning of any architecture in one call, realized and proven."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.graph.analysis import Analysis, AxisInfo, analyse_traces
from dwindle.graph.capture import capture
from dwindle.pruning.importance import IMPORTANCES
from dwindle.realize.choose import (
    Criterion,
    axis_scores,
    best_indices,
    check_name,
    counts_for_target,
    global_counts,
    local_counts,
)
from dwindle.realize.choose_blocks import select_blocks
from dwindle.realize.cost import CostModel
from dwindle.realize.experts import choose_experts, left_mixtures
from dwindle.realize.plan import Plan
from dwindle.realize.shrink import Keep, ShrinkResult, liven, shrink, zero_removed
from dwindle.realize.surgery import _held, tensor_slots
from dwindle.realize.uniform import Uniformity

_COSTS = ["macs", "params", "bytes"]
#: How often indices are chosen anew because the config would not describe them.
_MOST_TRIES = 6
_SCOPES = ["local", "global"]
_KINDS = ["channels", "heads", "head_width", "embedding", "feed_forward", "block", "expert"]


def prune(
    model: nn.Module,
    example_inputs: Any,
    *,
    ratio: float | None = None,
    target: Mapping[str, float] | None = None,
    importance: str | Criterion = "l1",
    scope: str = "local",
    ratios: Mapping[str, float] | None = None,
    ignore: Sequence[str] = (),
    axes: Sequence[str] | None = None,
    round_to: int = 1,
    minimum: int = 1,
    largest_ratio: float = 0.9,
    example_kwargs: Mapping[str, Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    verify: bool = True,
    exact: bool = False,
    uniform: bool = False,
    analysis: Analysis | None = None,
) -> ShrinkResult:
    """Remove the least important channels, heads and widths of a model, in place, with proof.

    Args:
        model: Any module; left as it was when anything fails.
        example_inputs: A tensor, or a tuple of positional inputs. A model on the ``meta`` device is planned and
            shrunk without weights, and without proof.
        ratio: Share of the indices of each axis that goes, 0 to 1.
        target: Instead of ``ratio``: ``{"macs": 0.5}``, ``{"params": 0.3}`` or ``{"bytes": 0.3}``, the share of
            the original cost that stays (met within 2 %).
        importance: ``"l1"``, ``"l2"``, ``"fpgm"``, ``"random"``, or your own ``f(weight, dim) -> scores``.
        scope: ``"local"`` (every axis loses the same share) or ``"global"`` (one ranking for all).
        ratios: Ratios by parameter name or pattern (``"layer4.*"``), in place of ``ratio`` there.
        ignore: Parameter names, module names or patterns whose axes stay.
        axes: Kinds of axes that may shrink (default: all): ``"channels"``, ``"heads"``, ``"head_width"``,
            ``"embedding"``, ``"feed_forward"``. Only on request: ``"block"`` removes whole residual blocks, ``ratio``
            of each stage, the last one of a stage never unless the ratio is 1; ``"expert"`` removes whole
            experts, at least as many stay as the router chooses for one token.
        round_to: Sizes become a multiple of this.
        minimum: At least so many indices of each axis stay.
        largest_ratio: With ``scope="global"``: the most that any axis loses.
        example_kwargs: Keyword inputs.
        optimizer: A live optimizer: its state is sliced and it goes on with the small model.
        verify: Prove in float64 that the small model equals the masked one.
        exact: Only axes whose removal equals plain masking of the parameters: no operator (a norm, a mean, a
            softmax over the axis) needs a mask inside it.
        uniform: Only what the model's own config can describe (Hugging Face): layers that the config sizes
            together keep equal counts, so that ``save_pretrained`` and ``from_pretrained`` give the small model.
        analysis: An analysis made before, to save the time.

    Raises:
        ConfigError: An argument is not valid; the model was not touched.
        CaptureError: The model fails on the inputs.
        RealizeError: The small model was not proven equal; the model is left as it was.
    """
    criterion = _checked(ratio, target, importance, scope, axes, {"round_to": round_to, "minimum": minimum})
    inputs = example_inputs if isinstance(example_inputs, tuple | list) else (example_inputs,)
    seconds: dict[str, float] = {}
    prefer = "head_width" if axes is not None and "head_width" in axes and "heads" not in axes else "heads"
    if analysis is None:
        started = time.perf_counter()
        traces, used_args, used_kwargs = capture(model, tuple(inputs), dict(example_kwargs or {}))
        seconds["capture"] = time.perf_counter() - started
        started = time.perf_counter()
        analysis = analyse_traces(traces, used_args, used_kwargs, prefer=prefer, notes=[])
        seconds["analyse"] = time.perf_counter() - started
    started = time.perf_counter()
    infos = [
        info for info in analysis.selected() if (info.exact or not exact) and _wanted(info, axes, ignore)
    ]
    uniformity = Uniformity(model, analysis) if uniform else None
    solver = uniformity.solver if uniformity is not None else analysis.solver
    if uniformity is not None:
        able = [i for i in analysis.selected() if (i.exact or not exact) and _wanted(i, None, ignore)]
        infos = uniformity.joined(infos, able)
    slots = {name: _held(*holders[0]) for name, holders in tensor_slots(model).items()}
    blocks = []
    if axes is not None and "block" in axes:
        blocks = select_blocks(
            model,
            analysis,
            slots,
            criterion,
            ratio=ratio,
            target=target,
            ratios=ratios or {},
            ignore=ignore,
            scope=scope,
            alone=not infos,
        )
        gone = tuple(f"{block.path}." for block in blocks)
        slots = {name: held for name, held in slots.items() if not name.startswith(gone)}
    experts = []
    if axes is not None and "expert" in axes:
        mixtures = left_mixtures(analysis, blocks)
        experts = choose_experts(mixtures, slots, criterion, float(ratio or 0.0), ratios or {}, ignore)
        scored = {(mixture.router, mixture.rows) for mixture in mixtures}
        infos = [info for info in infos if not scored.intersection(info.parameter_dims)]
    # axes of removed blocks follow the others, because sizes may have to agree with theirs
    lost = [info for info in infos if not any(name in slots for name, _ in info.parameter_dims)]
    infos = [info for info in infos if info not in lost]
    scores = axis_scores(analysis, [*infos, *lost], slots, criterion)

    def counts_at(own_ratio: float) -> dict:
        others = local_counts(lost, own_ratio, ratios or {}, minimum)
        if scope == "global":
            return {**others, **global_counts(infos, own_ratio, scores, largest_ratio, minimum)}
        return {**others, **local_counts(infos, own_ratio, ratios or {}, minimum)}

    def chosen_indices() -> Keep:
        if target is not None and infos:
            ((name, share),) = target.items()
            cost = CostModel.of(analysis, [block.path for block in blocks])
            share = min(1.0, float(share) * CostModel.of(analysis).cost(name, {}) / cost.cost(name, {}))
            counts = counts_for_target(counts_at, solver, cost, name, share, round_to)
        else:
            counts = solver.solve(counts_at(float(ratio or 0.0)), round_to)
        return {
            info.axis: best_indices(scores[info.axis], counts[info.axis])
            for info in [*infos, *lost]
            if counts[info.axis] < info.size
        }

    keep = chosen_indices()
    for _ in range(_MOST_TRIES if uniformity is not None else 0):
        if uniformity is None or uniformity.accepts(keep):
            break
        keep = chosen_indices()
    chosen = time.perf_counter() - started
    without_weights = any(parameter.is_meta for parameter in model.parameters())
    result = shrink(
        model,
        analysis,
        solver,
        keep,
        optimizer=optimizer,
        verify=verify and not without_weights,
        mask=_mask_for_proof,
        blocks=blocks,
        experts=experts,
    )
    result.seconds = {**seconds, **result.seconds, "shrink": result.seconds["shrink"] + chosen}
    if not keep and not blocks and not experts:
        result.notes.append(
            "nothing was cut: no axis may shrink at this ratio (see result.frozen for the reasons)"
        )
    return result


def _mask_for_proof(copy: nn.Module, plan: Plan) -> None:
    liven(copy)
    zero_removed(copy, plan)


def _checked(
    ratio: float | None,
    target: Mapping[str, float] | None,
    importance: str | Criterion,
    scope: str,
    axes: Sequence[str] | None,
    sizes: Mapping[str, int],
) -> Criterion:
    """Check every argument before any work; returns the criterion."""
    if (ratio is None) == (target is None):
        raise ConfigError(
            "give either ratio= (share of each axis to remove) or target= (share of the cost to keep)"
        )
    if ratio is not None and not 0 <= ratio <= 1:
        raise ConfigError(f"ratio: {ratio} is not between 0 and 1")
    if target is not None:
        if len(target) != 1:
            raise ConfigError(f"target: give exactly one of {', '.join(_COSTS)}, got {sorted(target)}")
        ((name, share),) = target.items()
        check_name(name, _COSTS, "target")
        if not 0 < float(share) <= 1:
            raise ConfigError(f"target: {name} = {share} is not a share between 0 and 1")
    check_name(scope, _SCOPES, "scope")
    if target is not None and "expert" in (axes or []):
        raise ConfigError("axes: experts are removed by ratio=, not by target=")
    for kind in axes or []:
        check_name(kind, _KINDS, "axes")
    for name, number in sizes.items():
        if number < 1:
            raise ConfigError(f"{name}: {number} is not a positive number")
    if callable(importance):
        return importance
    return IMPORTANCES[check_name(importance, list(IMPORTANCES), "importance")]


def _wanted(info: AxisInfo, axes: Sequence[str] | None, ignore: Sequence[str]) -> bool:
    if axes is not None and info.kind not in axes:
        return False
    for pattern in ignore:
        for name, _ in info.parameter_dims:
            if fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern + "."):
                return False
    return True
