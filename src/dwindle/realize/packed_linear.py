"""A linear layer that keeps its weights as packed small integers, with torch's own kernels for them on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dwindle.config.errors import ConfigError, FileFormatError
from dwindle.quantization.weight_only import PackedWeight
from dwindle.quantization.weight_only.packed_weight import from_description as packed_from_description

#: ``dequantize``: make the float matrix, multiply (any format, any size, exact). ``int4`` and ``int8``: torch's
#: products of bfloat16 inputs with packed integers, for few rows at a time.
KERNELS = ("dequantize", "int4", "int8")

_FEW_ROWS = 8
"""Up to so many rows the integer kernels are used; beyond, unpacking once costs less than their slower products."""

_INT4_GROUPS = (32, 64, 128, 256)
_KERNEL_ZERO = 8
"""The level that the int4 kernel takes for zero."""


class PackedLinear(nn.Module):
    """``y = x W' + b`` with W as packed integers in groups; for inference.

    Code that reads ``.weight`` gets the float matrix, made anew each time.

    Args:
        weight: The integers; the module takes it over.
        bias: ``[rows]`` or None.
        kernel: One of :data:`KERNELS`.

    Raises:
        ConfigError: The kernel does not know this format.
    """

    def __init__(self, weight: PackedWeight, bias: Tensor | None, kernel: str = "dequantize") -> None:
        super().__init__()
        reason = unfit(weight, kernel)
        if reason:
            raise ConfigError(reason)
        self.integers, self.kernel = weight, kernel
        self.in_features, self.out_features = weight.columns, weight.rows
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self._prepared: tuple[Tensor, Tensor, Tensor | None] | None = None

    @property
    def weight(self) -> Tensor:
        """The float matrix, ``[out, in]``, with the factor of the inputs in it."""
        matrix = self.integers.matrix()
        return matrix if self.integers.input_factor is None else matrix * self.integers.input_factor

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W' + b`` for ``x`` of shape ``[..., in]``, in the dtype of ``x``."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        few = x.numel() <= _FEW_ROWS * self.in_features
        if self.kernel == "dequantize" or not few or x.device.type != "cpu":
            return functional.linear(x, self.weight.to(x.dtype), bias)
        factor = self.integers.input_factor
        rows = (x if factor is None else x * factor).reshape(-1, self.in_features)
        packed, scales, shift = self._prepare()
        width = self.integers.form.width(self.in_features)
        if self.kernel == "int4":
            product = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.bfloat16(), packed, width, scales)
        else:
            product = torch.ops.aten._weight_int8pack_mm(rows.bfloat16(), packed, scales)
        if shift is not None:
            product = product + rows.float().unflatten(-1, (-1, width)).sum(-1) @ shift
        product = product.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return product if bias is None else product + bias

    def _prepare(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the integers and the scales in the layout of the kernel, and what zero points add; made once.

        Zero points times scales would lose their lower bits in the kernel's bfloat16, which costs more than all other
        rounding together; so they act on the sums of the inputs of each group, in float32.
        """
        if self._prepared is None:
            weight = self.integers
            levels = weight.levels().flatten(1)[:, : self.in_features]
            scale, zero = weight.scale, weight.zero_point().float()
            shift = None
            if self.kernel == "int4":
                centre = _KERNEL_ZERO - weight.form.middle  # fewer bits stand in the middle of four
                levels, zero = levels.int() + centre, zero + centre
                packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.contiguous(), 1)
                pairs = torch.stack([scale, torch.zeros_like(scale)], -1)
                scales = pairs.transpose(0, 1).contiguous().to(torch.bfloat16)
                if not bool((zero == _KERNEL_ZERO).all()):
                    shift = ((_KERNEL_ZERO - zero) * scale).t().contiguous()
            else:
                packed = (levels.int() - 128).to(torch.int8).contiguous()
                scales = scale[:, 0].to(torch.bfloat16)
            self._prepared = packed, scales, shift
        return self._prepared

    @property
    def stored_bytes(self) -> int:
        """Bytes of what is saved of it."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def description(self) -> dict[str, Any]:
        """Return what :func:`from_description` makes an empty layer of: JSON values."""
        return {**self.integers.description(), "bias": self.bias is not None, "kernel": self.kernel}

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of it."""
        return f"{self.in_features}, {self.out_features}, kernel={self.kernel}"

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self._prepared = None
        moved = super()._apply(fn, recurse)
        self.integers.scale = self.integers.scale.float()  # half precision would move every weight of a group
        return moved

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._prepared = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}


def unfit(weight: PackedWeight, kernel: str) -> str:
    """Return why a kernel cannot take these integers; empty when it can."""
    if kernel not in KERNELS:
        return f"kernel {kernel!r} is not one of {', '.join(KERNELS)}"
    form, width = weight.form, weight.form.width(weight.columns)
    if kernel == "int4":
        if form.bits > 4:
            return f"the int4 kernel does not hold {form.bits} bits"
        if width not in _INT4_GROUPS or weight.columns % width or weight.rows % 16:
            return (
                f"the int4 kernel wants groups of {', '.join(map(str, _INT4_GROUPS))} that divide the inputs, and "
                f"outputs in sixteens; these are groups of {width} in {weight.rows} x {weight.columns}"
            )
    if kernel == "int8" and (form.bits != 8 or not form.symmetric or width != weight.columns):
        return "the int8 kernel wants 8 bits, symmetric, with one scale for each output (group_size=None)"
    return ""


def from_description(entry: Mapping[str, Any]) -> PackedLinear:
    """Return a layer with room for the numbers that are to be loaded.

    Raises:
        FileFormatError: The entry is none of :meth:`PackedLinear.description`.
    """
    try:
        weight = packed_from_description(dict(entry))
        bias = torch.zeros(weight.rows) if entry["bias"] else None
        return PackedLinear(weight, bias, str(entry["kernel"]))
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"this is no description of a packed layer: {error}") from error
