"""What a quantized number is: its levels, and the scale and zero point that a range of values gives.

The formula everywhere is ONNX's: ``q = clamp(round(x / scale) + zero_point, lowest, highest)`` with ties to
even, and back ``x' = (q - zero_point) * scale``. Zero is always exactly representable, because ranges are
widened to contain it and zero points are integers: padding and ReLU stay exact.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dwindle.config.errors import ConfigError

_DTYPE = re.compile(r"^(u?)int([2-9]|1[0-6])$")
SMALLEST_SCALE = 1e-12
"""Scales are kept above this, so that a constant zero tensor does not divide by zero."""


@dataclass(frozen=True)
class NumberFormat:
    """The integer levels of a quantized target.

    Attributes:
        lowest: The lowest level, such as 0 or -127.
        highest: The highest level, such as 255 or 127.
        symmetric: True when the zero point is fixed in the middle (0 for signed levels).
    """

    lowest: int
    highest: int
    symmetric: bool

    @property
    def signed(self) -> bool:
        """True when levels below zero exist."""
        return self.lowest < 0

    @property
    def bits(self) -> int:
        """How many bits a level takes."""
        return (self.highest - self.lowest).bit_length()

    @property
    def stored(self) -> str:
        """The type that a file stores it as: ``int8``, ``uint8``, ``int16`` or ``uint16``."""
        width = 8 if self.highest <= (127 if self.signed else 255) else 16
        return f"{'' if self.signed else 'u'}int{width}"

    @property
    def fills_storage(self) -> bool:
        """True when the levels are all those of the stored type, so that storing alone saturates rightly."""
        limits = torch.iinfo(getattr(torch, self.stored))
        return (self.lowest, self.highest) == (limits.min, limits.max)

    @classmethod
    def parse(cls, dtype: str, scheme: str | None = None, narrow: bool | None = None) -> NumberFormat:
        """Return the levels of NNI's names.

        Args:
            dtype: ``int2`` ... ``int16`` or ``uint2`` ... ``uint16``.
            scheme: ``"symmetric"``, ``"affine"`` or None (symmetric for signed, affine for unsigned).
            narrow: Leave out the lowest level (int8: -127 to 127). None does so for signed symmetric numbers, which
                then have equal sides.

        Raises:
            ConfigError: The names are not known.
        """
        match = _DTYPE.match(dtype)
        if match is None:
            raise ConfigError(f"quant_dtype {dtype!r} is not known here: int2..int16 and uint2..uint16 are")
        if scheme not in (None, "symmetric", "affine"):
            raise ConfigError(f"quant_scheme {scheme!r} is not known: 'symmetric', 'affine' or None")
        unsigned, bits = bool(match[1]), int(match[2])
        symmetric = (not unsigned) if scheme is None else scheme == "symmetric"
        left_out = int((symmetric and not unsigned) if narrow is None else narrow)
        if unsigned:
            return cls(left_out, 2**bits - 1, symmetric)
        half: int = 2 ** (bits - 1)
        return cls(-half + left_out, half - 1, symmetric)

    def to_json(self) -> dict[str, Any]:
        """Return plain data for a manifest."""
        return asdict(self)


def scale_and_zero_point(low: Tensor, high: Tensor, form: NumberFormat) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point that cover ranges of values.

    Args:
        low: Smallest values, any shape, floating.
        high: Largest values, the same shape.
        form: The levels to spread over the range.

    Returns:
        ``scale`` float32 and ``zero_point`` int32, both of the shape of ``low``. Affine scales are rounded
        down to the nearest float32 that does not reach beyond ``high``: runtimes can then drop a ``Clip`` or
        ``Relu`` before the quantizer.
    """
    low = low.double().clamp(max=0.0)
    high = high.double().clamp(min=0.0)
    if form.symmetric:
        middle = 0 if form.signed else (form.lowest + form.highest + 1) // 2
        reach = torch.maximum(-low, high)
        scale = (reach / (form.highest - middle)).clamp(min=SMALLEST_SCALE).float()
        return scale, torch.full(scale.shape, middle, dtype=torch.int32, device=scale.device)
    levels = form.highest - form.lowest
    scale = ((high - low) / levels).clamp(min=SMALLEST_SCALE).float()
    too_far = (scale.double() * levels > (high - low)) & (scale > SMALLEST_SCALE)
    scale = torch.where(too_far, torch.nextafter(scale, torch.zeros_like(scale)), scale)
    zero_point = (form.lowest - low / scale.double()).round().clamp(form.lowest, form.highest)
    return scale, zero_point.to(torch.int32)
