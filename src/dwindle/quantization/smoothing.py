"""SmoothQuant: outliers of activations move into the weights that read them.

A few channels of a transformer's activations are a hundred times larger than the rest, and one scale for the tensor
leaves the rest no levels. Channel j is divided by ``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` and the weights
that read it are multiplied by it (Xiao et al. 2023, arXiv 2211.10438, equation 4). Wherever a channel's scale is
free (:mod:`dwindle.quantization.free_scales`: behind norms with weights, on the value path of attention, in gated
products, behind ReLU) the division is folded into what makes the channel: nothing is computed at run time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.quantization.calls import CallKey, CallMode, ModulePath, run_with
from dwindle.quantization.equalization import LARGEST_FACTOR, channel_ranges
from dwindle.quantization.free_scales import FreeScales
from dwindle.training.inputs import Inputs

_WEIGHT_AT = {"addmm": (2, "mat2", 1, "mat1")}


def smoothing_factors(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Return by what to divide channels of activations, and multiply the weights that read them.

    Args:
        activations: float64, largest magnitude of each channel in the calibration data.
        weights: float64, largest magnitude of the weights that read each channel.
        alpha: How much of the difficulty moves into the weights, from 0 (none) to 1 (all).

    Returns:
        ``activations^alpha / weights^(1 - alpha)``; 1 where either is zero.
    """
    usable = (activations > 0) & (weights > 0)
    first, second = torch.where(usable, activations, 1.0), torch.where(usable, weights, 1.0)
    return torch.where(usable, first**alpha / second ** (1 - alpha), 1.0)


class ChannelMaxima(CallMode):
    """Keeps the largest magnitude of every input channel of the layers that read free units.

    Args:
        model: The model.
        scales: Its free scales.
    """

    def __init__(self, model: nn.Module, scales: FreeScales) -> None:
        super().__init__(ModulePath())
        self.scales = scales
        self.names = {id(model.get_parameter(name)): name for name in scales.read}
        self.maxima = torch.zeros(scales.count, dtype=torch.float64)

    def on_call(self, key: CallKey, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look at the input of a layer."""
        place, keyword, data, data_keyword = _WEIGHT_AT.get(key.operation, (1, "weight", 0, "input"))
        weight = args[place] if len(args) > place else kwargs.get(keyword)
        name = self.names.get(id(weight))
        if name is not None and isinstance(weight, Tensor):
            value = args[data] if len(args) > data else kwargs[data_keyword]
            self._add(name, value, key.operation, weight)
        return func(*args, **kwargs)

    def _add(self, name: str, value: Tensor, operation: str, weight: Tensor) -> None:
        units = self.scales.channels.get(name)
        if units is None or not value.numel():
            return
        dim = value.dim() - weight.dim() + 1 if operation.startswith("conv") else value.dim() - 1
        if value.shape[dim] != len(units):
            return  # an embedding or another use of the same parameter
        rows = value.detach().movedim(dim, 0).reshape(len(units), -1).abs().amax(1).double().cpu()
        if not bool(torch.isfinite(rows).all()):
            raise DwindleError(f"the calibration data bring values that are not finite to {name}")
        self.maxima = self.maxima.scatter_reduce(0, units, rows, "amax")


def smooth(
    model: nn.Module, scales: FreeScales, batches: Iterable[Inputs], alpha: float = 0.5
) -> dict[str, Tensor]:
    """Move outliers of activations into weights, in place. The float model stays the same function.

    Args:
        model: The model.
        scales: Its free scales.
        batches: Calibration data.
        alpha: See :func:`smoothing_factors`.

    Returns:
        By name what each changed parameter was multiplied by, broadcastable to it.

    Raises:
        ConfigError: ``alpha`` is not between 0 and 1.
        DwindleError: An activation is not finite.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"smooth {alpha} is not between 0 and 1")
    activations = torch.zeros(scales.count, dtype=torch.float64)
    for args, kwargs in batches:
        mode = ChannelMaxima(model, scales)
        run_with(model, mode, args, kwargs)
        activations = torch.maximum(activations, mode.maxima)
    weights = torch.zeros(scales.count, dtype=torch.float64)
    for name, units in scales.read.items():
        weights = torch.maximum(weights, channel_ranges(model.get_parameter(name), units, scales.count))
    factors = 1 / smoothing_factors(activations, weights, alpha).clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR)
    factors[0] = 1.0
    return scales.apply(model, factors)
