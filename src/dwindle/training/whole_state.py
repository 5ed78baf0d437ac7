"""Everything that a training run is made of as one state with whole tensors, however the model is spread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dwindle import simulate
from dwindle.config.errors import ConfigError, FileFormatError
from dwindle.training.processes import alike, rank
from dwindle.training.run import CompressionRun

__all__ = ["load_whole_state", "whole_state"]


def whole_state(run: CompressionRun, optimizers: Sequence[torch.optim.Optimizer] = ()) -> dict[str, Any]:
    """Return copies of the state of a run's model, optimizers and compressors, for :func:`dwindle.training.save_state`.

    All processes call this together, and each gets the same; one of them writes it. What ``fully_shard`` has cut up is
    gathered. It can be read by any number of processes, cut up or not; what a pruner has seen of each process's part of
    the data goes to as many.

    Args:
        run: Entered.
        optimizers: Those that train the model and the compressors' parameters.
    """
    simulate.reshard(run.model)
    return {
        "model": _whole(dict(run.model.state_dict())),
        "optimizers": [_whole(optimizer.state_dict()) for optimizer in optimizers],
        "runs": _of_all(_whole(run.state_dict())),
    }


def load_whole_state(
    run: CompressionRun, state: dict[str, Any], optimizers: Sequence[torch.optim.Optimizer] = ()
) -> None:
    """Go on where :func:`whole_state` was called.

    Args:
        run: Entered, with the same compressors.
        state: What it gave.
        optimizers: As there, in the same order.

    Raises:
        ConfigError: The compressors are others.
        FileFormatError: Something is missing in the state, or does not fit.
    """
    missing = {"model", "optimizers", "runs"} - set(state)
    if missing or len(state["optimizers"]) != len(optimizers):
        said = (
            f"it lacks {', '.join(sorted(missing))}"
            if missing
            else f"it has {len(state['optimizers'])} optimizers"
        )
        raise FileFormatError(f"this is no state of such a run: {said}")
    runs = state["runs"]
    run.load_state_dict(runs[rank() if len(runs) > rank() else 0])
    simulate.reshard(run.model)
    now = run.model.state_dict()
    try:
        run.model.load_state_dict(
            {name: _spread_like(own, now.get(name)) for name, own in state["model"].items()}
        )
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(_spread(saved, optimizer))
    except (KeyError, RuntimeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise FileFormatError(f"this is the state of another run: {error}") from error


def _of_all(own: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the states of all processes, or one if they are the same."""
    if alike(_tensors(own)):
        return [own]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, own)
    return everyone


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for own in value.values() if isinstance(value, dict) else value:
            yield from _tensors(own)


def _whole(value: Any) -> Any:
    """Return a nested state with whole tensors, copies of those that are there."""
    if isinstance(value, Tensor):
        return simulate.whole(value) if simulate.is_shard(value) else value.detach().clone()
    if isinstance(value, dict):
        return {key: _whole(own) for key, own in value.items()}
    return [_whole(own) for own in value] if isinstance(value, list) else value


def _spread(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state with its tensors cut up as the parameters that they belong to."""
    parameters = [own for group in optimizer.param_groups for own in group["params"]]
    spread = {
        number: {
            key: _spread_like(own, parameters[int(number)]) if isinstance(own, Tensor) else own
            for key, own in held.items()
        }
        for number, held in state["state"].items()
    }
    return {**state, "state": spread}


def _spread_like(value: Tensor, like: Tensor | None) -> Tensor:
    if like is None or not simulate.is_shard(like) or value.shape != like.shape:
        return value
    return simulate.spread_like(value, like)
