"""Which residual blocks go: a score for each, and how many of each stage may."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.graph.analysis import Analysis
from dwindle.graph.blocks import Block
from dwindle.pruning.axis_importance import AxisImportance
from dwindle.realize.choose import is_named
from dwindle.realize.cost import CostModel


def matches(block: Block, pattern: str) -> bool:
    """Whether a pattern names a block: its path, a module around it, or one of its parameters."""
    return is_named(block.path, pattern) or any(
        fnmatch.fnmatchcase(name, pattern) for name in block.parameters
    )


def is_ignored(block: Block, patterns: Sequence[str]) -> bool:
    """Whether a block must stay: a pattern names it, or anything inside it."""
    return any(
        matches(block, pattern) or any(name.startswith(pattern + ".") for name in block.parameters)
        for pattern in patterns
    )


def named_blocks(analysis: Analysis, paths: Sequence[str]) -> list[Block]:
    """Return the blocks of some paths, in the order in which they run.

    Raises:
        ConfigError: A path is no residual block, or one that must stay.
    """
    by_path = {block.path: block for block in analysis.blocks}
    for path in paths:
        if path not in by_path:
            able = [own.path for own in analysis.blocks if own.reason is None]
            raise ConfigError(
                f"blocks: {path!r} is no residual block of this model; those that may go are "
                f"{', '.join(able) or 'none'}{did_you_mean(path, able)}"
            )
        if by_path[path].reason is not None:
            raise ConfigError(f"blocks: {path!r} must stay: {by_path[path].reason}")
    return [block for block in analysis.blocks if block.path in set(paths)]


def block_scores(
    blocks: Sequence[Block], tensors: Mapping[str, torch.Tensor], importance: AxisImportance
) -> dict[str, float]:
    """Return the importance of each block, by path; a block whose branches end in zeros scores zero.

    The score of a weight is the mean of the importance over its indices, divided by the mean over the weights at
    the same place of the stage's other blocks, so that blocks of all stages can be ranked together. A block's
    score is the mean over its weights, times the mean over the weights or scales that end its branches.

    Args:
        blocks: The blocks.
        tensors: Parameter values by name.
        importance: Scores the indices of single weights.
    """
    raw: dict[str, dict[str, float]] = {}
    for block in blocks:
        raw[block.path] = {}
        for name in block.parameters:
            tensor = tensors.get(name)
            own = name in block.zeroed and not name.endswith("bias")
            if tensor is None or not tensor.is_floating_point() or (tensor.dim() < 2 and not own):
                continue
            data = tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()
            raw[block.path][name.removeprefix(block.path)] = float(
                importance.of_weight(name, data, 0).double().mean()
            )
    scores = {}
    for block in blocks:
        beside = [raw[path] for path in block.stage if path in raw]
        ends = {name.removeprefix(block.path) for name in block.zeroed}
        every, ending = [], []
        for place, value in raw[block.path].items():
            values = [own[place] for own in beside if place in own]
            mean = sum(values) / len(values)
            relative = value / mean if mean > 0 else 0.0
            every.append(relative)
            if place in ends:
                ending.append(relative)
        whole = sum(every) / len(every) if every else 0.0
        scores[block.path] = whole * (sum(ending) / len(ending) if ending else 1.0)
    return scores


def choose_blocks(
    blocks: Sequence[Block],
    scores: Mapping[str, float],
    ratio: float,
    by_name: Mapping[str, float],
    *,
    everywhere: bool,
) -> list[Block]:
    """Return the blocks that go.

    Of ``n`` blocks of a stage (those that must stay, such as the one that changes the width, included),
    ``ratio * n`` go, rounded down, the least important first. One always stays, unless the ratio is 1.

    Args:
        blocks: The blocks that may go.
        scores: Importance by path.
        ratio: Share that goes.
        by_name: Shares by pattern, in place of ``ratio`` for the blocks that match.
        everywhere: One ranking over all stages, instead of the same share of each.
    """
    groups: dict[tuple[tuple[str, ...], float], list[Block]] = {}
    shares: dict[str, float] = {}
    for block in blocks:
        own = next((share for pattern, share in by_name.items() if matches(block, pattern)), ratio)
        shares[block.path] = own
        groups.setdefault(((), own) if everywhere else (block.stage, own), []).append(block)
    left = {block.stage: len(block.stage) for block in blocks}
    gone: list[Block] = []
    for (_, share), members in groups.items():
        size = _size(members, blocks, shares, share)
        count = min(len(members), size - int(size * (1 - share) + 0.5))
        for block in sorted(members, key=lambda own: scores[own.path]):
            if count == 0:
                break
            if left[block.stage] > 1 or share == 1:
                left[block.stage] -= 1
                count -= 1
                gone.append(block)
    order = {block.path: place for place, block in enumerate(blocks)}
    return sorted(gone, key=lambda own: order[own.path])


def _size(
    members: Sequence[Block], blocks: Sequence[Block], shares: Mapping[str, float], share: float
) -> int:
    """Number of blocks that a share is of: the members, and those of their stages that must stay anyway."""
    may_go = {block.path for block in blocks}
    stages = {block.stage for block in members}
    whole = {stage for stage in stages if all(shares.get(path, share) == share for path in stage)}
    return len(members) + sum(path not in may_go for stage in whole for path in stage)


def removable(model: nn.Module, blocks: Sequence[Block]) -> list[Block]:
    """Return the blocks that may go; those that stand at several places in the model get their reason.

    Args:
        model: The model.
        blocks: What the recording shows.
    """
    places: dict[int, int] = {}
    for module in model.modules():
        for entry in module._modules.values():
            places[id(entry)] = places.get(id(entry), 0) + 1
    for block in blocks:
        if block.reason is None and places.get(id(model.get_submodule(block.path)), 0) != 1:
            block.reason = "it stands at several places of the model"
    return [block for block in blocks if block.reason is None]


def blocks_for_target(
    blocks: Sequence[Block],
    scores: Mapping[str, float],
    by_name: Mapping[str, float],
    cost_without: Callable[[Sequence[Block]], float],
    goal: float,
) -> list[Block]:
    """Return the blocks that bring the cost nearest to a goal, from all stages alike.

    Args:
        blocks: The blocks that may go.
        scores: Importance by path.
        by_name: Shares by pattern, for the blocks that match.
        cost_without: Cost of the model without some blocks.
        goal: Cost to come near to.
    """
    steps = sorted({place / len(block.stage) for block in blocks for place in range(len(block.stage))})
    best: list[Block] = []
    gap = abs(cost_without(best) - goal)
    for ratio in steps:
        trial = choose_blocks(blocks, scores, ratio, by_name, everywhere=False)
        own = abs(cost_without(trial) - goal)
        if own < gap:
            best, gap = trial, own
    return best


def select_blocks(
    model: nn.Module,
    analysis: Analysis,
    tensors: Mapping[str, torch.Tensor],
    importance: AxisImportance,
    *,
    ratio: float | None,
    target: Mapping[str, float] | None,
    ratios: Mapping[str, float],
    ignore: Sequence[str],
    scope: str,
    alone: bool,
) -> list[Block]:
    """Return the residual blocks of a model that go.

    Args:
        model: The model.
        analysis: What was recorded of it.
        tensors: Parameter values by name.
        importance: Scores the indices of single weights.
        ratio: Share of the blocks of each stage.
        target: Instead: a cost and the share of it that stays. Where other axes shrink as well, blocks go half
            of the way (the square root of the share).
        ratios: Shares by pattern.
        ignore: Patterns of what stays.
        scope: ``"local"`` or ``"global"``.
        alone: Whether nothing else shrinks.
    """
    blocks = [block for block in removable(model, analysis.blocks) if not is_ignored(block, ignore)]
    scores = block_scores(blocks, tensors, importance)
    if target is None:
        return choose_blocks(blocks, scores, ratio or 0.0, ratios, everywhere=scope == "global")
    ((name, share),) = target.items()

    def cost(gone: Sequence[Block]) -> float:
        return CostModel.of(analysis, [block.path for block in gone]).cost(name, {})

    return blocks_for_target(blocks, scores, ratios, cost, cost([]) * (share if alone else share**0.5))
