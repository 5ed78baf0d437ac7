"""What a factorization gave."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

__all__ = ["FactorizationResult", "LayerFactorization"]


@dataclass(frozen=True, slots=True)
class LayerFactorization:
    """One layer that became a chain.

    Attributes:
        method: How.
        ranks: Of the chain: one, or for Tucker-2 those of outputs and of inputs.
        full_ranks: At which nothing would be lost.
        macs_before: Of the example inputs.
        macs_after: Likewise.
        parameters_before: Weights.
        parameters_after: Weights.
        weight_error: Norm of what the weight changed by, over its norm.
        output_error: The same of the outputs on the data (in the mean square); None without data.
    """

    method: str
    ranks: tuple[int, ...]
    full_ranks: tuple[int, ...]
    macs_before: int
    macs_after: int
    parameters_before: int
    parameters_after: int
    weight_error: float
    output_error: float | None = None


@dataclass(slots=True)
class FactorizationResult:
    """A model with chains in the place of layers.

    Attributes:
        model: The model, changed in place.
        layers: What became of each layer that is a chain now.
        left: Layers that were asked for and stay whole, with the reason.
        macs_before: Of the whole model, for the example inputs.
        macs_after: Likewise.
        parameters_before: Of the whole model, shared ones once.
        parameters_after: Likewise.
        output_change: Norm of the change of the model's outputs on the example inputs, over their norm.
        proof: Largest difference, relative to the largest output, between a chain and the one layer with its product
            as weight, in float64 on random inputs, over all layers.
        notes: What else should be known.
        seconds: Wall time of the stages.
    """

    model: nn.Module
    layers: dict[str, LayerFactorization] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    macs_before: int = 0
    macs_after: int = 0
    parameters_before: int = 0
    parameters_after: int = 0
    output_change: float = math.nan
    proof: float = 0.0
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, tuple[int, ...]]:
        """The ranks of each chain."""
        return {name: layer.ranks for name, layer in self.layers.items()}

    def summary(self) -> str:
        """Return a readable account."""
        macs = self.macs_after / max(self.macs_before, 1)
        parameters = self.parameters_after / max(self.parameters_before, 1)
        lines = [
            f"{len(self.layers)} layers factorized: multiply-accumulates {self.macs_before:,} -> {self.macs_after:,} "
            f"({macs:.1%}), parameters {self.parameters_before:,} -> {self.parameters_after:,} ({parameters:.1%})"
        ]
        for name, layer in self.layers.items():
            ranks, full = ("x".join(map(str, own)) for own in (layer.ranks, layer.full_ranks))
            lost = (
                f"weight error {layer.weight_error:.3f}"
                if layer.output_error is None
                else f"output error {layer.output_error:.3f}"
            )
            share = layer.macs_after / max(layer.macs_before, 1)
            lines.append(
                f"  {layer.method:<7} rank {ranks:>9} of {full:<9} {share:>6.1%} of MACs, {lost}  {name}"
            )
        lines += [f"  left: {name}: {reason}" for name, reason in self.left.items()]
        if self.layers:
            lines.append(
                f"chains proven equal to their products: max difference {self.proof:.2g} in float64; "
                f"the model's outputs changed by {self.output_change:.2%}"
            )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data (without the model)."""
        plain = (
            "macs_before",
            "macs_after",
            "parameters_before",
            "parameters_after",
            "output_change",
            "proof",
        )
        return {
            "layers": {name: asdict(layer) for name, layer in self.layers.items()},
            "left": self.left,
            **{name: getattr(self, name) for name in plain},
            "notes": self.notes,
            "seconds": self.seconds,
        }
