"""Calls of functions whose result is affine in one parameter, as least-squares problems.

A call is recognised by the function that runs, not by the module around it: ``linear`` of a Linear, of an attention's
projection or of plain code are the same; so are a norm's scale and shift. Each has *features* (what the weight is
multiplied with) and outputs: of a convolution the patches, of a norm the normalized values, each channel a problem of
its own with one feature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

#: Names of the arguments, in order, by the name of the function.
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "linear": ("value", "weight", "bias"),
    "addmm": ("bias", "value", "weight", "beta", "alpha"),
    "matmul": ("value", "weight"),
    "mul": ("value", "weight"),
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d"),
        ("value", "weight", "bias", "stride", "padding", "dilation", "groups"),
    ),
    "batch_norm": ("value", "mean", "variance", "weight", "bias", "training", "momentum", "eps"),
    "layer_norm": ("value", "shape", "weight", "bias", "eps", "cudnn"),
    "rms_norm": ("value", "shape", "weight", "eps"),
    "group_norm": ("value", "count", "weight", "bias", "eps", "cudnn"),
}
#: ``torch.batch_norm`` takes the same arguments in another order than ``torch.nn.functional.batch_norm``.
_BATCH_NORM = ("value", "weight", "bias", "mean", "variance", "training", "momentum", "eps", "cudnn")
#: The names that callers may give by keyword.
_KEYWORDS = {
    "input": "value", "mat1": "value", "mat2": "weight", "running_mean": "mean", "running_var": "variance",
    "normalized_shape": "shape", "num_groups": "count",
}  # fmt: skip
_NORMS = ("batch_norm", "layer_norm", "rms_norm", "group_norm", "mul")

#: At most so many places (pixels, tokens) of each sample are used; more add time, hardly knowledge.
PLACES = 256


@dataclass(slots=True)
class AffineCall:
    """One call.

    Attributes:
        operation: Name of the function.
        value: What the weight is applied to.
        weight: The parameter.
        bias: The bias, or None.
        options: The other arguments, by name.
    """

    operation: str
    value: Tensor
    weight: Tensor
    bias: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_norm(self) -> bool:
        """Whether the weight scales channels one by one."""
        return self.operation in _NORMS

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution."""
        return self.operation.startswith("conv")

    @property
    def is_transposed(self) -> bool:
        """Whether the weight stands as ``[in, out]``."""
        return self.operation in ("addmm", "matmul")

    @property
    def groups(self) -> int:
        """Problems side by side."""
        if self.is_norm:
            return self.weight.numel()
        return int(self.options.get("groups", 1)) if self.is_convolution else 1

    @property
    def channels_second(self) -> bool:
        """Whether the outputs stand behind the batch, not last."""
        return self.is_convolution or self.operation in ("batch_norm", "group_norm")

    @property
    def output_dim(self) -> int:
        """The dimension of the result (from the front) that holds the outputs."""
        return 1 if self.channels_second else self.value.dim() - 1

    @property
    def weight_output_dim(self) -> int:
        """The dimension of the weight that holds the outputs."""
        return 1 if self.is_transposed else 0

    @property
    def feature_count(self) -> int:
        """Features of one problem, without the one that is always one."""
        if self.is_norm:
            return 1
        return self.weight.shape[0] if self.is_transposed else math.prod(self.weight.shape[1:])

    @property
    def output_count(self) -> int:
        """Outputs of one problem."""
        return 1 if self.is_norm else self.weight.shape[self.weight_output_dim] // self.groups


def read_call(
    operation: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], known: Mapping[int, str]
) -> AffineCall | None:
    """Return what a call of a function means, or None when it is not affine in a parameter of the model.

    Args:
        operation: Name of the function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        known: Names of the model's parameters, by identity.
    """
    names = _ARGUMENTS.get(operation)
    if operation == "batch_norm" and len(args) > 1 and (args[1] is None or id(args[1]) in known):
        names = _BATCH_NORM
    if names is None or len(args) > len(names):
        return None
    given = {**dict(zip(names, args, strict=False)), **{_KEYWORDS.get(k, k): v for k, v in kwargs.items()}}
    value, weight, bias = given.pop("value", None), given.pop("weight", None), given.pop("bias", None)
    if operation == "mul" and id(value) in known:
        value, weight = weight, value
    if not isinstance(value, Tensor) or not isinstance(weight, Tensor) or id(weight) not in known:
        return None
    if not value.is_floating_point() or not value.numel() or id(value) in known:
        return None
    call = AffineCall(operation, value, weight, bias, given)
    return call if _is_understood(call) else None


def _is_understood(call: AffineCall) -> bool:
    weight, value, options = call.weight, call.value, call.options
    if call.operation == "addmm" and (options.get("beta", 1) != 1 or options.get("alpha", 1) != 1):
        return False
    if call.is_convolution:
        return value.dim() == weight.dim()  # with a batch
    if call.is_norm:
        if call.operation == "batch_norm" and (options.get("training") or options.get("mean") is None):
            return False
        if weight.dim() != 1 or value.dim() < 2:
            return False
        return value.shape[call.output_dim] == weight.numel()
    return weight.dim() == 2 and value.shape[-1] == call.feature_count


