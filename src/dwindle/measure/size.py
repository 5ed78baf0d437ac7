"""Counts parameters and bytes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dwindle.export.state_file import write_state


@dataclass(frozen=True)
class ParameterCount:
    """How many numbers a model learns.

    Attributes:
        total: All parameters; one that is shared by several modules counts once.
        trainable: Those with ``requires_grad``.
        buffers: Numbers in buffers (running statistics and the like), which are no parameters.
    """

    total: int
    trainable: int
    buffers: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters and buffers of a model, shared ones once.

    Args:
        model: The model. A parameter under a parametrization counts as the original that stands behind it.
    """
    parameters = {id(parameter): parameter for parameter in model.parameters()}.values()
    buffers = {id(buffer): buffer for buffer in model.buffers()}.values()
    return ParameterCount(
        total=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        buffers=sum(buffer.numel() for buffer in buffers),
    )


def state_bytes(model: nn.Module) -> int:
    """Return the bytes of the model's state dict as a ``.safetensors`` file, shared tensors stored once.

    The file is really written (to a temporary place) and its length taken.
    """
    with tempfile.TemporaryDirectory(prefix="dwindle-size-") as directory:
        path = Path(directory) / "model.safetensors"
        write_state(model, path)
        return path.stat().st_size


def file_bytes(paths: list[Path]) -> int:
    """Return the bytes of files together."""
    return sum(path.stat().st_size for path in paths)
