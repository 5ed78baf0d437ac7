"""A linear layer and a convolution whose weights and inputs have two values, packed 64 to a number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, FileFormatError
from dwindle.realize import binary_operators as operators
from dwindle.realize.binary_direct import adds_directly, binary_conv2d_direct

__all__ = ["PackedBinaryConv2d", "PackedBinaryLayer", "PackedBinaryLinear", "from_description"]

_WORD = 64


class PackedBinaryLayer(nn.Module):
    """What both packed layers share: ``(integer sum) * scale + bias``; for inference on the CPU.

    The input is still a float tensor; the layer makes it binary itself.

    Attributes:
        bits: The packed signs of the weight, int64.
        offset: int32 ``[O]``: what bit counts are taken from.
        scale: ``[O]``: one unit of the integer sum.
        bias: ``[O]`` (zeros without a bias).
        threshold: ``[inputs]``: where the input's high value begins.
        reaches: Whether a value equal to the threshold is high.
        steps: Whether the input's values are 0 and ``s`` (else ``-s`` and ``s``).
    """

    bits: Tensor
    offset: Tensor
    scale: Tensor
    bias: Tensor
    threshold: Tensor

    def __init__(self, *, reaches: bool, steps: bool) -> None:
        super().__init__()
        self.reaches, self.steps = reaches, steps

    def _keep(
        self, bits: Tensor, sums: Tensor, terms: int, scale: Tensor, bias: Tensor | None, threshold: Tensor
    ) -> None:
        """Store the numbers; ``sums`` are the sums of each output's signs and ``terms`` their number."""
        offset = sums + terms if self.steps else torch.full_like(sums, terms)
        unit = scale / 2 if self.steps else scale
        for name, value in (
            ("bits", bits),
            ("offset", offset.int()),
            ("scale", unit.clone()),
            ("bias", torch.zeros_like(unit) if bias is None else bias.detach().clone()),
            ("threshold", threshold.clone()),
        ):
            self.register_buffer(name, value)

    def _ready(self, x: Tensor) -> Tensor:
        """Return the input in a number type of the kernels.

        Raises:
            ConfigError: It is not a floating tensor on the CPU.
        """
        if x.device.type != "cpu" or not x.is_floating_point():
            raise ConfigError(
                f"packed binary layers take floating tensors on the CPU, not {x.dtype} on {x.device}"
            )
        return x if x.dtype in (torch.float32, torch.float64) else x.float()

    def _numbers(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        own = (self.scale, self.bias, self.threshold)
        return own if self.scale.dtype == dtype else tuple(tensor.to(dtype) for tensor in own)  # type: ignore[return-value]

    def signs(self) -> Tensor:
        """Return the weight's signs, +1 and -1, in the shape of the float layer's weight."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The weight as floating numbers, made anew each time, with the input's high value in it."""
        scale = self.scale * 2 if self.steps else self.scale
        signs = self.signs().to(scale.dtype)
        return signs * scale.reshape(-1, *[1] * (signs.dim() - 1))

    def description(self) -> dict[str, Any]:
        """Return what :func:`from_description` makes an empty layer of: JSON values."""
        raise NotImplementedError


class PackedBinaryLinear(PackedBinaryLayer):
    """``y = b(x) sign(W)' * scale + bias`` with a two-valued ``b(x)``.

    Args:
        signs: +1 and -1, ``[out, in]``.
        scale: ``[out]``: the weight's scale times the input's high value.
        bias: ``[out]`` or None.
        threshold: ``[in]``.
        reaches: See :class:`PackedBinaryLayer`.
        steps: See there.

    Raises:
        ConfigError: numba is not installed.
    """

    def __init__(
        self,
        signs: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        threshold: Tensor,
        *,
        reaches: bool = True,
        steps: bool = False,
    ) -> None:
        operators.kernels()
        super().__init__(reaches=reaches, steps=steps)
        self.out_features, self.in_features = signs.shape
        bits = _packed(signs).t().contiguous()
        self._keep(bits, signs.sum(1, dtype=torch.int32), self.in_features, scale, bias, threshold)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs for ``x`` of shape ``[..., in]``, in its dtype.

        Raises:
            ConfigError: The input is not a floating tensor on the CPU, or its last size is another.
        """
        if x.shape[-1] != self.in_features:
            raise ConfigError(f"this layer takes {self.in_features} features, not {x.shape[-1]}")
        ready = self._ready(x)
        scale, bias, threshold = self._numbers(ready.dtype)
        rows = ready if ready.dim() == 2 else ready.reshape(-1, self.in_features)
        out = operators.binary_linear(rows, self.bits, self.offset, scale, bias, threshold, self.reaches)
        if x.dim() != 2:
            out = out.reshape(*x.shape[:-1], self.out_features)
        return out if out.dtype == x.dtype else out.to(x.dtype)

    def signs(self) -> Tensor:
        """Return the weight's signs, int8 ``[out, in]``."""
        return _unpacked(self.bits.t(), self.in_features)

    def description(self) -> dict[str, Any]:
        """Return what :func:`from_description` makes an empty layer of: JSON values."""
        shape = [self.out_features, self.in_features]
        return {"kind": "linear", "shape": shape, "reaches": self.reaches, "steps": self.steps}

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of it."""
        return f"{self.in_features}, {self.out_features}, {'0 and s' if self.steps else 'signs'}"


class PackedBinaryConv2d(PackedBinaryLayer):
    """A 2-d convolution of a two-valued input with signs, any stride, padding, dilation and groups.

    Padding with zeros adds nothing, as in the float convolution: a zero there is neither of the two signs.

    Args:
        signs: +1 and -1, ``[out, in / groups, kernel height, kernel width]``.
        scale: ``[out]``: the weight's scale times the input's high value.
        bias: ``[out]`` or None.
        threshold: ``[in]``.
        reaches: See :class:`PackedBinaryLayer`.
        steps: See there.
        stride: Of rows and columns.
        padding: Top, bottom, left, right.
        dilation: Of rows and columns.
        groups: Of the channels.
        padding_mode: Torch's.

    Raises:
        ConfigError: numba is not installed.
    """

    tap_sums: Tensor

    def __init__(
        self,
        signs: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        threshold: Tensor,
        *,
        reaches: bool = True,
        steps: bool = False,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        padding_mode: str = "zeros",
    ) -> None:
        operators.kernels()
        super().__init__(reaches=reaches, steps=steps)
        self.out_channels, each, *kernel = signs.shape
        self.in_channels, self.groups = each * groups, groups
        self.kernel_size, self.stride, self.dilation = (kernel[0], kernel[1]), stride, dilation
        self.padding, self.padding_mode = padding, padding_mode
        taps = signs.permute(0, 2, 3, 1).reshape(self.out_channels, -1, each)
        tap_sums = taps.sum(2, dtype=torch.int32)
        terms = each * kernel[0] * kernel[1]
        direct = self._direct
        bits = _packed(taps.flatten(1)) if direct else _packed(taps).flatten(1)
        self._keep(bits, tap_sums.sum(1).int(), terms, scale, bias, threshold)
        # Padded taps are packed as -1: for signs that is taken back, for steps 0 is what they mean.
        tap_sums = torch.zeros_like(tap_sums) if steps else tap_sums
        self.register_buffer("tap_sums", tap_sums[:, :0] if direct else tap_sums)

    @property
    def _direct(self) -> bool:
        """Whether few channels meet at an output."""
        return adds_directly(self.in_channels // self.groups, self.kernel_size[0] * self.kernel_size[1])

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs for ``x`` of shape ``[N, in, H, W]`` or ``[in, H, W]``, in its dtype.

        Raises:
            ConfigError: The input is not a floating tensor on the CPU, or has other channels.
        """
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ConfigError(f"this layer takes images of {self.in_channels} channels, not {list(x.shape)}")
        ready = self._ready(x)
        scale, bias, threshold = self._numbers(ready.dtype)
        images = ready if x.dim() == 4 else ready[None]
        window: tuple[Any, ...] = (
            self.groups,
            list(self.kernel_size),
            list(self.stride),
            list(self.dilation),
            list(self.padding),
            self.padding_mode,
        )
        rest = (scale, bias, threshold, self.reaches)
        if self._direct:
            out = binary_conv2d_direct(images, self.bits, *rest, self.steps, *window)
        else:
            out = operators.binary_conv2d(images, self.bits, self.offset, self.tap_sums, *rest, *window)
        out = out if x.dim() == 4 else out[0]
        return out if out.dtype == x.dtype else out.to(x.dtype)

    def signs(self) -> Tensor:
        """Return the weight's signs, int8 ``[out, in / groups, kernel height, kernel width]``."""
        each = self.in_channels // self.groups
        shape = (self.out_channels, *self.kernel_size, each)
        if self._direct:
            taps = _unpacked(self.bits, math.prod(shape[1:])).reshape(shape)
        else:
            taps = _unpacked(self.bits.reshape(*shape[:3], -1), each)
        return taps.permute(0, 3, 1, 2)

    def description(self) -> dict[str, Any]:
        """Return what :func:`from_description` makes an empty layer of: JSON values."""
        shape = [self.out_channels, self.in_channels // self.groups, *self.kernel_size]
        return {
            "kind": "conv2d",
            "shape": shape,
            "reaches": self.reaches,
            "steps": self.steps,
            "stride": list(self.stride),
            "padding": list(self.padding),
            "dilation": list(self.dilation),
            "groups": self.groups,
            "padding_mode": self.padding_mode,
        }

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of it."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, groups={self.groups}, {'0 and s' if self.steps else 'signs'}"
        )


def _packed(signs: Tensor) -> Tensor:
    """Pack the last dimension, +1 as ones, 64 to an int64; the rest of the last number is zeros."""
    high = (signs > 0).to(torch.uint8).cpu().numpy()
    missing = -high.shape[-1] % _WORD
    high = np.pad(high, [(0, 0)] * (high.ndim - 1) + [(0, missing)])
    octets = np.ascontiguousarray(np.packbits(high, axis=-1, bitorder="little"))
    return torch.from_numpy(octets.view("<i8").copy())


def _unpacked(bits: Tensor, count: int) -> Tensor:
    """Return the first ``count`` signs of the last dimension, int8."""
    bytes_ = np.ascontiguousarray(bits.cpu().numpy()).view(np.uint8)
    high = np.unpackbits(bytes_, axis=-1, bitorder="little")[..., :count]
    return torch.from_numpy(high.astype(np.int8)) * 2 - 1


def from_description(entry: Mapping[str, Any]) -> PackedBinaryLayer:
    """Return a layer with room for the numbers that are to be loaded.

    Raises:
        FileFormatError: The entry is none of :meth:`PackedBinaryLayer.description`.
    """
    try:
        shape = [int(size) for size in entry["shape"]]
        signs = torch.ones(shape, dtype=torch.int8)
        options: dict[str, Any] = {"reaches": bool(entry["reaches"]), "steps": bool(entry["steps"])}
        scale = torch.ones(shape[0])
        if entry["kind"] == "linear" and len(shape) == 2:
            return PackedBinaryLinear(signs, scale, None, torch.zeros(shape[1]), **options)
        if entry["kind"] != "conv2d" or len(shape) != 4:
            raise ValueError(f"kind {entry['kind']!r} with the shape {shape}")
        for name, size in (("stride", 2), ("padding", 4), ("dilation", 2)):
            options[name] = tuple(int(value) for value in entry[name])
            if len(options[name]) != size:
                raise ValueError(f"{name} {entry[name]}")
        options |= {"groups": int(entry["groups"]), "padding_mode": str(entry["padding_mode"])}
        threshold = torch.zeros(shape[1] * options["groups"])
        return PackedBinaryConv2d(signs, scale, None, threshold, **options)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FileFormatError(f"this is no description of a packed binary layer: {error}") from error
