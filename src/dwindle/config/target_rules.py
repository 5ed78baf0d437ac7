"""What targets a module has, which of them an entry means when it names none, and which follow another."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from dwindle.config.errors import ConfigError
from dwindle.config.granularity import Granularity, weight_axes
from dwindle.config.schema import Align
from dwindle.config.targets import (
    INPUT_PREFIX,
    OUTPUT_PREFIX,
    Target,
    buffer_names,
    forward_arguments,
    parameter_names,
    tensor_of,
)

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

__all__ = ["aligned_mask", "default_targets", "follower_of", "has_target", "shape_of"]


def shape_of(module: nn.Module, name: str) -> tuple[int, ...] | None:
    """Return the shape of a module's own parameter or buffer; None when it has no such tensor.

    Raises:
        ConfigError: It is not initialized yet (lazy modules).
    """
    value = tensor_of(module, name)
    if isinstance(value, UninitializedParameter):
        raise ConfigError(f"{type(module).__name__} is not initialized; run one forward pass first")
    return None if value is None else tuple(value.shape)


def has_target(module: nn.Module, name: str) -> bool:
    """Return whether a module has a target of this name (inputs by ``forward``'s arguments)."""
    if name.startswith(OUTPUT_PREFIX):
        return name.removeprefix(OUTPUT_PREFIX).isdigit()
    if not name.startswith(INPUT_PREFIX):
        return shape_of(module, name) is not None
    wanted = name.removeprefix(INPUT_PREFIX)
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    if wanted.isdigit():
        positional = sum(kind in _POSITIONAL for kind in kinds)
        return int(wanted) < positional or inspect.Parameter.VAR_POSITIONAL in kinds
    return wanted in forward_arguments(module) or inspect.Parameter.VAR_KEYWORD in kinds


def known_targets(module: nn.Module) -> list[str]:
    """Return names of targets of a module, for messages."""
    inputs = [f"{INPUT_PREFIX}{name}" for name in ("0", *forward_arguments(module))]
    return [*parameter_names(module), *buffer_names(module), *inputs, "_output_0"]


def default_targets(module: nn.Module, kind: str) -> list[str]:
    """Return the targets of a module that an entry without ``target_names`` means.

    Pruning: all parameters of the module's own, biases only where they can follow their weight.
    Quantization: the weights with input and output; a bias is quantized with the product of their scales by
    every runtime, so it is a target only when it is named. Distillation: the output. Factorization: the weight.
    """
    if kind == "distillation":
        return ["_output_0"]
    parameters = parameter_names(module)
    if kind == "factorization":
        return [name for name in parameters if name == "weight"]
    if kind == "pruning":
        among = set(parameters)
        return [name for name in parameters if "bias" not in name or follower_of(module, name, among)]
    if any(base.__name__ == "NonDynamicallyQuantizableLinear" for base in type(module).__mro__):
        return ["weight"]  # attention reads the weight of this module and never calls it
    weights = [name for name in parameters if "bias" not in name]
    return ["_input_0", *weights, "_output_0"]


def follower_of(module: nn.Module, name: str, among: set[str]) -> Align | None:
    """Return how a bias follows its weight; None for anything else.

    The weight must be ``among`` the targets. The partner of ``bias`` is ``weight``, of ``bias_ih_l0``
    ``weight_ih_l0``, of ``in_proj_bias`` ``in_proj_weight``. A bias of one dimension must have as many
    entries as the weight has output channels; any other one must have the weight's shape.
    """
    partner = name.replace("bias", "weight")
    if partner == name or partner not in among:
        return None
    bias, weight = shape_of(module, name), shape_of(module, partner)
    if bias is None or weight is None or not bias:
        return None
    if bias == weight:
        return Align(target_name=partner, dims=tuple(range(len(weight))))
    out_axis = weight_axes(type(module), len(weight))[0]
    if bias != (weight[out_axis] * _groups_on(module, out_axis),):
        return None
    return Align(target_name=partner, dims=(out_axis,))


def aligned_mask(mask: Tensor, align: Align, module: nn.Module) -> Tensor:
    """Return the mask of a target that follows another one: 1 where anything of the source is kept.

    The output channels of a grouped transposed convolution, whose weight is ``[in, out / groups, ...]``, are
    counted through all groups.

    Args:
        mask: The mask of the source, of the shape of its parameter.
        align: How the follower is aligned.
        module: The module of the source.

    Returns:
        A tensor with the sizes of ``align.dims``, of the dtype of ``mask``.
    """
    kept = mask != 0
    dims = sorted(dim % mask.dim() for dim in align.dims)
    source = Target("", align.target_name)
    if source.is_parameter and dims == [weight_axes(type(module), mask.dim())[0]]:
        channels = Granularity.of_module("out_channel", module, source)
        return channels.reduce(kept.to(torch.float32), "max").to(mask.dtype)
    others = [dim for dim in range(mask.dim()) if dim not in dims]
    return (kept.any(dim=others) if others else kept).to(mask.dtype)


def _groups_on(module: nn.Module, axis: int) -> int:
    """In how many groups the channels of this dimension of a convolution's weight are counted anew."""
    convolution = any(base.__name__ == "_ConvNd" for base in type(module).__mro__)
    return int(getattr(module, "groups", 1)) if convolution and axis == 1 else 1
