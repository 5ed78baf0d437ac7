"""What a sensitivity analysis measures, checked before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.config.schema import AxisKind
from dwindle.factorization.forms import check_method
from dwindle.pruning.axis_importance import AxisImportance, Loss
from dwindle.pruning.named_importances import Criterion, importance_of
from dwindle.quantization.mixed_precision.choose import checked_bits
from dwindle.quantization.observers import Observer, make_observer
from dwindle.quantization.operators import get_backend
from dwindle.quantization.weights import check_weight_range
from dwindle.realize.choose import check_name
from dwindle.search.sensitivities.points import KINDS

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """The arguments of :func:`dwindle.sensitivity` that say what is measured; they are described there."""

    kinds: Sequence[str] = KINDS
    ratios: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 0.9)
    bits: Sequence[int] = (8, 6, 4, 3, 2)
    rank_ratios: Sequence[float] = (0.75, 0.5, 0.375, 0.25, 0.125)
    ranks: Sequence[int] = ()
    stop_drop: float | None = None
    importance: str | Criterion | AxisImportance = "l1"
    loss: Loss = nn.functional.cross_entropy
    axes: Sequence[str] | None = None
    input_bits: int | str | None = "same"
    weight_range: str = "minmax"
    observer: str | Callable[[], Observer] = "histogram"
    backend: str = "layers"
    method: str = "auto"
    data_aware: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.kinds, str) or not self.kinds:
            raise ConfigError(f"kinds: {self.kinds!r} is no list of some of {', '.join(KINDS)}")
        for kind in self.kinds:
            check_name(kind, list(KINDS), "kinds")
        self._check_levels()
        if self.stop_drop is not None and not self.stop_drop >= 0:
            raise ConfigError(f"stop_drop: {self.stop_drop!r} is not a drop from 0 on")
        for kind in self.axes or ():
            check_name(kind, list(get_args(AxisKind)), "axes")
        importance_of(self.importance)
        check_weight_range(self.weight_range)
        make_observer(self.observer)
        get_backend(self.backend)
        check_method(self.method)
        if isinstance(self.input_bits, str):
            if self.input_bits != "same":
                hint = did_you_mean(self.input_bits, ["same"])
                raise ConfigError(
                    f"input_bits: {self.input_bits!r} is not 'same', a number of bits or None{hint}"
                )
        elif self.input_bits is not None:
            checked_bits([self.input_bits])

    def _check_levels(self) -> None:
        checked_bits(self.bits)
        for name in ("ratios", "rank_ratios"):
            for share in getattr(self, name):
                if isinstance(share, bool) or not 0 < share < 1:
                    raise ConfigError(f"{name}: {share!r} is not a share between 0 and 1")
        for rank in self.ranks:
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ConfigError(f"ranks: {rank!r} is not a number from 1 on")
        for kind, levels in (("pruning", self.ratios), ("factorization", [*self.rank_ratios, *self.ranks])):
            if kind in self.kinds and not levels:
                raise ConfigError(
                    f"{kind}: there is no level to measure; give some, or leave it out of kinds"
                )

    def options(self, kind: str, data: str) -> dict[str, Any]:
        """Return, as plain data, what points of a kind depend on besides the model and their score.

        Args:
            kind: The kind.
            data: Checksum of the data.
        """
        if kind == "pruning":
            own: dict[str, Any] = {"importance": _name_of(self.importance), "axes": _listed(self.axes)}
            return {**own, "data": data} if importance_of(self.importance).needs_data else own
        if kind == "quantization":
            common = {"input": self.input_bits, "range": self.weight_range, "backend": self.backend}
            return (
                common
                if self.input_bits is None
                else {**common, "observer": _name_of(self.observer), "data": data}
            )
        return {"method": self.method, "data": data if self.data_aware else ""}


def _listed(names: Sequence[str] | None) -> list[str] | None:
    return None if names is None else sorted(names)


def _name_of(chosen: Any) -> str:
    """Return a name that is the same in every process."""
    if isinstance(chosen, str):
        return chosen
    name = getattr(chosen, "__qualname__", type(chosen).__qualname__)
    facts = getattr(chosen, "__dict__", {})
    plain = {
        key: value for key, value in sorted(facts.items()) if isinstance(value, str | int | float | bool)
    }
    return f"{name}{plain if plain else ''}"
