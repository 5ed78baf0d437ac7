"""What a pruner was asked for, what it did, and what followed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class SparsityRow:
    """One masked target.

    Attributes:
        target: Its path.
        requested: Share of its blocks that should go; None for targets that follow others, and for thresholds.
        achieved: Share of its entries that are masked.
        blocks: Number of units (blocks, channels, heads) among which was chosen.
        follows: What it follows, or None.
    """

    target: str
    requested: float | None
    achieved: float
    blocks: int
    follows: str | None = None

    @property
    def missed(self) -> bool:
        """Whether clearly fewer blocks go than requested (rounding down to whole blocks is no miss)."""
        return self.requested is not None and self.achieved < self.requested - 1 / max(self.blocks, 1) - 1e-6


@dataclass(frozen=True)
class PruningReport:
    """The targets of one pruner, after ``compress()``.

    Attributes:
        rows: Every masked target, in the model's order.
        notes: What could not be done, and why.
    """

    rows: tuple[SparsityRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def missed(self) -> tuple[SparsityRow, ...]:
        """The targets that stayed below what was asked."""
        return tuple(row for row in self.rows if row.missed)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {"targets": [asdict(row) for row in self.rows], "notes": list(self.notes)}

    def __str__(self) -> str:
        lines = [f"{'target':<48} {'requested':>9} {'achieved':>9}  follows"]
        for row in self.rows:
            asked = "" if row.requested is None else f"{row.requested:.2%}"
            lines.append(f"{row.target:<48} {asked:>9} {row.achieved:>9.2%}  {row.follows or ''}".rstrip())
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
