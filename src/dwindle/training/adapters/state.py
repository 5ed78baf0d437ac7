"""The state of a run as a file inside a framework's checkpoint, and the questions every adapter asks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dwindle.config.errors import ConfigError, FileFormatError
from dwindle.training.checkpoint import load_state, save_state
from dwindle.training.processes import rank
from dwindle.training.run import CompressionRun

__all__ = ["STATE_FILE", "check_run", "optimizer_of", "read_run", "write_run"]

STATE_FILE = "dwindle_run.safetensors"
"""Name of the file in a checkpoint's folder that holds a run's state."""


def write_run(run: CompressionRun, folder: str | os.PathLike[str]) -> Path:
    """Write a run's state into a checkpoint's folder, atomically; return the file.

    Of several processes each writes its own: what a pruner has seen of its part of the data is no other's.
    """
    path = Path(folder) / _own_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_state(run.state_dict(), path)
    return path


def read_run(run: CompressionRun, folder: str | os.PathLike[str]) -> None:
    """Take over the state that :func:`write_run` left in a folder.

    Raises:
        FileFormatError: There is none, or it belongs to other compressors.
    """
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise FileFormatError(
            f"the checkpoint {folder} was written without these compressors: it has no {STATE_FILE}"
        )
    state = load_state(path)
    own = Path(folder) / _own_file()
    if own != path and own.is_file():
        mine = load_state(own)
        state = mine if mine.get("steps") == state.get("steps") else state  # else it is left from another run
    run.load_state_dict(state)


def _own_file() -> str:
    return STATE_FILE if rank() == 0 else STATE_FILE.replace(".", f"-{rank()}.", 1)


def check_run(run: object, model: nn.Module, what: str) -> CompressionRun:
    """Return ``run`` if it can follow what trains ``model``.

    Args:
        run: Should be a run whose block is entered.
        model: What the framework trains.
        what: The framework's own name of it, for messages.

    Raises:
        ConfigError: It is no run, is not entered, or compresses another model.
    """
    if not isinstance(run, CompressionRun):
        raise ConfigError(f"run must be what dw.compress gives, got {type(run).__name__}")
    if not run.active:
        raise ConfigError("enter the run first: with dw.compress(model, [...]) as run: ...")
    if all(run.model is not module for module in model.modules()):
        raise ConfigError(
            f"the run compresses a {type(run.model).__name__} that is not part of {what}; "
            "make its compressors with the model that is trained"
        )
    return run


def optimizer_of(run: CompressionRun, optimizers: Iterable[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """Return the optimizer that trains the compressed model: the first that holds one of its parameters.

    Raises:
        ConfigError: None does.
    """
    wanted = {id(parameter) for parameter in run.model.parameters()}
    known: Sequence[torch.optim.Optimizer] = list(optimizers)
    for optimizer in known:
        held: list[Any] = [own for group in optimizer.param_groups for own in group["params"]]
        if any(id(own) in wanted for own in held):
            return optimizer
    raise ConfigError(f"none of the {len(known)} optimizers holds a parameter of the compressed model")
