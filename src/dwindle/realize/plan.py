"""A plan: what to cut where, as plain data that can be saved, replayed on a fresh model, and undone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dwindle.realize.depth import BlockRemoval, ListCut


@dataclass(slots=True)
class AttributeChange:
    """One number of a module or config that must follow the cut.

    Attributes:
        owner: Path of the module, or of the config on a module (``"encoder.config"``).
        key: Attribute name.
        index: Position when the attribute is a tuple or list.
        old: Value before.
        new: Value after.
    """

    owner: str
    key: str
    index: int | None
    old: int | float | None
    new: int | float


@dataclass(slots=True)
class Plan:
    """What realization does to a model.

    Attributes:
        keep: For each parameter or buffer, for each dimension that shrinks, the indices that stay.
        attributes: Integers to correct.
        biases: Parameters that folding adds: module path -> length of its new ``bias``.
        rewritten: Whether the result is a rewritten graph rather than the user's own module.
        cuts: One entry an axis that was cut: kind, size before and after, the parameters on it.
        scales: Numbers computed from sizes that change, and the parameters that were multiplied to make up for it.
        blocks: Residual blocks that go.
        lists: Settings with one entry a block that lose the entries of removed blocks.
        entries: Paths of further entries of lists that go (experts).
        settings: Numbers that only describe the small model (its config), changed when all else is done.
    """

    keep: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    attributes: list[AttributeChange] = field(default_factory=list)
    biases: dict[str, int] = field(default_factory=dict)
    rewritten: bool = False
    cuts: list[dict[str, Any]] = field(default_factory=list)
    scales: list[dict[str, Any]] = field(default_factory=list)
    blocks: list[BlockRemoval] = field(default_factory=list)
    lists: list[ListCut] = field(default_factory=list)
    entries: list[str] = field(default_factory=list)
    settings: list[AttributeChange] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-ready data."""
        return {
            "keep": {
                name: {str(dim): index.tolist() for dim, index in dims.items()}
                for name, dims in self.keep.items()
            },
            "attributes": [
                {"owner": c.owner, "key": c.key, "index": c.index, "old": c.old, "new": c.new}
                for c in self.attributes
            ],
            "biases": dict(self.biases),
            "rewritten": self.rewritten,
            "cuts": list(self.cuts),
            "scales": list(self.scales),
            "blocks": [asdict(block) for block in self.blocks],
            "lists": [asdict(change) for change in self.lists],
            "entries": list(self.entries),
            "settings": [asdict(change) for change in self.settings],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Rebuild a plan from :meth:`to_json` data."""
        return cls(
            keep={
                name: {int(dim): torch.tensor(index, dtype=torch.int64) for dim, index in dims.items()}
                for name, dims in data["keep"].items()
            },
            attributes=[AttributeChange(**change) for change in data["attributes"]],
            biases={name: int(size) for name, size in data.get("biases", {}).items()},
            rewritten=bool(data.get("rewritten", False)),
            cuts=list(data.get("cuts", [])),
            scales=list(data.get("scales", [])),
            blocks=[BlockRemoval(**block) for block in data.get("blocks", [])],
            lists=[ListCut(**change) for change in data.get("lists", [])],
            entries=list(data.get("entries", [])),
            settings=[AttributeChange(**change) for change in data.get("settings", [])],
        )

    def is_empty(self) -> bool:
        """Whether nothing is cut."""
        return not self.keep and not self.biases and not self.blocks and not self.entries
