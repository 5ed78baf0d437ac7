"""What a sensitivity analysis is made of: targets, levels of compression, and the point that was measured at each."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["KINDS", "Level", "SensitivityPoint", "SensitivityTarget", "key_of_point"]

#: The kinds of compression, in the order in which they are measured.
KINDS = ("pruning", "quantization", "factorization")


@dataclass(frozen=True)
class SensitivityTarget:
    """What is compressed alone.

    Attributes:
        kind: One of :data:`KINDS`.
        name: An axis by a parameter and dimension that has it (``"conv1.weight[0]"``), or a weight.
        members: The weights that it is made of, or that read it.
        size: Indices of the axis, or entries of the weight.
    """

    kind: str
    name: str
    members: tuple[str, ...]
    size: int


@dataclass(frozen=True)
class Level:
    """How far a target is compressed.

    Attributes:
        value: The share of an axis that goes, a number of bits, or the share of the full rank that stays.
        detail: The indices that stay, the bits of weight and input, or the ranks.
        macs: The share of the model's multiply-accumulates that stays; None where none is saved by itself (bits).
    """

    value: float
    detail: tuple[int, ...]
    macs: float | None = None


@dataclass(frozen=True)
class SensitivityPoint:
    """What one level of one target does to the model.

    Attributes:
        kind: One of :data:`KINDS`.
        target: The target's name.
        level: As :attr:`Level.value`.
        detail: As :attr:`Level.detail`.
        score: What the metric gave, or the signal to noise of the outputs in dB (infinite where nothing changed); None
            where it failed.
        drop: How much worse the score is than the unchanged model's, or, without a metric, the noise as a share of the
            outputs' energy; infinite where it failed.
        macs: As :attr:`Level.macs`.
        seconds: Wall time.
        error: Why it failed; None when it did not.
    """

    kind: str
    target: str
    level: float
    detail: tuple[int, ...]
    score: float | None
    drop: float
    macs: float | None = None
    seconds: float = 0.0
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data: an infinite score or drop becomes None."""
        data = asdict(self)
        data["detail"] = list(self.detail)
        data["score"] = self.score if self.score is not None and math.isfinite(self.score) else None
        data["drop"] = self.drop if math.isfinite(self.drop) else None
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SensitivityPoint:
        """Rebuild a point from :meth:`to_json` data."""
        failed = data["error"] is not None
        score = math.inf if data["score"] is None and not failed else data["score"]
        drop = math.inf if data["drop"] is None else float(data["drop"])
        return cls(**{**data, "detail": tuple(data["detail"]), "score": score, "drop": drop})


def key_of_point(kind: str, options: Mapping[str, Any], target: str, detail: tuple[int, ...]) -> str:
    """Return the name of a point: the same in every process, other where an option of its kind is another."""
    text = json.dumps([kind, sorted(options.items()), target, list(detail)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
