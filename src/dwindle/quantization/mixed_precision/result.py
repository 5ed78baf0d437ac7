"""What was chosen: bits of every layer, why, what it compresses, and the config_list that says it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from dwindle.config.errors import require
from dwindle.quantization.mixed_precision.allocation import REFERENCE_BITS
from dwindle.quantization.mixed_precision.layer_bits import LayerBits

FLOAT_BITS = 32


@dataclass(frozen=True)
class MixedPrecision:
    """A choice of bits.

    Attributes:
        layers: Every layer that computes in integers, in the order of use.
        config_list: The choice for ``dw.quantize`` and for training.
        cost: ``bit_operations`` or ``size``.
        harm: The harm that the choice was made by; None where the bits were given.
        frontier: Compression ratio and harm at the corners of the frontier of all choices.
        probes: Random directions of the traces.
        settled: Whether the traces had settled.
        trials: What a search tried.
    """

    layers: tuple[LayerBits, ...]
    config_list: list[dict[str, Any]]
    cost: str = "bit_operations"
    harm: float | None = None
    frontier: tuple[tuple[float, float], ...] = ()
    probes: int = 0
    settled: bool = True
    trials: tuple[Any, ...] = ()

    @property
    def bits(self) -> dict[str, tuple[int, int]]:
        """Bits of weight and input by layer."""
        return {own.name: (own.weight_bits, own.activation_bits) for own in self.layers}

    @property
    def compression(self) -> dict[str, float]:
        """Compression ratios by name.

        ``bit_operations``: multiplications times the larger of weight and activation bits, against all in 8 bits
        (NNCF's compression ratio). ``products``: the same with the product of the two. ``size``: bits of the
        weights, against 8 bits. ``size_float32``: the same against float32 (HAWQ's weight compression).
        """
        size = sum(own.size for own in self.layers)
        macs = sum(own.macs for own in self.layers)
        stored = sum(own.size * own.weight_bits for own in self.layers)
        return {
            "bit_operations": macs * REFERENCE_BITS / sum(own.bit_operations for own in self.layers),
            "products": macs * REFERENCE_BITS**2 / sum(own.products for own in self.layers),
            "size": size * REFERENCE_BITS / stored,
            "size_float32": size * FLOAT_BITS / stored,
        }

    @property
    def ratio(self) -> float:
        """The compression ratio of the cost that was asked for."""
        return self.compression[self.cost]

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights in their bits, without scales."""
        return sum(own.size * own.weight_bits for own in self.layers) / 8

    def table(self) -> str:
        """Return the layers as a text table."""
        width = max([len(own.name) for own in self.layers] + [5])
        lines = [
            f"{'layer':{width}}  {'kind':>10}  bits w/a   {'weights':>10}  {'MACs':>12}  "
            f"{'mean trace':>11}  {'+-':>8}  {'harm':>10}"
        ]
        lines += [own.row(width) for own in self.layers]
        ratios = ", ".join(f"{name} {value:.3f}x" for name, value in self.compression.items())
        lines.append(f"compression: {ratios}")
        if any(not own.free for own in self.layers):
            lines.append("* given, not chosen")
        if not self.settled:
            lines.append(f"traces had not settled after {self.probes} directions")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return plain data, without trials."""
        return {
            "cost": self.cost,
            "ratio": self.ratio,
            "compression": self.compression,
            "harm": self.harm,
            "probes": self.probes,
            "settled": self.settled,
            "layers": [
                {**asdict(own), "errors": {str(bits): error for bits, error in own.errors.items()}}
                for own in self.layers
            ],
            "config_list": self.config_list,
        }

    def figure(self, path: str | os.PathLike[str]) -> None:
        """Draw the bits of every layer, their sensitivity, and the frontier where it is known.

        Args:
            path: Of the picture; the ending says its kind (``.png``, ``.svg``, ``.pdf``).

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        require("matplotlib", "report")
        from dwindle.quantization.mixed_precision.picture import draw

        cost = self.cost.replace("_", " ")
        draw(self.layers, f"compression {self.ratio:.2f}x ({cost})", self._marked(), self.frontier, path)

    def _marked(self) -> tuple[float, float] | None:
        """Return where the choice stands on the frontier."""
        return None if self.harm is None else (self.ratio, self.harm)


__all__ = ["MixedPrecision"]
