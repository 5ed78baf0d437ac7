"""What the processes of a distributed run must agree on: sums of statistics, and values that one of them chose.

Without ``torch.distributed`` (or with one process) every function gives back what it was given.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["average_gradients", "is_distributed", "rank", "share_from_first", "sum_over_processes"]


def is_distributed() -> bool:
    """Whether several processes work together."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def rank() -> int:
    """Return the number of this process; 0 when it is alone."""
    return torch.distributed.get_rank() if is_distributed() else 0


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Add up each tensor over all processes, in place. All processes must give the same shapes in the same order."""
    if is_distributed():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def share_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite each tensor with that of the first process, in place."""
    if is_distributed():
        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give each parameter the mean of its gradients in all processes; where a process has none it counts as zero.

    Gradients that are the same everywhere stay so. All processes must give the same parameters in the same order.
    """
    if not is_distributed():
        return
    count = torch.distributed.get_world_size()
    for parameter in parameters:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.distributed.all_reduce(gradient)
        parameter.grad = gradient.div_(count)
