"""A proxy of energy: arithmetic by its bits, and weights read once from memory.

Picojoules of 45 nm silicon (Horowitz, "Computing's energy problem", ISSCC 2014): a float32 multiplication 3.7 and
addition 0.9, an int8 multiplication 0.2 and an int32 addition 0.1, 640 for 32 bits from DRAM. Newer silicon needs less
of all of it; ratios are what it is good for.
"""

from __future__ import annotations

__all__ = ["energy_of"]

_FLOAT_MAC, _INTEGER_MAC, _BYTE_READ = 3.7 + 0.9, 0.2 + 0.1, 640 / 4


def energy_of(integer_macs: float, float_macs: float, bytes_read: float) -> float:
    """Return picojoules of one forward pass.

    Args:
        integer_macs: Multiply-accumulates of int8 numbers.
        float_macs: Of float32 numbers.
        bytes_read: Bytes of weights.
    """
    return integer_macs * _INTEGER_MAC + float_macs * _FLOAT_MAC + bytes_read * _BYTE_READ
