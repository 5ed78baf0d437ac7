"""Integers of torch's own modules that describe the shape of their weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize


def standard_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that ``module`` should have for the weights that it has.

    Only attributes that exist are returned. Those that merely describe (``out_features``) matter to users and
    to printing; those that are used in a forward were also observed there and must agree.
    """
    with _still(module):
        wanted = _wanted(module)
    return {key: number for key, number in wanted.items() if key in vars(module)}


@contextmanager
def _still(module: nn.Module) -> Iterator[None]:
    """Let parametrized weights be read without a trace: in training mode some take a step each time (spectral norm)."""
    held: Any = module
    parts: list[nn.Module] = []
    if parametrize.is_parametrized(module):
        parts = list(held.parametrizations.modules())
    modes = [part.training for part in parts]
    for part in parts:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode


def _wanted(module: nn.Module) -> dict[str, Any]:
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) and weight is not None:
        return {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    if isinstance(module, _ConvTransposeNd) and weight is not None:
        return {"in_channels": weight.shape[0], "out_channels": weight.shape[1] * module.groups}
    if isinstance(module, _ConvNd) and weight is not None:
        return {"out_channels": weight.shape[0], "in_channels": weight.shape[1] * module.groups}
    if isinstance(module, _NormBase):
        sample = weight if weight is not None else module.running_mean
        return {} if sample is None else {"num_features": sample.shape[0]}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and weight is not None:
        return {"normalized_shape": tuple(weight.shape)}
    if isinstance(module, nn.GroupNorm) and weight is not None:
        return {"num_channels": weight.shape[0]}
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and weight is not None:
        return {"embedding_dim": weight.shape[1]}
    if isinstance(module, nn.PReLU) and weight is not None:
        return {"num_parameters": weight.shape[0]}
    if isinstance(module, nn.Bilinear) and weight is not None:
        return {
            "out_features": weight.shape[0],
            "in1_features": weight.shape[1],
            "in2_features": weight.shape[2],
        }
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module)
    if isinstance(module, nn.RNNBase):
        first: Any = module.weight_ih_l0
        gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
        sizes = {"input_size": first.shape[1], "hidden_size": first.shape[0] // gates}
        projection: Any = getattr(module, "weight_hr_l0", None)
        return sizes if projection is None else {**sizes, "proj_size": projection.shape[0]}
    if isinstance(module, nn.RNNCellBase):
        return {"input_size": module.weight_ih.shape[1], "hidden_size": module.weight_hh.shape[1]}
    if type(module).__name__ == "Conv1D" and weight is not None and weight.dim() == 2:
        return {"nf": weight.shape[1], "nx": weight.shape[0]}
    return {}


def _attention(module: nn.MultiheadAttention) -> dict[str, Any]:
    if module.in_proj_weight is not None:
        kdim = vdim = embed = module.in_proj_weight.shape[1]
        inner = module.in_proj_weight.shape[0] // 3
    else:
        inner, embed = module.q_proj_weight.shape
        kdim, vdim = module.k_proj_weight.shape[1], module.v_proj_weight.shape[1]
    return {"embed_dim": embed, "kdim": kdim, "vdim": vdim, "head_dim": inner // module.num_heads}
