"""``dw.prune``: structured pruning of any architecture in one call, realized and proven."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.graph.analysis import Analysis, analyse_traces
from dwindle.graph.axes import Axis
from dwindle.graph.capture import capture
from dwindle.pruning.axis_importance import AxisImportance, Loss
from dwindle.pruning.named_importances import Criterion, importance_of
from dwindle.realize.plan import Plan
from dwindle.realize.repair import repair_inputs, repair_on
from dwindle.realize.selection import Selection, select
from dwindle.realize.shrink import ShrinkResult, liven, shrink, zero_removed
from dwindle.realize.wish import Wish
from dwindle.simulate import refuse_shards


def prune(
    model: nn.Module,
    example_inputs: Any,
    *,
    ratio: float | None = None,
    target: Mapping[str, float] | None = None,
    importance: str | Criterion | AxisImportance = "l1",
    data: Any = None,
    loss: Loss = nn.functional.cross_entropy,
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
    rewrite: bool = False,
    analysis: Analysis | None = None,
    repair: Any = None,
    counts: Mapping[str, int] | None = None,
    blocks: Sequence[str] = (),
) -> ShrinkResult:
    """Remove the least important channels, heads and widths of a model, in place, with proof.

    Args:
        model: Any module; left as it was when anything fails.
        example_inputs: A tensor, or a tuple of positional inputs. A model on the ``meta`` device is planned and
            shrunk without weights, and without proof.
        ratio: Share of the indices of each axis that goes, 0 to 1.
        target: Instead of ``ratio``: ``{"macs": 0.5}``, ``{"params": 0.3}`` or ``{"bytes": 0.3}``, the share of
            the original cost that stays (met within 2 %).
        importance: From weights alone ``"l1"``, ``"l2"``, ``"fpgm"``, ``"random"``, ``"group_norm"`` or your own
            ``f(weight, dim) -> scores``; from the model at work ``"taylor"``, ``"fisher"``, ``"hessian"`` (labels),
            ``"outputs"``, ``"activation"`` (none). Their classes in :mod:`dwindle.pruning` take options.
        data: Batches for importances that run the model, as your training loop has them.
        loss: ``loss(outputs, target)`` for those that need labels.
        scope: ``"local"`` (every axis loses the same share), ``"global"`` (one ranking for all), or ``"cost"`` (one
            ranking by importance for each unit of the target's cost; with an importance in one unit for all axes,
            such as ``Outputs(normalize="none")``, which a name of one that runs the model means here).
        ratios: Ratios by parameter name or pattern (``"layer4.*"``), in place of ``ratio`` there.
        ignore: Parameter names, module names or patterns whose axes stay.
        axes: Kinds of axes that may shrink (default: all): ``"channels"``, ``"heads"``, ``"head_width"``,
            ``"embedding"``, ``"feed_forward"``. Only on request: ``"block"`` removes whole residual blocks, ``ratio``
            of each stage, the last one of a stage never unless the ratio is 1; ``"expert"`` removes whole
            experts, at least as many stay as the router chooses for one token.
        round_to: Sizes become a multiple of this; of heads the number times their width.
        minimum: At least so many indices of each axis stay.
        largest_ratio: With ``scope="global"`` and ``"cost"``: the most that any axis loses.
        example_kwargs: Keyword inputs.
        optimizer: A live optimizer: its state is sliced and it goes on with the small model.
        verify: Prove in float64 that the small model equals the masked one.
        exact: Only axes whose removal equals plain masking of the parameters: no operator (a norm, a mean, a
            softmax over the axis) needs a mask inside it.
        uniform: Only what the model's own config can describe (Hugging Face): layers that the config sizes
            together keep equal counts, so that ``save_pretrained`` and ``from_pretrained`` give the small model.
        rewrite: Also cut axes whose size stands as a literal in the user's code. Where one is cut, the result is a
            rewritten graph, which trains and exports, and ``model`` is left as it was.
        analysis: An analysis made before, to save the time.
        repair: Unlabelled inputs with which :func:`dwindle.repair` then makes up for what was removed, as its ``data``;
            what it did stands in ``result.repair``.
        counts: Instead of ``ratio``: how many indices of each axis stay, by a parameter and dimension that has it
            (``{"layer1.0.conv1.weight[0]": 24}``). Axes that are not named stay whole, except where one that is named
            forces them. What searches find is said in this way.
        blocks: Paths of residual blocks that go, alone or beside ``counts``.

    Raises:
        ConfigError: An argument is not valid; the model was not touched.
        CaptureError: The model fails on the inputs.
        RealizeError: The small model was not proven equal; the model is left as it was.
    """
    refuse_shards(model, "dw.prune")
    wish = Wish(
        ratio=ratio,
        target=target,
        importance=importance_of(importance, comparable=scope == "cost"),
        scope=scope,
        ratios=dict(ratios or {}),
        ignore=tuple(ignore),
        axes=axes,
        round_to=round_to,
        minimum=minimum,
        largest_ratio=largest_ratio,
        exact=exact,
        uniform=uniform,
        data=data,
        loss=loss,
        counts=counts,
        blocks=tuple(blocks),
    )
    if rewrite and blocks:
        raise ConfigError("rewrite: blocks are taken out of the user's own module, not of a rewritten graph")
    if rewrite and wish.asks_for("block"):
        raise ConfigError("rewrite: blocks are taken out of the user's own module, not of a rewritten graph")
    inputs = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
    seconds: dict[str, float] = {}
    if analysis is None:
        analysis = _analysed(model, inputs, dict(example_kwargs or {}), wish, rewrite, seconds)
    started = time.perf_counter()
    selection = select(model, analysis, wish)
    seconds["choose"] = time.perf_counter() - started
    has_weights = not any(parameter.is_meta for parameter in model.parameters())
    unlabelled = None if repair is None else repair_inputs(model, repair)
    original = model if unlabelled is None else copy.deepcopy(model)
    result = shrink(
        model,
        analysis,
        selection.solver,
        selection.keep,
        optimizer=optimizer,
        verify=verify and has_weights,
        mask=_mask_for_proof,
        rewritten=rewrite and bool(_literal_leaves(analysis).intersection(selection.keep)),
        blocks=selection.blocks,
        experts=selection.experts,
    )
    result.seconds = {**seconds, **result.seconds}
    result.notes += _notes(analysis, selection, rewrite, has_weights)
    if unlabelled is not None and not selection.is_empty:
        try:
            result.repair = repair_on(result.model, original, unlabelled)
        except DwindleError as error:
            result.notes.append(f"not repaired: {error}")
    return result


def _analysed(
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    wish: Wish,
    rewrite: bool,
    seconds: dict[str, float],
) -> Analysis:
    """Record the model and work out its axes, and note how long that took."""
    started = time.perf_counter()
    traces, used_args, used_kwargs = capture(model, inputs, kwargs)
    seconds["capture"] = time.perf_counter() - started
    started = time.perf_counter()
    analysis = analyse_traces(
        traces, used_args, used_kwargs, prefer=wish.preferred_factor, notes=[], literals=not rewrite
    )
    seconds["analyse"] = time.perf_counter() - started
    return analysis


def _literal_leaves(analysis: Analysis) -> set[Axis]:
    """Leaves whose size stands as a literal in the user's code."""
    return {
        leaf
        for observation in analysis.scope.observations
        if isinstance(observation.expression, int)
        for axis in observation.axes
        for leaf in axis.leaves()
    }


def _notes(analysis: Analysis, selection: Selection, rewrite: bool, has_weights: bool) -> list[str]:
    """What the user should know about this pruning."""
    notes = []
    literal = [info for info in analysis.axes if "is a literal in the code" in (info.frozen_reason or "")]
    if literal and not rewrite:
        lines = ", ".join(dict.fromkeys(info.source_line or "an unknown line" for info in literal[:3]))
        notes.append(
            f"{len(literal)} axes stay because their sizes stand as literals in the code ({lines}); rewrite=True cuts "
            f"them too and returns a rewritten graph"
        )
    if not has_weights:
        notes.append(
            "weights on the meta device have no values: the first indices of each axis stay, nothing was proven"
        )
    if selection.is_empty:
        notes.append("nothing was cut: no axis may shrink at this ratio (see result.frozen for the reasons)")
    return notes


def _mask_for_proof(copy: nn.Module, plan: Plan) -> None:
    liven(copy)
    zero_removed(copy, plan)
