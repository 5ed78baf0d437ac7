"""Parameters that ``fully_shard`` (FSDP2) has cut up: each process holds a part, and a forward pass gathers them.

In the forward pass a module has its whole parameters, plain tensors, so simulators act there as ever. Between passes
the module holds ``DTensor`` shards; whoever computes with them takes the :func:`whole` value and writes it back with
:func:`write_whole`. All processes must do so together.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError

__all__ = [
    "has_shards",
    "is_shard",
    "refuse_shards",
    "reshard",
    "sharded_parameter",
    "spread_like",
    "whole",
    "write_whole",
]


def is_shard(tensor: object) -> bool:
    """Whether a tensor is a ``DTensor``, of which this process holds a part."""
    loaded = sys.modules.get("torch.distributed.tensor")  # without it there is none
    kind = getattr(loaded, "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def has_shards(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to a model or a part of it, whatever state its parameters are in."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    loaded = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(loaded, "FSDPModule", None)
    if kind is not None and any(isinstance(module, kind) for module in model.modules()):
        return True
    return any(is_shard(parameter) for parameter in model.parameters())


def reshard(model: nn.Module, *, after_error: bool = False) -> None:
    """Let all modules hold their shards again; an evaluation leaves some of them with whole parameters.

    Args:
        model: The model.
        after_error: A pass may have ended in the middle: give it up, with the gradients that were on their way.
    """
    loaded = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(loaded, "FSDPModule", None)
    if kind is None:
        return
    for module in model.modules():
        if isinstance(module, kind):
            if after_error and hasattr(module, "reset_iter_state"):
                with contextlib.suppress(RuntimeError):  # it is no root, or another process is gone
                    module.reset_iter_state()
            module.reshard()


def sharded_parameter(module: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """Return a parameter that is a ``DTensor``, if simulators can work with the way in which it is cut up.

    Raises:
        ConfigError: ``fully_shard`` does not manage it, or tensor parallelism cuts it up too: then the forward pass
            computes with parts, and a simulator sees no whole parameter.
    """
    from torch.distributed.tensor import Replicate, Shard

    placements: tuple[Any, ...] = getattr(parameter, "placements", ())
    replicated = len(placements) == 2 and isinstance(placements[0], Replicate)
    ours = isinstance(placements[-1], Shard) and (len(placements) == 1 or replicated)
    if not ours or not module.__dict__.get("_is_fsdp_managed_module", False):
        raise ConfigError(
            f"the parameter {name!r} of a {type(module).__name__} is a DTensor on {placements}, which is not what "
            "fully_shard makes; compression works with fully_shard, not with tensor parallelism"
        )
    return parameter


def refuse_shards(model: nn.Module, verb: str) -> None:
    """Refuse a model that ``fully_shard`` has cut up, where its weights are looked at or changed.

    Args:
        model: The model.
        verb: What was asked for, for the message.

    Raises:
        ConfigError: It is cut up.
    """
    if has_shards(model):
        raise ConfigError(
            f"{verb} needs whole weights, but fully_shard has cut this model up; give it "
            "dwindle.simulate.gathered(model), a plain copy (all processes call that together)"
        )


def whole(tensor: Tensor) -> Tensor:
    """Return the whole value of a tensor without its graph: gathered from all processes where it is cut up.

    Args:
        tensor: Any tensor; one that is not cut up is given back detached, sharing its memory.
    """
    value = tensor.detach()
    return value.full_tensor() if is_shard(value) else value  # type: ignore[attr-defined, no-any-return]


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """Return a whole value cut up as another tensor is; each process keeps its part of it, nothing is sent.

    Args:
        value: The same in all processes.
        like: A tensor of the same shape that ``fully_shard`` has cut up.
    """
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value.detach().to(like.device),
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        src_data_rank=None,
    )


@torch.no_grad()
def write_whole(tensor: Tensor, value: Tensor) -> None:
    """Put a whole value into a tensor in place; where it is cut up, each process keeps its part of it.

    Args:
        tensor: Any tensor.
        value: Of the whole tensor's shape, the same in all processes.
    """
    tensor.copy_(spread_like(value.to(tensor.dtype), tensor) if is_shard(tensor) else value)
