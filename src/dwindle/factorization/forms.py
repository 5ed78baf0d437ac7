"""What a layer is as a convolution, and the chains of smaller ones it can become, with what they cost.

A linear layer is a convolution without places. A method says which parts its chain has; ranks say how wide they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, did_you_mean

__all__ = [
    "METHODS",
    "LayerForm",
    "Part",
    "Places",
    "chain_elements",
    "chain_macs",
    "check_method",
    "form_of",
    "full_ranks",
    "kernel_of",
    "method_for",
    "parts_of",
]

METHODS = ("svd", "tucker", "cp", "spatial")


@dataclass(frozen=True)
class LayerForm:
    """A linear layer or a convolution without groups.

    Attributes:
        outputs: Channels it gives.
        inputs: Channels it reads.
        kernel: Sizes of the kernel, none for a linear layer.
        stride: As in torch.
        padding: As in torch; may be ``"same"`` or ``"valid"``.
        dilation: As in torch.
        padding_mode: As in torch.
        transposed: Its weight is ``[in, out]`` (Hugging Face's Conv1D).
    """

    outputs: int
    inputs: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    transposed: bool = False

    @property
    def places(self) -> int:
        """Entries of the kernel for each pair of channels."""
        return math.prod(self.kernel)

    @property
    def elements(self) -> int:
        """Entries of the weight."""
        return self.outputs * self.inputs * self.places


@dataclass(frozen=True)
class Part:
    """One module of a chain.

    Attributes:
        inputs: Channels it reads (a number, or a 0-d tensor where a cost is differentiated).
        outputs: Channels it gives.
        dims: The dimensions of the kernel, with stride, padding and dilation, that it has; in others it is 1.
        depthwise: Each channel by itself.
    """

    inputs: Any
    outputs: Any
    dims: tuple[int, ...] = ()
    depthwise: bool = False

    def elements(self, form: LayerForm) -> Any:
        """Return the number of its weights."""
        each = math.prod(form.kernel[dim] for dim in self.dims)
        return self.outputs * each if self.depthwise else self.outputs * self.inputs * each


@dataclass(frozen=True)
class Places:
    """Where one call of a layer computes.

    Attributes:
        count: Samples (for a linear layer: all rows).
        before: Sizes of the input's places.
        after: Sizes of the output's places.
    """

    count: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


def form_of(module: nn.Module, weight: Tensor) -> LayerForm:
    """Return the form of a Linear, a convolution, or Hugging Face's Conv1D.

    Args:
        module: The layer.
        weight: Its weight.
    """
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return LayerForm(
            outputs=weight.shape[0],
            inputs=weight.shape[1],
            kernel=tuple(weight.shape[2:]),
            stride=tuple(module.stride),
            padding=module.padding if isinstance(module.padding, str) else tuple(module.padding),
            dilation=tuple(module.dilation),
            padding_mode=module.padding_mode,
        )
    if isinstance(module, nn.Linear):
        return LayerForm(weight.shape[0], weight.shape[1])
    return LayerForm(weight.shape[1], weight.shape[0], transposed=True)


def kernel_of(form: LayerForm, weight: Tensor) -> Tensor:
    """Return a weight as ``[out, in, ...]``."""
    return weight.t() if form.transposed else weight


def check_method(method: str) -> str:
    """Return a method's name.

    Raises:
        ConfigError: There is none of this name.
    """
    choices = ("auto", *METHODS)
    if method not in choices:
        raise ConfigError(
            f"method {method!r} is not one of {', '.join(choices)}{did_you_mean(method, choices)}"
        )
    return method


def method_for(form: LayerForm, method: str = "auto") -> str:
    """Return the method for a layer: ``auto`` is SVD for matrices and Tucker-2 for larger kernels.

    Raises:
        ConfigError: The method cannot make this layer smaller.
    """
    if method == "auto":
        return "svd" if form.places == 1 else "tucker"
    if method == "spatial" and (len(form.kernel) != 2 or 1 in form.kernel):
        raise ConfigError("'spatial' takes two-dimensional kernels that are larger than 1 in both dimensions")
    if method in ("tucker", "cp") and form.places == 1:
        raise ConfigError(
            f"{method!r} takes convolutions with kernels larger than 1; this is a matrix, for 'svd'"
        )
    return method


def full_ranks(method: str, form: LayerForm) -> tuple[int, ...]:
    """Return the ranks at which nothing is lost; for CP the channels, where there is no such bound.

    One rank, but for Tucker-2 those of outputs and of inputs.
    """
    if method == "svd":
        return (min(form.outputs, form.inputs * form.places),)
    if method == "spatial":
        return (min(form.outputs * form.kernel[1], form.inputs * form.kernel[0]),)
    if method == "tucker":
        return (
            min(form.outputs, form.inputs * form.places),
            min(form.inputs, form.outputs * form.places),
        )
    return (max(form.outputs, form.inputs),)


def parts_of(method: str, form: LayerForm, ranks: Sequence[Any]) -> list[Part]:
    """Return the chain of a method.

    Args:
        method: One of :data:`METHODS`.
        form: The layer.
        ranks: As :func:`full_ranks` orders them.
    """
    every = tuple(range(len(form.kernel)))
    rank = ranks[0]
    if method == "svd":
        return [Part(form.inputs, rank, every), Part(rank, form.outputs)]
    if method == "spatial":
        return [Part(form.inputs, rank, (0,)), Part(rank, form.outputs, (1,))]
    if method == "tucker":
        out, inner = ranks
        return [Part(form.inputs, inner), Part(inner, out, every), Part(out, form.outputs)]
    middle = [Part(rank, rank, (dim,), depthwise=True) for dim in every]
    return [Part(form.inputs, rank), *middle, Part(rank, form.outputs)]


def chain_elements(parts: Sequence[Part], form: LayerForm) -> Any:
    """Return the number of weights of a chain (without the bias)."""
    return sum(part.elements(form) for part in parts)


def chain_macs(parts: Sequence[Part], form: LayerForm, calls: Sequence[Places]) -> Any:
    """Return the multiply-accumulates of a chain.

    Args:
        parts: The chain.
        form: The layer.
        calls: Its calls.
    """
    total: Any = 0
    for places in calls:
        sizes = list(places.before)
        for part in parts:
            for dim in part.dims:
                sizes[dim] = places.after[dim]
            total = total + part.elements(form) * (places.count * math.prod(sizes))
    return total


def layer_macs(form: LayerForm, calls: Sequence[Places]) -> int:
    """Return the multiply-accumulates of the whole layer."""
    return sum(form.elements * places.count * math.prod(places.after) for places in calls)


def empty_weight(part: Part, form: LayerForm, like: Tensor) -> Tensor:
    """Return room for the weights of a part."""
    shape = [part.outputs, 1 if part.depthwise else part.inputs]
    shape += [size if dim in part.dims else 1 for dim, size in enumerate(form.kernel)]
    return torch.empty(shape, dtype=like.dtype, device=like.device)
