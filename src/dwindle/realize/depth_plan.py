"""From chosen residual blocks to a plan: which entries of lists go, and which numbers of the model count them.

Three kinds of numbers follow when entries of a list go: the number of each later entry where entries know their own
place (the key of a cache), the count of entries on the module or config around the list, and lists of settings
with one entry a block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from dwindle.graph.analysis import Analysis
from dwindle.graph.blocks import Block
from dwindle.graph.expressions import Attribute, variables
from dwindle.graph.tagging import config_objects
from dwindle.realize.depth import BlockRemoval, ListCut
from dwindle.realize.plan import AttributeChange, Plan

#: Names of numbers that count blocks.
_COUNTS = re.compile(r"(^|_)(n|num)_(\w+_)?(layers?|blocks?)$|(^|_)(layers|blocks|depth)$")
#: Names that speak of blocks without counting them all: every so many, the first ones, ...
_OTHERS = re.compile(r"every|per_|interval|freq|first|last|skip|window|group|output|predict|shared|between")
#: Names of the number of an entry; asked for only where two entries make a short row.
_NUMBERS = re.compile(r"idx|index|layer|block|number|(^|_)(id|i|n)$")
#: Names of lists with one entry a block.
_SETTINGS = re.compile(r"layer|block")


def write_blocks(
    plan: Plan, model: nn.Module, analysis: Analysis, blocks: Sequence[Block], *, delete: bool
) -> Plan:
    """Write the removal of blocks into a plan, in place of what it said of blocks before.

    Args:
        plan: The plan of everything.
        model: The model.
        analysis: What was recorded of it.
        blocks: The blocks that go.
        delete: Take entries out of their lists where the recording shows a plain chain; otherwise a pass-through
            takes the place of every block.

    Returns:
        A plan of the blocks alone.
    """
    depth = _plan(model, analysis, blocks, delete)
    plan.blocks, plan.lists = depth.blocks, depth.lists
    plan.attributes = [*plan.attributes, *depth.attributes]
    gone = tuple(f"{block.path}." for block in blocks)
    others = [entry for entry in plan.cuts if entry["kind"] != "block"]
    inside = [entry for entry in others if all(place.startswith(gone) for place in entry["parameters"])]
    plan.cuts = [*depth.cuts, *(entry for entry in others if entry not in inside)]
    return depth


def _plan(model: nn.Module, analysis: Analysis, blocks: Sequence[Block], delete: bool) -> Plan:
    plan = Plan()
    gone: dict[str, list[int]] = {}
    places: dict[str, Places] = {}
    counted: dict[str, bool] = {}
    for block in blocks:
        parent, _, key = block.path.rpartition(".")
        holder = model.get_submodule(parent)
        deleted = delete and block.chained and isinstance(holder, nn.ModuleList | nn.Sequential)
        if deleted and parent not in places:
            places[parent] = _places(list(holder._modules.values()))
            counted[parent] = _reads_place(analysis, parent, places[parent])
        deleted = deleted and not counted[parent]
        if deleted:
            gone.setdefault(parent, []).append(int(key))
        plan.blocks.append(
            BlockRemoval(block.path, deleted, list(block.zeroed), block.source, block.structure)
        )
    for stage in dict.fromkeys(block.stage for block in blocks):
        removed = [block.path for block in blocks if block.stage == stage]
        plan.cuts.append(
            {"kind": "block", "before": len(stage), "after": len(stage) - len(removed), "parameters": removed}
        )
    lists = _all_lists(model, analysis) if gone else {}
    for parent, own in gone.items():
        plan.attributes += _moved(parent, places[parent], own)
        size = len(model.get_submodule(parent)._modules)
        for path, owner in _around(model, parent):
            _follow(plan, path, owner, parent, size, own, lists)
    return plan


Places = dict[tuple[str, str], dict[int, int]]


def _places(entries: Sequence[nn.Module | None]) -> Places:
    """Numbers by which entries know their place: 0, 1, 2, ... over all entries that have them.

    Returns:
        For each path inside an entry and attribute there, the entries that have it.
    """
    found: Places = {}
    for place, entry in enumerate(entries):
        for path, module in entry.named_modules() if entry is not None else []:
            for key, held in vars(module).items():
                if type(held) is int:
                    found.setdefault((path, key), {})[place] = held
    ordered = {
        where: held for where, held in found.items() if all(own == place for place, own in held.items())
    }
    sure = {
        where
        for where, held in ordered.items()
        if len(held) > 2 or (len(held) == 2 and _NUMBERS.search(where[1]))
    }
    names = {key for _, key in sure}
    return {where: held for where, held in ordered.items() if where in sure or where[1] in names}


def _reads_place(analysis: Analysis, parent: str, places: Places) -> bool:
    """Whether such a number reaches an operator: moving the entry up would change what it computes."""
    labels = {
        ".".join(part for part in (parent, str(place), path, key) if part)
        for (path, key), held in places.items()
        for place in held
    }
    return bool(labels) and any(
        isinstance(variable, Attribute) and variable.label in labels
        for trace in analysis.traces
        for node in trace.nodes
        for expression in [*(node.sizes or []), *(node.floats or [])]
        for variable in variables(expression)
    )


def _moved(parent: str, places: Places, gone: Sequence[int]) -> Iterator[AttributeChange]:
    """Changes of the numbers of the entries that move up."""
    for (path, key), held in places.items():
        for place in held:
            new = place - sum(other < place for other in gone)
            if place not in gone and new != place:
                owner = ".".join(part for part in (parent, str(place), path) if part)
                yield AttributeChange(owner, key, None, place, new)


def _around(model: nn.Module, parent: str) -> Iterator[tuple[str, Any]]:
    """Modules around a list and the configs that they hold, each once, the nearest first."""
    seen: set[int] = set()
    path = parent
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        for name, owner in [("", module), *config_objects(module)]:
            if id(owner) not in seen:
                seen.add(id(owner))
                yield ".".join(part for part in (path, name) if part), owner


def _all_lists(model: nn.Module, analysis: Analysis) -> dict[str, int]:
    """Length of every list of blocks."""
    parents = {block.path.rpartition(".")[0] for block in analysis.blocks}
    return {
        parent: len(holder._modules)
        for parent in parents
        if isinstance(holder := model.get_submodule(parent), nn.ModuleList | nn.Sequential)
    }


def _follow(
    plan: Plan, path: str, owner: Any, parent: str, size: int, gone: Sequence[int], lists: dict[str, int]
) -> None:
    """Correct the counts and lists of settings on one owner around a list of ``size`` entries."""
    prefix = "" if not path else path if isinstance(owner, nn.Module) else path.rpartition(".")[0]
    others = {
        other: length
        for other, length in lists.items()
        if other != parent
        and not other.startswith(parent + ".")
        and (not prefix or other.startswith(prefix + "."))
    }
    new = size - len(gone)
    for key, held in list(vars(owner).items()):
        if key.startswith("_") or (isinstance(owner, nn.Module) and key == "training"):
            continue
        if type(held) is int and held == size and _COUNTS.search(key) and not _OTHERS.search(key):
            if _speaks_of(key, parent, owner, others):
                plan.attributes.append(AttributeChange(path, key, None, held, new))
        elif type(held) in (list, tuple) and held and all(type(item) is int for item in held):
            place = _place_among_stages(held, parent, size, others)
            if place is not None:
                change = AttributeChange(path, key, place, size, new)
                plan.attributes.append(change)
        elif (
            type(held) in (list, tuple)
            and len(held) == size
            and all(type(item) is str for item in held)
            and _SETTINGS.search(key)
            and _speaks_of(key, parent, owner, others)
        ):
            plan.lists.append(ListCut(path, key, sorted(gone)))


def _speaks_of(key: str, parent: str, owner: Any, others: dict[str, int]) -> bool:
    """Whether a setting speaks of the list at ``parent`` rather than of one of the other lists."""
    sides = ("encoder", "decoder")
    side = next((word for word in sides if word in parent), None)
    named = next((word for word in sides if word in key), None)
    if named is not None:
        return named == side
    rivals = [other for other in others if not _same_stages(other, parent)]
    if not rivals:
        return not others
    # a general name beside a special one means the other side
    special = [
        other for other in vars(owner) if _COUNTS.search(other) and any(word in other for word in sides)
    ]
    return bool(special) and side is not None and not any(side in other for other in special)


def _same_stages(first: str, second: str) -> bool:
    """Whether two paths differ in numbers only."""
    return re.sub(r"\d+", "0", first) == re.sub(r"\d+", "0", second)


def _place_among_stages(held: Sequence[int], parent: str, size: int, others: dict[str, int]) -> int | None:
    """Position of a stage in a list of the lengths of all stages; None when the list is not that."""
    stages = {parent: size, **{path: length for path, length in others.items() if _same_stages(path, parent)}}
    numbers = {path: [int(number) for number in re.findall(r"\d+", path)] for path in stages}
    if len(held) != len(stages) or any(len(own) != 1 for own in numbers.values()):
        return None
    if sorted(own[0] for own in numbers.values()) != list(range(len(held))):
        return None
    if any(held[numbers[path][0]] != length for path, length in stages.items()):
        return None
    return numbers[parent][0]
