"""What a caller of ``dw.prune`` asks for, checked before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch.nn import functional

from dwindle.config.errors import ConfigError
from dwindle.config.schema import AxisKind
from dwindle.graph.analysis import AxisInfo
from dwindle.pruning.axis_importance import AxisImportance, Loss
from dwindle.pruning.named_importances import check_data
from dwindle.realize.choose import check_name, is_named

COSTS = ("macs", "params", "bytes")
SCOPES = ("local", "global", "cost")
KINDS = (*get_args(AxisKind), "block", "expert")


@dataclass(frozen=True, slots=True)
class Wish:
    """The arguments of :func:`dwindle.prune` that say what goes; their meaning is explained there.

    Raises:
        ConfigError: One of them is not valid, or two contradict each other.
    """

    ratio: float | None
    target: Mapping[str, float] | None
    importance: AxisImportance
    scope: str
    ratios: Mapping[str, float]
    ignore: Sequence[str]
    axes: Sequence[str] | None
    round_to: int
    minimum: int
    largest_ratio: float
    exact: bool
    uniform: bool
    data: Any = None
    loss: Loss = functional.cross_entropy
    counts: Mapping[str, int] | None = None
    blocks: Sequence[str] = ()

    def __post_init__(self) -> None:
        self._check_amount()
        check_name(self.scope, list(SCOPES), "scope")
        if self.scope == "cost" and self.target is None:
            raise ConfigError(
                "scope: 'cost' ranks by importance per unit of a cost; give target=, not ratio="
            )
        if self.scope == "cost" and self.asks_for("block"):
            raise ConfigError("scope: blocks are ranked 'local' or 'global', not by 'cost'")
        for kind in self.axes or []:
            check_name(kind, list(KINDS), "axes")
        if self.target is not None and self.asks_for("expert"):
            raise ConfigError("axes: experts are removed by ratio=, not by target=")
        for name in ("round_to", "minimum"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not a positive number")
        for name, ratio in {"largest_ratio": self.largest_ratio, **self.ratios}.items():
            if not 0 <= ratio <= 1:
                raise ConfigError(f"{name}: {ratio} is not between 0 and 1")
        check_data(self.importance, self.data)

    @property
    def is_named(self) -> bool:
        """Whether it says by name what stays and what goes."""
        return self.counts is not None or bool(self.blocks)

    def _check_amount(self) -> None:
        given = [self.ratio is not None, self.target is not None, self.is_named]
        if sum(given) != 1:
            raise ConfigError(
                "give either ratio= (share of each axis to remove) or target= (share of the cost to keep), or say by "
                "name what stays, with counts= and blocks="
            )
        if self.is_named and (
            self.ratios or self.asks_for("block") or self.asks_for("expert") or self.uniform
        ):
            raise ConfigError(
                "counts= and blocks= name what stays and goes: leave ratios=, uniform= and axes=['block'] out"
            )
        if self.ratio is not None and not 0 <= self.ratio <= 1:
            raise ConfigError(f"ratio: {self.ratio} is not between 0 and 1")
        if self.target is None:
            return
        if len(self.target) != 1:
            raise ConfigError(f"target: give exactly one of {', '.join(COSTS)}, got {sorted(self.target)}")
        ((name, share),) = self.target.items()
        check_name(name, list(COSTS), "target")
        if not 0 < float(share) <= 1:
            raise ConfigError(f"target: {name} = {share} is not a share between 0 and 1")

    @property
    def preferred_factor(self) -> str:
        """Which factor of heads x head width shrinks."""
        return "head_width" if self.asks_for("head_width") and not self.asks_for("heads") else "heads"

    def asks_for(self, kind: str) -> bool:
        """Whether a kind was named."""
        return self.axes is not None and kind in self.axes

    def wants(self, info: AxisInfo, *, any_kind: bool = False) -> bool:
        """Whether an axis may shrink by this wish."""
        if self.exact and not info.exact:
            return False
        if not any_kind and self.axes is not None and info.kind not in self.axes:
            return False
        return not any(is_named(name, pattern) for pattern in self.ignore for name, _ in info.parameter_dims)
