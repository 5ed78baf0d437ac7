"""Blocks: which entries of a tensor stay or go, or share a scale, as a whole.

==================  ====================================================================================
value               block
==================  ====================================================================================
``None``            each element (also ``"element"``)
``"per_tensor"``    the whole tensor
``"out_channel"``   everything that makes one output channel, whatever dimension holds it for this module
``"in_channel"``    everything that reads one input channel
``"per_channel"``   of a parameter: ``out_channel``; of an input or output: its channel dimension
``[4, 4]``          blocks of that shape over the last dimensions; -1 is a whole dimension
``([1], "back")``   the same, with where the list is filled up (``front``/``back``) and with what (1 or -1)
``"2:4"``           of every 4 neighbours along the input channels, 2 stay
==================  ====================================================================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.config.targets import Target, tensor_of

GranularityValue = str | tuple[Any, ...] | list[Any] | None

NAMES = ("default", "element", "per_tensor", "out_channel", "in_channel", "per_channel")

Operation = Literal["sum", "mean", "max", "min", "norm"]

_PATTERN = re.compile(r"([0-9]+):([0-9]+)")


def check_value(value: GranularityValue) -> GranularityValue:
    """Return a granularity as it is kept in a setting (lists become tuples).

    Raises:
        ValueError: It is not a granularity.
    """
    if value is None:
        return None
    if isinstance(value, str):
        match = _PATTERN.fullmatch(value)
        if match and 0 < int(match[1]) < int(match[2]):
            return value
        if value not in NAMES:
            raise ValueError(
                f"{value!r} is not a granularity ({', '.join(NAMES)}, a list of block sizes, or N:M)"
                f"{did_you_mean(value, NAMES)}"
            )
        return value
    _kernel(value)
    return tuple(tuple(part) if isinstance(part, list) else part for part in value)


def implied_ratio(value: GranularityValue) -> float | None:
    """Return the share of entries that an N:M pattern removes; None for any other granularity."""
    match = _PATTERN.fullmatch(value) if isinstance(value, str) else None
    return 1 - int(match[1]) / int(match[2]) if match else None


def _kernel(value: Sequence[Any]) -> tuple[tuple[int, ...], str, int]:
    """Return block sizes, the side where they are filled up, and with what."""
    sizes, side, filler = value, "front", 1
    if value and isinstance(value[0], list | tuple):
        if len(value) > 3:
            raise ValueError(f"{value!r} is not (sizes, 'front' or 'back', 1 or -1)")
        sizes = value[0]
        side = value[1] if len(value) > 1 else side
        filler = value[2] if len(value) > 2 else filler
    if side not in ("front", "back") or filler not in (1, -1):
        raise ValueError(f"{value!r} is not (sizes, 'front' or 'back', 1 or -1)")
    if not sizes or any(
        isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1) for size in sizes
    ):
        raise ValueError(f"block sizes {sizes!r} are not whole numbers above 0 (or -1 for a whole dimension)")
    return tuple(sizes), side, filler


def _names(module_type: type | nn.Module | None) -> set[str]:
    if module_type is None:
        return set()
    cls = module_type if isinstance(module_type, type) else type(module_type)
    return {base.__name__ for base in cls.__mro__}


def weight_axes(module_type: type | None, dimensions: int) -> tuple[int, int]:
    """Return which dimensions of a parameter hold the output and the input channels.

    Args:
        module_type: The module's class; None is taken as a layer with ``[out, in, ...]``.
        dimensions: Number of dimensions of the parameter.
    """
    if dimensions < 2:
        return 0, 0
    names = _names(module_type)
    if names & {"_ConvTransposeNd", "Embedding", "EmbeddingBag", "Conv1D"}:  # [in, out, ...] in memory
        return 1, 0
    return 0, 1


def activation_axis(module_type: type | None) -> int:
    """Return the channel dimension of a module's inputs and outputs: 1 for images, the last for features."""
    features = {
        "Linear",
        "LayerNorm",
        "RMSNorm",
        "Embedding",
        "EmbeddingBag",
        "MultiheadAttention",
        "Conv1D",
        "RNNBase",
    }
    return -1 if _names(module_type) & features else 1