def features_of(call: AffineCall, rows: Tensor | None = None) -> Tensor:
    """Return what the weight of a call is multiplied with, at some of the places.

    Args:
        call: The call.
        rows: For values whose last dimension is the features: which rows count (tokens that are no padding).

    Returns:
        ``[groups, samples, features]`` in float32 at least.
    """
    value = _wide(call.value.detach())
    if call.is_convolution:
        return _patches(call, value)
    if call.is_norm:
        return _by_output(call, _wide(_normalized(call, call.value.detach())), rows).flatten(0, 1)[..., None]
    return _tokens(value, rows)[None]


def outputs_of(call: AffineCall, output: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return the results of a call at the places of :func:`features_of`.

    Args:
        call: The call.
        output: Its result, or what it should have been.
        rows: As for the features.

    Returns:
        ``[groups, samples, outputs]``.
    """
    own = _by_output(call, _wide(output.detach()), rows)
    return own.flatten(0, 1)[..., None] if call.is_norm else own.transpose(1, 2)


def to_weight(correction: Tensor, shape: torch.Size, transposed: bool) -> Tensor:
    """Return a correction ``[groups, features, outputs]`` in the shape of the weight.

    Args:
        correction: Without the feature that is always one.
        shape: The weight's shape.
        transposed: Whether the weight stands as ``[in, out]``.
    """
    return correction[0] if transposed else correction.transpose(1, 2).reshape(shape)


def shaped(groups: int, transposed: bool, weight: Tensor) -> Tensor:
    """Return a weight as ``[groups, features, outputs]``: undoes :func:`to_weight`.

    Args:
        groups: Problems side by side.
        transposed: Whether the weight stands as ``[in, out]``.
        weight: The weight.
    """
    if transposed:
        return weight[None]
    return weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype.itemsize >= 4 else value.float()


def _tokens(value: Tensor, rows: Tensor | None) -> Tensor:
    """Return rows of a value whose last dimension is the features: those that count, at most so many a sample."""
    flat = value.reshape(-1, value.shape[-1])
    if rows is not None and rows.numel() == len(flat):
        flat = flat[rows.flatten()]
    step = max(1, math.ceil(len(flat) / (PLACES * max(len(value), 1)))) if value.dim() > 2 else 1
    return flat[::step]


def _by_output(call: AffineCall, output: Tensor, rows: Tensor | None) -> Tensor:
    """Return ``[groups, outputs, samples]``."""
    if call.channels_second:
        output = _subgrid(output)
        flat = output.transpose(0, 1).flatten(1)
    else:
        flat = _tokens(output, rows).t()
    return flat.reshape(call.groups, -1, flat.shape[-1])


def _first(size: int, step: int) -> int:
    """Return where a regular part of ``size`` places begins, so that it lies in the middle."""
    return (size - 1) % step // 2


def _step(sizes: tuple[int, ...]) -> int:
    return max(1, math.floor((math.prod(sizes) / PLACES) ** (1 / len(sizes)))) if sizes else 1


def _subgrid(output: Tensor) -> Tensor:
    """Return a regular part of the places of ``[batch, channels, *places]``."""
    sizes = tuple(output.shape[2:])
    step = _step(sizes)
    if step == 1:
        return output
    middle = [slice(_first(size, step), None, step) for size in sizes]
    return output[(slice(None), slice(None), *middle)]


def _tuple(value: Any, count: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * count
    entries = tuple(int(item) for item in value)
    return entries * count if len(entries) == 1 else entries


def _patches(call: AffineCall, value: Tensor) -> Tensor:
    """Return the patches that a convolution multiplies, at the places of :func:`_subgrid`."""
    kernel = tuple(call.weight.shape[2:])
    count = len(kernel)
    stride = _tuple(call.options.get("stride", 1), count)
    dilation = _tuple(call.options.get("dilation", 1), count)
    padding = call.options.get("padding", 0)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if padding == "same":
        sides = [side for total in reversed(reach) for side in (total // 2, total - total // 2)]
    else:
        amounts = (0,) * count if padding == "valid" else _tuple(padding, count)
        sides = [side for amount in reversed(amounts) for side in (amount, amount)]
    if any(sides):
        value = functional.pad(value, sides)
    sizes = tuple(
        (value.shape[dim + 2] - reach[dim] - 1) // stride[dim] + 1 for dim in range(count)
    )  # places of the output
    step = _step(sizes)
    for dim in range(count):  # views only: places where the dimension was, its patches behind all others
        begin = _first(sizes[dim], step) * stride[dim]
        value = value.narrow(dim + 2, begin, value.shape[dim + 2] - begin)
        value = value.unfold(dim + 2, reach[dim] + 1, stride[dim] * step)[..., :: dilation[dim]]
    grouped = value.unflatten(1, (call.groups, -1))
    places, offsets = range(3, 3 + count), range(3 + count, 3 + 2 * count)
    return grouped.permute(1, 0, *places, 2, *offsets).reshape(call.groups, -1, call.feature_count)


def _normalized(call: AffineCall, value: Tensor) -> Tensor:
    """Return what the scale of a norm is multiplied with."""
    options = call.options
    if call.operation == "mul":
        return value
    if call.operation == "batch_norm":
        return functional.batch_norm(
            value, options["mean"], options["variance"], eps=options.get("eps", 1e-5)
        )
    if call.operation == "group_norm":
        return functional.group_norm(value, options["count"], eps=options.get("eps", 1e-5))
    if call.operation == "rms_norm":
        return functional.rms_norm(value, options["shape"], eps=options.get("eps"))
    return functional.layer_norm(value, options["shape"], eps=options.get("eps", 1e-5))
