"""Linear layers and convolutions that compute in 8-bit integers in torch itself, with oneDNN's kernels on a CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, FileFormatError
from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.quantizers.blocks import VALUES, blocks, dense

_SHIFT = 128
"""Kernels take unsigned inputs: signed levels are counted from here."""


class IntegerLayer(nn.Module):
    """Rounds its input to 8-bit levels, multiplies integers, and gives float32; for inference on a CPU.

    Args:
        integers: int8, the shape of the float weight.
        weight_scale: float32 ``[outputs]``.
        bias: float32 ``[outputs]``, or None.
        input_scale: float32, one value.
        input_zero_point: int32, one value.
        form: Levels of the input.
    """

    integers: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(
        self,
        integers: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        input_scale: Tensor,
        input_zero_point: Tensor,
        form: NumberFormat,
    ) -> None:
        super().__init__()
        self.form = form
        self.register_buffer("integers", integers.to(torch.int8).contiguous())
        self.register_buffer("weight_scale", weight_scale.detach().float().expand(len(integers)).clone())
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self.register_buffer("input_scale", input_scale.detach().float().reshape(()).clone())
        self.register_buffer(
            "input_zero_point", input_zero_point.detach().to(torch.int32).reshape(()).clone()
        )
        self._prepared: tuple[Any, Tensor, float, int] | None = None

    @property
    def weight(self) -> Tensor:
        """The float weight, made anew each time."""
        return self.integers.float() * self.weight_scale.reshape(-1, *[1] * (self.integers.dim() - 1))

    def prepack(self, scale: float, zero_point: int) -> Any:
        """Return the weight in the layout of the kernel."""
        raise NotImplementedError

    def product(self, levels: Tensor, packed: Any, zeros: Tensor, scale: float, zero_point: int) -> Tensor:
        """Return the float result of the integer kernel."""
        raise NotImplementedError

    def levels(self, x: Tensor, inverse: float, zero_point: int) -> Tensor:
        """Return the input's levels, uint8.

        Piece by piece: new memory for a whole float tensor costs more than all the arithmetic.
        """
        shift = _SHIFT if self.form.signed else 0
        low, high = self.form.lowest + shift, self.form.highest + shift
        (x,) = dense(x)
        result = torch.empty_like(x, dtype=torch.uint8)
        scratch = x.new_empty(min(VALUES * torch.get_num_threads(), x.numel()))
        for (piece, room), _ in blocks([x, result], [], None):
            rounded = torch.mul(piece, inverse, out=scratch[: piece.numel()])
            room.copy_(rounded.round_().add_(zero_point).clamp_(low, high))
        return result

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer gives for a float input, in its dtype."""
        if self._prepared is None:
            scale = float(self.input_scale)
            zero_point = int(self.input_zero_point) + (_SHIFT if self.form.signed else 0)
            zeros = torch.zeros(len(self.integers), dtype=torch.int64)
            self._prepared = self.prepack(scale, zero_point), zeros, scale, zero_point
        packed, zeros, scale, zero_point = self._prepared
        inverse = float(self.input_scale.reciprocal())
        levels = self.levels(x.float(), inverse, zero_point)
        return self.product(levels, packed, zeros, scale, zero_point).to(x.dtype)

    def description(self) -> dict[str, Any]:
        """Return what :func:`from_description` makes an empty layer of: JSON values."""
        return {
            "layer": type(self).__name__,
            "shape": list(self.integers.shape),
            "bias": self.bias is not None,
            "form": self.form.to_json(),
        }

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self._prepared = None
        before = dict(self._buffers)
        moved = super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)  # scales in half precision would be other numbers
        return moved

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._prepared = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}


