"""Parameter groups that join an optimizer whose learning rate scheduler exists already."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["base_rate", "follow_new_groups"]

#: What schedulers keep in each group, and whether it is a learning rate.
_GROUP_KEYS = {
    "initial_lr": True,
    "max_lr": True,
    "min_lr": True,
    "base_momentum": False,
    "max_momentum": False,
}

#: What schedulers keep in lists with one entry for each group, and whether it is a learning rate.
_LISTS = {
    "base_lrs": True,
    "max_lrs": True,
    "_last_lr": True,
    "min_lrs": False,
    "lr_lambdas": False,
    "base_momentums": False,
    "max_momentums": False,
}


def base_rate(group: dict[str, Any]) -> float:
    """Return the learning rate of a parameter group from which its scheduler reckons (the peak of a cycle)."""
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


def follow_new_groups(schedule: Any, optimizer: torch.optim.Optimizer, first: int) -> None:
    """Let a learning rate scheduler of torch move groups that were added after it was made.

    The learning rate that a new group has is taken for its base rate; it follows the course of group 0 in proportion
    to the base rate of that. Anything that is no scheduler of this optimizer is left alone.

    Args:
        schedule: A scheduler (or one made of several).
        optimizer: Its optimizer.
        first: Number of the first new group.
    """
    groups = optimizer.param_groups
    if not 0 < first < len(groups):
        return
    example = groups[0]
    shares = [float(group["lr"]) / (base_rate(example) or 1.0) for group in groups[first:]]
    _extend_lists(schedule, optimizer, first, shares)
    for group, share in zip(groups[first:], shares, strict=True):
        group["lr"] = example["lr"] * share
        for key, is_rate in _GROUP_KEYS.items():
            if key in example:
                group[key] = example[key] * share if is_rate else example[key]


def _extend_lists(schedule: Any, optimizer: torch.optim.Optimizer, first: int, shares: list[float]) -> None:
    for inner in getattr(schedule, "_schedulers", ()):
        _extend_lists(inner, optimizer, first, shares)
    if _innermost(getattr(schedule, "optimizer", None)) is not _innermost(optimizer):
        return
    for name, is_rate in _LISTS.items():
        values = getattr(schedule, name, None)
        if isinstance(values, list) and len(values) == first:
            values.extend([values[0] * share if is_rate else values[0] for share in shares])


def _innermost(optimizer: Any) -> Any:
    """Return what a framework's wrappers (Accelerate's) hold."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer
