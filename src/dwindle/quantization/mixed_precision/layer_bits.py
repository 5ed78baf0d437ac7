"""The bits of one layer, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerBits:
    """The bits of one layer.

    Attributes:
        name: The weight's path.
        kind: The operation that reads it, such as ``conv2d``.
        weight_bits: Of its weight.
        activation_bits: Of what it reads; the most, where it reads several.
        size: Number of weights.
        macs: Multiplications and additions with the example inputs.
        bit_operations: Sum over its calls of multiplications times the larger of the two numbers of bits.
        products: The same with the product of the two.
        free: Whether its bits could be chosen.
        trace: Estimated trace of the loss's Hessian over the weight; None where nothing was estimated.
        trace_error: Standard error of the trace.
        errors: Mean squared error of rounding the weight, by bits.
    """

    name: str
    kind: str
    weight_bits: int
    activation_bits: int
    size: int
    macs: int
    bit_operations: int
    products: int
    free: bool
    trace: float | None = None
    trace_error: float | None = None
    errors: dict[int, float] = field(default_factory=dict)

    @property
    def sensitivity(self) -> float | None:
        """Trace times mean squared error at the chosen bits: what rounding the weight is expected to harm."""
        error = self.errors.get(self.weight_bits)
        return None if self.trace is None or error is None else abs(self.trace) * error

    def row(self, width: int) -> str:
        """Return the line of a table, with the name in so many columns."""
        mean, error = (
            "-" if value is None else f"{value / self.size:.3g}" for value in (self.trace, self.trace_error)
        )
        harm = "-" if self.sensitivity is None else f"{self.sensitivity:.3g}"
        bits = f"{self.weight_bits:>4}/{self.activation_bits:<3}{' ' if self.free else '*'}"
        return (
            f"{self.name:{width}}  {self.kind:>10}  {bits}  {self.size:>10,}  {self.macs:>12,}  "
            f"{mean:>11}  {error:>8}  {harm:>10}"
        )