class IntegerLinear(IntegerLayer):
    """``y = x W' + b`` for ``x`` of shape ``[..., inputs]``."""

    def prepack(self, scale: float, zero_point: int) -> Any:
        """Return the weight in the layout of the kernel."""
        return torch.ops.onednn.qlinear_prepack(self.integers, None)

    def product(self, levels: Tensor, packed: Any, zeros: Tensor, scale: float, zero_point: int) -> Tensor:
        """Return the float result of the integer kernel."""
        rows = levels.reshape(-1, self.integers.shape[1])
        result: Tensor = torch.ops.onednn.qlinear_pointwise(
            rows, scale, zero_point, packed, self.weight_scale, zeros, self.bias, 1.0, 0, torch.float32, "none", [], ""
        )  # fmt: skip
        return result.reshape(*levels.shape[:-1], len(self.integers))

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of it."""
        return f"{self.integers.shape[1]}, {self.integers.shape[0]}"


class IntegerConvolution(IntegerLayer):
    """A convolution of one, two or three dimensions.

    Args:
        numbers: As in :class:`IntegerLayer`.
        stride: For each dimension.
        padding: For each dimension, of zeros.
        dilation: For each dimension.
        groups: Groups of channels.
    """

    def __init__(
        self,
        *numbers: Any,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        super().__init__(*numbers)
        self.stride, self.padding, self.dilation = list(stride), list(padding), list(dilation)
        self.groups = groups

    def prepack(self, scale: float, zero_point: int) -> Any:
        """Return the weight in the layout of the kernel."""
        return torch.ops.onednn.qconv_prepack(
            self.integers, self.weight_scale, scale, zero_point, self.stride, self.padding, self.dilation, self.groups,
            None,
        )  # fmt: skip

    def levels(self, x: Tensor, inverse: float, zero_point: int) -> Tensor:
        """Return the input's levels, uint8, with channels last where the kernel wants them so."""
        own = super().levels(x, inverse, zero_point)
        return own.contiguous(memory_format=torch.channels_last) if own.dim() == 4 else own

    def product(self, levels: Tensor, packed: Any, zeros: Tensor, scale: float, zero_point: int) -> Tensor:
        """Return the float result of the integer kernel."""
        kernel = getattr(torch.ops.onednn, f"qconv{levels.dim() - 2}d_pointwise")
        result: Tensor = kernel(
            levels, scale, zero_point, packed, self.weight_scale, zeros, self.bias, self.stride, self.padding,
            self.dilation, self.groups, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return result

    def description(self) -> dict[str, Any]:
        """Return what :func:`from_description` makes an empty layer of: JSON values."""
        more = {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }
        return {**super().description(), **more}

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of it."""
        return f"{tuple(self.integers.shape)}, stride={self.stride}, padding={self.padding}, groups={self.groups}"


def geometry(layer: nn.Module) -> dict[str, Any]:
    """Return stride, padding, dilation and groups of a convolution as numbers.

    Raises:
        ConfigError: It pads with something else than zeros, or by different amounts on two sides.
    """
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if layer.padding_mode != "zeros":
        raise ConfigError(f"it pads with {layer.padding_mode!r}")
    padding: Sequence[int]
    if layer.padding == "valid":
        padding = [0] * len(layer.kernel_size)
    elif layer.padding == "same":
        reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if any(size % 2 for size in reach):
            raise ConfigError("it pads the two sides differently")
        padding = [size // 2 for size in reach]
    else:
        padding = [int(size) for size in layer.padding]
    return {"stride": layer.stride, "padding": padding, "dilation": layer.dilation, "groups": layer.groups}


def from_description(entry: Mapping[str, Any]) -> IntegerLayer:
    """Return a layer with room for the numbers that are to be loaded.

    Raises:
        FileFormatError: The entry is none of :meth:`IntegerLayer.description`.
    """
    try:
        integers = torch.zeros(entry["shape"], dtype=torch.int8)
        bias = torch.zeros(len(integers)) if entry["bias"] else None
        one, zero = torch.ones(()), torch.zeros((), dtype=torch.int32)
        numbers = (integers, torch.ones(len(integers)), bias, one, zero, NumberFormat(**entry["form"]))
        if entry["layer"] == "IntegerLinear":
            return IntegerLinear(*numbers)
        names = ("stride", "padding", "dilation")
        return IntegerConvolution(
            *numbers,
            **{name: [int(size) for size in entry[name]] for name in names},
            groups=int(entry["groups"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"this is no description of an integer layer: {error}") from error
