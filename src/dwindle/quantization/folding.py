"""Folding of batch normalization into the convolution or linear layer before it.

In evaluation mode ``y = (conv(x) - mean) * gamma / sqrt(var + eps) + beta`` is itself a convolution with the
weight ``w * s`` and the bias ``(b - mean) * s + beta``, where ``s = gamma / sqrt(var + eps)`` per channel
(Jacob et al. 2018, arXiv 1712.05877, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from dwindle.quantization.calls import CallKey
from dwindle.quantization.recording import Operation, Recording
from dwindle.simulate import is_shard, whole

_FOLDABLE = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Fold:
    """One folded pair: the layer, the normalization, and the call that is passed over from now on."""

    layer: str
    normalization: str
    call: CallKey


def folded_parameters(layer: nn.Module, normalization: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of the one layer that does both, computed in float64.

    Args:
        layer: A convolution, transposed convolution or linear layer.
        normalization: The batch normalization behind it, with running statistics.

    Returns:
        Weight and bias in the dtype of the layer's weight.
    """
    mean = normalization.running_mean
    assert mean is not None
    assert isinstance(layer, _FOLDABLE)
    factor = channel_factor(normalization)
    shift = (
        normalization.bias.detach().double() if normalization.bias is not None else torch.zeros_like(factor)
    )
    before = layer.bias.detach().double() if layer.bias is not None else torch.zeros_like(factor)
    folded = times_channels(layer.weight.detach().double(), layer, factor.detach())
    bias = (before - mean.double()) * factor.detach() + shift
    return folded.to(layer.weight.dtype), bias.to(layer.weight.dtype)


def channel_factor(normalization: nn.Module) -> Tensor:
    """Return what a batch normalization multiplies each channel by in evaluation: float64, ``(channels,)``."""
    assert isinstance(normalization, _BatchNorm)
    variance = normalization.running_var
    assert variance is not None
    factor = torch.rsqrt(variance.double() + normalization.eps)
    return factor if normalization.weight is None else factor * _factor_of(normalization.weight).double()


def _factor_of(weight: Tensor) -> Tensor:
    return whole(weight) if is_shard(weight) else weight  # its own module may hold only a part of it by now


def is_transposed(layer: nn.Module) -> bool:
    """Say whether a layer is a transposed convolution, whose weight has the output channel second."""
    return isinstance(layer, _TRANSPOSED)


def times_channels(weight: Tensor, layer: nn.Module, factor: Tensor) -> Tensor:
    """Return a layer's weight with each output channel multiplied by its factor.

    Args:
        weight: Of the shape of ``layer.weight``.
        layer: A convolution, transposed convolution or linear layer.
        factor: Shape ``(output channels,)``.
    """
    if isinstance(layer, _TRANSPOSED):
        grouped = weight.reshape(layer.groups, weight.shape[0] // layer.groups, *weight.shape[1:])
        scales = factor.reshape(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
        return (grouped * scales).reshape(weight.shape)
    return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))


def find_folds(model: nn.Module, recording: Recording) -> list[Fold]:
    """Return the batch normalizations that can be folded: alone behind a layer that is used once."""
    producers, consumers = recording.producers(), recording.consumers()
    calls: dict[str, int] = {}
    for operation in recording.operations:
        calls[operation.key.module] = calls.get(operation.key.module, 0) + (
            operation.key.operation == "batch_norm" or operation.key.operation.startswith(("conv", "linear"))
        )
    folds = []
    for operation in recording.operations:
        if operation.key.operation != "batch_norm" or not operation.inputs:
            continue
        source = producers.get(operation.inputs[0][1].index)
        if source is None or len(consumers[operation.inputs[0][1].index]) != 1:
            continue
        layer, normalization = _modules(model, source, operation)
        if layer is None or normalization is None:
            continue
        if calls[source.key.module] == 1 and calls[operation.key.module] == 1:
            folds.append(Fold(source.key.module, operation.key.module, operation.key))
    return folds


def _modules(
    model: nn.Module, source: Operation, operation: Operation
) -> tuple[nn.Module | None, _BatchNorm | None]:
    layer, normalization = model.get_submodule(source.key.module), model.get_submodule(operation.key.module)
    if not isinstance(layer, _FOLDABLE) or not isinstance(normalization, _BatchNorm):
        return None, None
    if normalization.running_mean is None or normalization.running_var is None:
        return None, None
    if not any(value.name == f"{source.key.module}.weight" for _, value in source.inputs):
        return None, None  # parametrized or borrowed weights are not ours to change
    if parametrize.is_parametrized(layer) or (isinstance(layer, nn.Linear) and source.outputs[0].rank != 2):
        return None, None  # behind a three-dimensional linear layer the normalized axis is another one
    return layer, normalization


def apply_folds(model: nn.Module, folds: list[Fold]) -> None:
    """Fold in place.

    A plain ``BatchNorm`` becomes an ``Identity``; of subclasses only the call is passed
    over: they keep their other duties (normalization and activation in one module).
    """
    for fold in folds:
        layer, normalization = model.get_submodule(fold.layer), model.get_submodule(fold.normalization)
        assert isinstance(layer, _FOLDABLE)
        assert isinstance(normalization, _BatchNorm)
        weight, bias = folded_parameters(layer, normalization)
        with torch.no_grad():
            layer.weight.copy_(weight)
            if layer.bias is None:
                layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
            else:
                layer.bias.copy_(bias)
        remove_normalization(model, fold.normalization)


def prepare_structure(model: nn.Module, folds: list[Fold]) -> None:
    """Give a freshly constructed model the shape that folding leaves, without computing anything.

    Used before a saved state is loaded into it.
    """
    for fold in folds:
        layer = model.get_submodule(fold.layer)
        assert isinstance(layer, _FOLDABLE)
        if layer.bias is None:
            channels = model.get_submodule(fold.normalization).num_features
            layer.bias = nn.Parameter(layer.weight.new_zeros(int(channels)))  # type: ignore[arg-type]
        remove_normalization(model, fold.normalization)


def remove_normalization(model: nn.Module, name: str) -> None:
    """Replace a plain batch normalization by an identity; strip a subclass of its affine parameters."""
    normalization = model.get_submodule(name)
    if type(normalization) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
    else:
        normalization.register_parameter("weight", None)
        normalization.register_parameter("bias", None)
