"""Where a data loader stands, so that a resumed training sees the same batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["loader_state", "restore_loader"]


def loader_state(loader: Iterable[Any]) -> dict[str, Any] | None:
    """The loader's own state, or the states of the generators that a ``DataLoader`` draws from."""
    save = getattr(loader, "state_dict", None)
    if callable(save):
        return {"own": save()}
    generators = _generators(loader)
    return {"generators": [generator.get_state() for generator in generators]} if generators else None


def restore_loader(loader: Iterable[Any], state: dict[str, Any] | None) -> None:
    """Put back what :func:`loader_state` gave: the next pass gives the same batches."""
    if state is None:
        return
    if "own" in state:
        loader.load_state_dict(state["own"])  # type: ignore[attr-defined]
        return
    for generator, saved in zip(_generators(loader), state["generators"], strict=True):
        generator.set_state(saved)


def _generators(loader: Iterable[Any]) -> list[torch.Generator]:
    found: list[torch.Generator] = []
    for owner in (loader, getattr(loader, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and all(generator is not known for known in found):
            found.append(generator)
    return found
