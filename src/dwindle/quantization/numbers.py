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

_DTYPE = re.compile(r"^(u?)int([2-8])$")
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
        """True when levels below zero exist; such a number is stored as int8, otherwise as uint8."""
        return self.lowest < 0

    @property
    def fills_byte(self) -> bool:
        """True when the levels are all those of the stored byte, so that storing alone saturates rightly."""
        return (self.lowest, self.highest) in ((0, 255), (-128, 127))

    @classmethod
    def parse(cls, dtype: str, scheme: str | None = None) -> NumberFormat:
        """Return the levels of NNI's names.

        Args:
            dtype: ``int2`` ... ``int8`` or ``uint2`` ... ``uint8``.
            scheme: ``"symmetric"``, ``"affine"`` or None (symmetric for signed, affine for unsigned). Signed
                symmetric numbers leave out the lowest level (int8: -127 to 127), for equal sides.

        Raises:
            ConfigError: The names are not known.
        """
        match = _DTYPE.match(dtype)
        if match is None:
            raise ConfigError(f"quant_dtype {dtype!r} is not known here: int2..int8 and uint2..uint8 are")
        if scheme not in (None, "symmetric", "affine"):
            raise ConfigError(f"quant_scheme {scheme!r} is not known: 'symmetric', 'affine' or None")
        unsigned, bits = bool(match[1]), int(match[2])
        symmetric = (not unsigned) if scheme is None else scheme == "symmetric"
        if unsigned:
            return cls(0, 2**bits - 1, symmetric)
        half: int = 2 ** (bits - 1)
        return cls(-half + 1 if symmetric else -half, half - 1, symmetric)

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


def fake_quantize(
    value: Tensor, scale: Tensor, zero_point: Tensor, form: NumberFormat, axis: int | None = None
) -> Tensor:
    """Round a tensor to its quantized levels and back, with straight-through gradients inside the range.

    Torch's native kernels do the work; nothing is read back to the host.

    Args:
        value: Any floating tensor.
        scale: float32, one value, or one per index of ``axis``.
        zero_point: int32, the same shape as ``scale``.
        form: The levels.
        axis: The dimension that has a scale per index, or None for one scale.

    Returns:
        A tensor of the shape and dtype of ``value``.
    """
    scale = scale.float()
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(
            value, scale.reshape(()), zero_point.reshape(()), form.lowest, form.highest
        )
    return torch.fake_quantize_per_channel_affine(value, scale, zero_point, axis, form.lowest, form.highest)
