"""What the processes of a distributed run must agree on: sums of statistics, and values that one of them chose.

Without ``torch.distributed`` (or with one process) every function gives back what it was given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = [
    "alike",
    "is_distributed",
    "join_over_processes",
    "mean_over_processes",
    "rank",
    "share_from_first",
    "sum_over_processes",
    "widest_range",
]

_WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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


def mean_over_processes(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the mean of each tensor over all processes, with one exchange for each device and dtype.

    A tensor that a process does not have counts as zero there; one that none has is None afterwards. All processes
    must call it with as many tensors of the same shapes.

    Args:
        tensors: What this process has.
        like: A tensor with the shape, dtype and device of each.
    """
    if not is_distributed():
        return list(tensors)
    found: list[Tensor | None] = [None] * len(like)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for number, own in enumerate(like):
        groups.setdefault((own.device, own.dtype), []).append(number)
    for (device, dtype), group in groups.items():
        given = [tensors[position] for position in group]
        there = torch.tensor([float(own is not None) for own in given], dtype=dtype, device=device)
        parts = [
            torch.zeros_like(like[at]) if own is None else own for at, own in zip(group, given, strict=True)
        ]
        flat = torch.cat([there, *(part.detach().reshape(-1) for part in parts)])
        torch.distributed.all_reduce(flat)
        seen, *sums = flat.split([len(group), *(like[position].numel() for position in group)])
        for position, total, processes in zip(group, sums, seen.tolist(), strict=True):
            if processes > 0:
                found[position] = (total / torch.distributed.get_world_size()).view(like[position].shape)
    return found


def share_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite each tensor with that of the first process, in place."""
    if is_distributed():
        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0)


def widest_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest minimum and the largest maximum of all processes, in one exchange.

    Args:
        low: This process's minimum, any shape.
        high: Its maximum, the same shape.
    """
    if not is_distributed():
        return low, high
    edges = torch.stack((-low, high))
    # A maximum may pass over NaN; as infinity it comes through, and counts as what is not finite.
    edges = torch.where(edges.isnan(), torch.full_like(edges, torch.inf), edges)
    torch.distributed.all_reduce(edges, torch.distributed.ReduceOp.MAX)
    return -edges[0], edges[1]


def join_over_processes(tensor: Tensor) -> Tensor:
    """Return the tensors of all processes behind one another along the first dimension, in their order.

    Args:
        tensor: At least one dimension; only the first may have another size in another process.
    """
    if not is_distributed():
        return tensor
    count = torch.distributed.get_world_size()
    sizes = [torch.zeros((), dtype=torch.int64, device=tensor.device) for _ in range(count)]
    torch.distributed.all_gather(sizes, torch.tensor(len(tensor), device=tensor.device))
    longest = max(int(size) for size in sizes)
    padded = tensor.new_zeros((longest, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in range(count)]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


def alike(tensors: Iterable[Tensor]) -> bool:
    """Whether all processes hold the same values; every process gets the same answer.

    Sums of the numbers' bits are compared, which do not depend on the order of adding.

    Args:
        tensors: On one device; quantized, sparse and meta tensors are passed over.
    """
    if not is_distributed():
        return True
    sums = [_sum_of_bits(own) for own in tensors if own.layout is torch.strided and not own.is_meta]
    own = torch.stack([torch.tensor(len(sums)), *(part.cpu() for part in sums)])
    everyone: list[Tensor | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, own)
    return all(other is not None and torch.equal(own, other) for other in everyone)


def _sum_of_bits(tensor: Tensor) -> Tensor:
    value = tensor.detach()
    value = torch.view_as_real(value) if value.is_complex() else value
    bits = value.view(_WHOLE_NUMBERS[value.element_size()])
    return bits.sum(dtype=torch.int64)