@dataclass(frozen=True)
class Granularity:
    """A parsed granularity; make one with :meth:`parse` or :meth:`of_module`.

    Attributes:
        kind: ``element``, ``per_tensor``, ``channel`` (indices of one dimension), ``blocks`` or
            ``pattern`` (N:M).
        axis: Dimension of the channels; for a pattern, the dimension along which neighbours are counted.
        kernel: Block sizes as given, for ``blocks``.
        side: Where ``kernel`` is filled up: ``front`` or ``back``.
        filler: With what: 1 or -1.
        keep: N of N:M.
        window: M of N:M.
        groups: Groups of a convolution whose channels are spread over ``groups`` and ``axis`` together.
    """

    kind: Literal["element", "per_tensor", "channel", "blocks", "pattern"]
    axis: int = 0
    kernel: tuple[int, ...] = ()
    side: str = "front"
    filler: int = 1
    keep: int = 0
    window: int = 0
    groups: int = 1

    @classmethod
    def parse(
        cls,
        value: GranularityValue,
        *,
        module_type: type | None = None,
        target: Target | None = None,
        groups: int = 1,
        dimensions: int = 2,
        default: GranularityValue = "out_channel",
    ) -> Granularity:
        """Read a granularity as a config_list gives it.

        Args:
            value: The value, see the table of this module.
            module_type: The module's class: it says which dimension holds which channels.
            target: What it is for; None is a parameter.
            groups: Groups of the convolution.
            dimensions: Number of dimensions of the parameter.
            default: What ``"default"`` means.

        Raises:
            ConfigError: It is not a granularity.
        """
        try:
            value = check_value(default if value == "default" else value)
        except ValueError as error:
            raise ConfigError(f"granularity{f' of {target}' if target else ''}: {error}") from error
        if value is None or value == "element":
            return cls("element")
        if value == "per_tensor":
            return cls("per_tensor")
        out_axis, in_axis = weight_axes(module_type, dimensions)
        if isinstance(value, str) and value in NAMES:
            if target is not None and not target.is_parameter:
                return cls("channel", axis=activation_axis(module_type))
            wants_input = value == "in_channel"
            axis = in_axis if wants_input else out_axis
            # A grouped convolution holds [out, in / groups], a grouped transposed one [in, out / groups]: the
            # channels of the divided side are numbered by group first.
            return cls("channel", axis=axis, groups=groups if axis == 1 else 1)
        if isinstance(value, str):
            keep, window = map(int, value.split(":"))
            return cls("pattern", axis=in_axis, keep=keep, window=window)
        kernel, side, filler = _kernel(value)
        return cls("blocks", kernel=kernel, side=side, filler=filler)

    @classmethod
    def of_module(
        cls,
        value: GranularityValue,
        module: nn.Module,
        target: Target,
        *,
        default: GranularityValue = "out_channel",
    ) -> Granularity:
        """Read a granularity for a target of a real module, which also tells groups and dimensions."""
        parameter = tensor_of(module, target.name) if target.is_parameter else None
        dimensions = 2 if parameter is None else parameter.dim()
        groups = getattr(module, "groups", 1) if "_ConvNd" in _names(type(module)) else 1
        return cls.parse(
            value,
            module_type=type(module),
            target=target,
            groups=groups,
            dimensions=dimensions,
            default=default,
        )

    @property
    def whole_channels(self) -> bool:
        """Whether a block is everything that makes, or reads, one channel."""
        return self.kind == "channel"

    def _layout(self, shape: Sequence[int]) -> tuple[list[int], list[int], tuple[int, ...]]:
        """Return the shape to divide, the sizes of a block, and the shape of the block tensor."""
        split, kernel = list(shape), [1] * len(shape)
        if self.kind == "per_tensor":
            kernel = list(shape)
            grid: tuple[int, ...] = ()
        elif self.kind == "channel":
            if not shape:
                return [], [], ()
            axis = self.axis % len(shape)
            if self.groups > 1:
                other = 1 - axis
                split = [self.groups, shape[other] // self.groups, shape[axis], *shape[2:]]
                kernel = [1, split[1], 1, *shape[2:]]
                grid = (self.groups * shape[axis],)
            else:
                kernel = [1 if dim == axis else size for dim, size in enumerate(shape)]
                grid = (shape[axis],)
        elif self.kind == "blocks":
            kernel = self._padded(shape)
            grid = tuple(size // block for size, block in zip(shape, kernel, strict=True))
        else:
            grid = tuple(shape)
        return split, kernel, grid

    def _padded(self, shape: Sequence[int]) -> list[int]:
        missing = len(shape) - len(self.kernel)
        if missing < 0:
            raise ConfigError(
                f"granularity {list(self.kernel)} has more dimensions than the tensor {list(shape)}"
            )
        filling = [self.filler] * missing
        kernel = [*filling, *self.kernel] if self.side == "front" else [*self.kernel, *filling]
        kernel = [size if block == -1 else block for size, block in zip(shape, kernel, strict=True)]
        for size, block in zip(shape, kernel, strict=True):
            if size % block:
                raise ConfigError(
                    f"granularity: blocks of {kernel} do not divide a tensor of shape {list(shape)}"
                )
        return kernel

    def check(self, shape: Sequence[int], where: str) -> None:
        """Raise when a tensor of this shape cannot be divided so.

        Raises:
            ConfigError: Naming the target.
        """
        try:
            self._layout(shape)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        if self.kind == "pattern":
            size = shape[self.axis % len(shape)] if len(shape) else 1
            if size % self.window:
                raise ConfigError(
                    f"{where}: granularity {self.keep}:{self.window} needs a multiple of {self.window} input "
                    f"channels, this has {size}; exclude it with exclude_op_names"
                )

    def block_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the tensor with one value for each block of a tensor of this shape."""
        return self._layout(shape)[2]

    def block_count(self, shape: Sequence[int]) -> int:
        """Return the number of blocks of a tensor of this shape."""
        return math.prod(self.block_shape(shape))

    def blocks(self, tensor: Tensor) -> Tensor:
        """Return the entries block by block: ``[*block_shape, entries of a block]``."""
        split, kernel, grid = self._layout(tensor.shape)
        pairs = [part for size, block in zip(split, kernel, strict=True) for part in (size // block, block)]
        order = [*range(0, len(pairs), 2), *range(1, len(pairs), 2)]
        inside = math.prod(kernel)
        return tensor.reshape(pairs).permute(order).reshape(*grid, inside)

    def reduce(self, tensor: Tensor, op: Operation = "sum") -> Tensor:
        """Return one value for each block.

        Args:
            tensor: Any shape that the granularity divides.
            op: ``sum``, ``mean``, ``max``, ``min`` or ``norm`` (Euclidean).

        Returns:
            A tensor of :meth:`block_shape`.
        """
        entries = self.blocks(tensor)
        if op == "sum":
            return entries.sum(-1)
        if op == "mean":
            return entries.mean(-1)
        if op == "max":
            return entries.amax(-1)
        if op == "min":
            return entries.amin(-1)
        if op == "norm":
            return torch.linalg.vector_norm(entries, dim=-1)
        choices = ["sum", "mean", "max", "min", "norm"]
        raise ConfigError(f"op: {op!r} is not one of {', '.join(choices)}{did_you_mean(str(op), choices)}")

    def expand(self, block_tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """Return a tensor of ``shape`` in which every entry has its block's value (undoes :meth:`reduce`).

        Args:
            block_tensor: A tensor of :meth:`block_shape`.
            shape: The full shape.
        """
        split, kernel, _ = self._layout(shape)
        grid = [size // block for size, block in zip(split, kernel, strict=True)]
        count = len(grid)
        wide = block_tensor.reshape([*grid, *([1] * count)]).expand([*grid, *kernel])
        order = [part for dim in range(count) for part in (dim, dim + count)]
        return wide.permute(order).reshape(tuple(shape))

    def compact(self, block_tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the block values in the smallest shape that broadcasts to ``shape``: ``[out, 1, 1, 1]``."""
        if self.kind == "channel" and self.groups == 1 and len(shape):
            size = [1] * len(shape)
            size[self.axis % len(shape)] = -1
            return block_tensor.reshape(size)
        if self.kind == "per_tensor":
            return block_tensor.reshape([1] * len(shape))
        return self.expand(block_tensor, shape)
