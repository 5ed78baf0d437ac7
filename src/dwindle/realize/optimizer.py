"""Carries a live optimizer over surgery: its state is sliced with the parameter it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from dwindle.realize.surgery import sliced

Replaced = Mapping[torch.Tensor, tuple[torch.Tensor, Mapping[int, torch.Tensor]]]


def carry_over(
    optimizer: torch.optim.Optimizer,
    replaced: Replaced,
    added: Iterable[torch.Tensor] = (),
    dropped: Iterable[torch.Tensor] = (),
) -> Callable[[], None]:
    """Make ``optimizer`` go on with the replaced parameters.

    State tensors of a parameter's own shape (moments, momentum) are sliced like it; everything else (step
    counts) is kept. Parameter groups hold the new parameters at the same places.

    Args:
        optimizer: Any torch optimizer.
        replaced: For each old parameter the new one and the indices kept in each dimension.
        added: Parameters that surgery created; they join the first group.
        dropped: Old parameters that the model has no longer; they leave their groups, and their state goes.

    Returns:
        A function that undoes it.
    """
    groups = [list(group["params"]) for group in optimizer.param_groups]
    state = dict(optimizer.state)

    def undo() -> None:
        for group, params in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = params
        optimizer.state.clear()
        optimizer.state.update(state)

    gone = set(dropped)
    for group in optimizer.param_groups:
        group["params"] = [replaced[p][0] if p in replaced else p for p in group["params"] if p not in gone]
    if optimizer.param_groups:
        optimizer.param_groups[0]["params"] += list(added)
    for old in gone:
        optimizer.state.pop(old, None)
    for old, (new, dims) in replaced.items():
        if old in optimizer.state:
            entries = optimizer.state.pop(old)
            optimizer.state[new] = {
                key: sliced(held, dims)
                if isinstance(held, torch.Tensor) and held.shape == old.shape
                else held
                for key, held in entries.items()
            }
    return undo
