"""Masks on inputs and outputs of linear layers and convolutions, said as masks of their weights.

A channel that is multiplied by zero on its way out of a layer is a row of zeros in the weight and a zero in the bias;
one that is multiplied by zero on its way in is a column of zeros. So activation masks become permanent, and real.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from dwindle import simulate
from dwindle.config import Target
from dwindle.config.errors import RealizeError


def as_parameter_masks(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the activation masks of a model as masks by parameter name.

    Raises:
        RealizeError: A mask does not lie on the channels of a linear layer or convolution, or is not one of 0 and 1
            that is multiplied; it cannot be made permanent.
    """
    masks: dict[str, torch.Tensor] = {}
    for target, mask in simulate.get_masks(model).items():
        if target.is_parameter:
            continue
        module = model.get_submodule(target.module)
        prefix = f"{target.module}." if target.module else ""
        for name, own in _for_module(target, module, mask).items():
            masks[prefix + name] = masks[prefix + name] * own if prefix + name in masks else own
    return masks


def _for_module(target: Target, module: nn.Module, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    if not isinstance(module, nn.Linear | _ConvNd) or getattr(module, "transposed", False):
        raise RealizeError(
            f"{target}: a mask of activations of a {type(module).__name__} cannot be made permanent"
        )
    weight = module.weight
    dim = 0 if target.is_output else 1
    channels = weight.shape[0] if dim == 0 else weight.shape[1] * getattr(module, "groups", 1)
    flat = mask.flatten()
    if (
        flat.numel() != channels
        or mask.numel() != max(mask.shape, default=0)
        or not bool(((flat == 0) | (flat == 1)).all())
    ):
        raise RealizeError(
            f"{target}: only a mask of 0 and 1 along the {channels} channels can be made permanent, "
            f"not one of shape {list(mask.shape)}"
        )
    if dim == 1 and channels != weight.shape[1]:
        raise RealizeError(
            f"{target}: a mask of the inputs of a grouped convolution cannot be made permanent"
        )
    place = [1] * weight.dim()
    place[dim] = -1
    masks = {"weight": flat.view(place).expand(weight.shape)}
    if dim == 0 and module.bias is not None:
        masks["bias"] = flat
    return masks
