"""What a repair did, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class LayerRepair:
    """One layer.

    Attributes:
        name: Name of its weight.
        operation: The function that uses it.
        features: What each output is computed from.
        samples: How many samples it was fitted to.
        strength: Of the regularization; None when the layer was left.
        error_before: Error of its outputs on held-out inputs, as a share of the variance of the original's, given the
            inputs that it has after the layers before it were repaired.
        error_after: The same after its own repair; equal when it was left.
    """

    name: str
    operation: str
    features: int
    samples: int
    strength: float | None
    error_before: float
    error_after: float

    @property
    def repaired(self) -> bool:
        """Whether the layer was changed."""
        return self.strength is not None


@dataclass(slots=True)
class RepairReport:
    """The result of :func:`dwindle.repair`.

    Attributes:
        layers: One entry a layer that could be changed, in the order of their calls.
        left: Parameters that could not be, with the reason.
        output_before: Squared error of the model's outputs on held-out inputs, as a share of the original's squared
            outputs; None where they cannot be compared.
        output_after: The same after the repair.
        accepted: False when every pass made the held-out outputs worse and was taken back.
        inputs: How many batches were used to fit, and how many were held out.
        passes: Passes over the data.
        seconds: Wall time.
        notes: What the user should know.
    """

    layers: list[LayerRepair] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    output_before: float | None = None
    output_after: float | None = None
    accepted: bool = True
    inputs: tuple[int, int] = (0, 0)
    passes: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Return a readable account."""
        repaired = sum(layer.repaired for layer in self.layers)
        lines = [
            f"repaired {repaired} of {len(self.layers)} layers in {self.passes} passes, {self.seconds:.1f} s"
        ]
        if self.output_before is not None and self.output_after is not None:
            lines.append(f"error of held-out outputs {self.output_before:.2%} -> {self.output_after:.2%}")
        for layer in self.layers:
            change = (
                f"{layer.error_before:8.2%} -> {layer.error_after:8.2%}"
                if layer.repaired
                else "left as it was"
            )
            lines.append(f"  {layer.operation:<11} {change}  {layer.name}")
        lines += [f"  left: {name}: {reason}" for name, reason in self.left.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {**asdict(self), "inputs": list(self.inputs)}
