"""Everything that a training run is made of as one state with whole tensors, however the model is spread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dwindle import simulate
from dwindle.config.errors import ConfigError, FileFormatError
from dwindle.training.run import CompressionRun

__all__ = ["load_whole_state", "whole_state"]


def whole_state(run: CompressionRun, optimizers: Sequence[torch.optim.Optimizer] = ()) -> dict[str, Any]:
    """Return the state of a run's model, its optimizers and its compressors, for :func:`dwindle.training.save_state`.

    Of a model that ``fully_shard`` has cut up the tensors are gathered: all processes call this together, and each
    gets the same. One of them may write it; it can be read by any number of processes, cut up or not.

    Args:
        run: Entered.
        optimizers: Those that train the model and the compressors' parameters.
    """
    simulate.reshard(run.model)
    return {
        "model": {name: simulate.whole(own) for name, own in run.model.state_dict().items()},
        "optimizers": [_whole(optimizer.state_dict()) for optimizer in optimizers],
        "run": run.state_dict(),
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
    missing = {"model", "optimizers", "run"} - set(state)
    if missing or len(state["optimizers"]) != len(optimizers):
        said = (
            f"it lacks {', '.join(sorted(missing))}"
            if missing
            else f"it has {len(state['optimizers'])} optimizers"
        )
        raise FileFormatError(f"this is no state of such a run: {said}")
    run.load_state_dict(state["run"])
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


def _whole(value: Any) -> Any:
    """Return a nested state with whole tensors."""
    if isinstance(value, Tensor):
        return simulate.whole(value)
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
