"""One way to compress a model, as plain data: what a trial tries, what a recipe says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from dwindle.config.errors import ConfigError, did_you_mean

__all__ = ["Candidate"]

Numbers = Literal["int8", "float32"]


@dataclass(frozen=True)
class Candidate:
    """Which blocks go, which ranks and counts stay, and which layers run in integers.

    Attributes:
        blocks: Paths of residual blocks that go, first of all.
        ranks: Rank of layers that become chains of two, by path.
        factorize_first: Whether ranks are made before the axes are cut, or behind that.
        counts: How many indices of each axis stay, by name, in the model without the blocks (and with the chains,
            where those are made first). Axes that are not named stay whole.
        importance: Which indices stay, as in :func:`dwindle.prune`.
        numbers: What the model runs in.
        float_layers: Layers that stay in float where the others are int8.
        quantize_at: The share of the training behind which layers are rounded.
    """

    blocks: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    factorize_first: bool = True
    counts: Mapping[str, int] = field(default_factory=dict)
    importance: str = "l1"
    numbers: Numbers = "int8"
    float_layers: tuple[str, ...] = ()
    quantize_at: float = 0.0

    @property
    def key(self) -> str:
        """A name that is the same in every process for the same candidate."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def config_list(self) -> list[dict[str, Any]] | None:
        """The entries that leave layers in float; None where none is."""
        if not self.float_layers:
            return None
        return [{"op_names": list(self.float_layers), "quant_dtype": None}]

    def but(self, **changes: Any) -> Candidate:
        """Return a candidate that differs in some attributes."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        data = asdict(self)
        return {**data, "blocks": list(self.blocks), "float_layers": list(self.float_layers)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Candidate:
        """Rebuild a candidate.

        Raises:
            ConfigError: A key is not known.
        """
        known = list(cls.__dataclass_fields__)
        for key in data:
            if key not in known:
                raise ConfigError(f"candidate: unknown key {key!r}{did_you_mean(key, known)}")
        own = dict(data)
        for key in ("blocks", "float_layers"):
            own[key] = tuple(own.get(key, ()))
        return cls(**own)

    def stages(self) -> list[dict[str, Any]]:
        """Return the stages of a recipe that shrink a model like this, without the training.

        The rounding belongs to the training: the stage ``auto`` with this candidate does both.
        """
        found: list[dict[str, Any]] = []
        if self.blocks:
            found.append({"prune": {"name": "blocks", "blocks": list(self.blocks)}})
        ranks, cuts = [], []
        if self.ranks:
            entries = [{"op_names": [path], "rank": rank} for path, rank in self.ranks.items()]
            ranks.append({"factorize": {"config_list": entries}})
        if self.counts:
            cuts.append({"prune": {"counts": dict(self.counts), "importance": self.importance}})
        return found + (ranks + cuts if self.factorize_first else cuts + ranks)

    def summary(self) -> str:
        """Say it in a few words."""
        parts = []
        if self.blocks:
            parts.append(f"without {', '.join(self.blocks)}")
        if self.ranks:
            parts.append(f"{len(self.ranks)} layer{'s' if len(self.ranks) > 1 else ''} of low rank")
        if self.counts:
            parts.append(f"{len(self.counts)} {'axes' if len(self.counts) > 1 else 'axis'} cut")
        if self.numbers == "int8":
            layers = len(self.float_layers)
            left = f", {layers} layer{'s' if layers > 1 else ''} in float" if layers else ""
            parts.append(f"int8{left}")
        return ", ".join(parts) or "as it is"
