"""Takes whole residual blocks out of a live model: the entry of a list goes, or a pass-through stands in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from dwindle.config.errors import RealizeError

#: Where a list of modules keeps its entries.
_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(slots=True)
class BlockRemoval:
    """One residual block that goes.

    Attributes:
        path: Path of the module in the model as it was.
        deleted: Whether the entry is taken out of its list (the later ones move up); otherwise a
            :class:`PassThrough` takes its place.
        zeroed: Parameters whose zeros make the block the identity: how it is masked.
        source: Which argument goes through: a position or a keyword.
        structure: What it returns: ``"main"``, or a list for a tuple.
    """

    path: str
    deleted: bool
    zeroed: list[str] = field(default_factory=list)
    source: int | str | None = None
    structure: Any = "main"


@dataclass(slots=True)
class ListCut:
    """A list of settings, one a block, that loses the entries of the removed ones.

    Attributes:
        owner: Path of the module, or of the config on a module.
        key: Attribute name.
        gone: Positions that go.
    """

    owner: str
    key: str
    gone: list[int]


class PassThrough(nn.Module):
    """Stands where a residual block was removed, and returns its input as the block returned its result.

    Args:
        source: Position or keyword of the argument that goes through.
        structure: ``"main"`` to return it as it is, or a list for a tuple of it (``"main"``), None, and other
            arguments (``{"input": position or keyword}``).
    """

    def __init__(self, source: int | str = 0, structure: Any = "main") -> None:
        super().__init__()
        self.source = source
        self.structure = structure

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the argument that goes through."""
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        if self.structure == "main":
            return given[self.source]
        return tuple(
            given[self.source] if item == "main" else None if item is None else given.get(item["input"])
            for item in self.structure
        )

    def extra_repr(self) -> str:
        """Show which argument goes through."""
        return f"source={self.source!r}"


def remove_blocks(
    model: nn.Module,
    removals: Sequence[BlockRemoval],
    lists: Sequence[ListCut],
    owner_of: Callable[[nn.Module, str], Any],
    steps: list[Callable[[], None]],
) -> None:
    """Take blocks out of a model, in place.

    Args:
        model: The model.
        removals: The blocks; their paths are those of the model as it is.
        lists: Settings that lose the entries of removed blocks.
        owner_of: Finds the module or config of a path.
        steps: Functions that undo the changes are added here.

    Raises:
        RealizeError: The model has no such block.
    """
    parents: dict[str, list[BlockRemoval]] = {}
    for removal in removals:
        parents.setdefault(removal.path.rpartition(".")[0], []).append(removal)
    for change in lists:
        fields = vars(owner_of(model, change.owner))
        before = fields[change.key]
        steps.append(partial(fields.__setitem__, change.key, before))
        fields[change.key] = type(before)(
            item for place, item in enumerate(before) if place not in change.gone
        )
    holders = {path: _holder(model, path) for path in parents}  # found before any list is renumbered
    for path, own in parents.items():
        holder = holders[path]
        entries = dict(holder._modules)
        gone = {removal.path.rpartition(".")[2]: removal for removal in own}
        unknown = gone.keys() - entries.keys()
        if unknown:
            raise RealizeError(
                f"the plan removes {path}.{min(unknown)}, which {type(model).__name__} does not have"
            )
        steps.append(partial(_fill, holder, entries))
        kept: list[tuple[str, nn.Module | None]] = []
        for key, entry in entries.items():
            if key not in gone:
                kept.append((key, entry))
            elif not gone[key].deleted:
                kept.append((key, _stand_in(gone[key], entry)))
        if any(removal.deleted for removal in own):
            if not isinstance(holder, _LISTS):
                raise RealizeError(f"{path!r} is no list of modules: entries cannot be taken out of it")
            kept = [(key, entry) for key, (_, entry) in zip(entries, kept, strict=False)]
        _fill(holder, dict(kept))


def _holder(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise RealizeError(
            f"the plan removes blocks of {path!r}, which {type(model).__name__} does not have"
        ) from error


def _stand_in(removal: BlockRemoval, entry: nn.Module | None) -> nn.Module:
    if removal.source is None or removal.structure is None:
        raise RealizeError(f"nothing can stand in for {removal.path!r}")
    stand_in = PassThrough(removal.source, removal.structure)
    own = vars(stand_in)
    for key, held in vars(entry).items() if entry is not None else []:
        if key == "training" or (key not in own and isinstance(held, str | int | float)):
            own[key] = held  # what the code around reads of a block, such as its kind
    return stand_in


def _fill(holder: nn.Module, entries: dict[str, nn.Module | None]) -> None:
    holder._modules.clear()
    holder._modules.update(entries)


def zero_branches(model: nn.Module, removals: Iterable[BlockRemoval]) -> None:
    """Mask blocks in place: their branches become zero, so that each returns its input.

    Args:
        model: The model.
        removals: The blocks.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for removal in removals:
            for name in removal.zeroed:
                parameters[name].data.zero_()
