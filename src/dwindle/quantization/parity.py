"""How close the real int8 file comes to the simulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.quantization.calls import tensors_in
from dwindle.training.inputs import forward_inputs


@dataclass(frozen=True)
class Parity:
    """Differences between two runs of the same inputs.

    Attributes:
        samples: Number of rows compared (all dimensions but the last of the first output, multiplied).
        max_difference: Largest absolute difference.
        mean_difference: Mean absolute difference.
        scale: Largest absolute value of the reference, to judge the differences by.
        equal_predictions: Share of rows whose largest entry is at the same index.
        sqnr_db: Signal to noise in decibels: ``10 log10(sum(reference²) / sum(difference²))``.
    """

    samples: int
    max_difference: float
    mean_difference: float
    scale: float
    equal_predictions: float
    sqnr_db: float

    def to_json(self) -> dict[str, Any]:
        """Return plain data; an infinite ratio becomes None."""
        data = asdict(self)
        if math.isinf(self.sqnr_db):
            data["sqnr_db"] = None
        return data


def compare(reference: np.ndarray, other: np.ndarray) -> Parity:
    """Compare two arrays of outputs.

    Args:
        reference: Shape ``(samples, ..., classes)``.
        other: The same shape.

    Raises:
        ConfigError: The shapes differ or there is nothing to compare.
    """
    if reference.shape != other.shape:
        raise ConfigError(f"outputs of shapes {reference.shape} and {other.shape} cannot be compared")
    if reference.size == 0:
        raise ConfigError("there is no output to compare")
    first, second = reference.astype(np.float64), other.astype(np.float64)
    difference = np.abs(first - second)
    noise = float((difference**2).sum())
    signal = float((first**2).sum())
    rows = first.reshape(-1, first.shape[-1]) if first.ndim > 1 else first.reshape(1, -1)
    others = second.reshape(rows.shape)
    return Parity(
        samples=len(rows),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        scale=float(np.abs(first).max()),
        equal_predictions=float((rows.argmax(axis=1) == others.argmax(axis=1)).mean()),
        sqnr_db=math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise),
    )


def parity(
    model: nn.Module,
    runner: Callable[..., Any],
    batches: Iterable[Any],
    *,
    adapt: Callable[[Any], Any] | None = None,
) -> Parity:
    """Compare a simulated model with the real file in a runtime.

    Args:
        model: The simulated (or any) model; run as it is, without gradients.
        runner: Takes the inputs as NumPy arrays, positional as the model's forward takes them (mappings by
            keyword), and returns an array or a list of arrays; the first is compared.
        batches: Inputs, as :func:`dwindle.quantize` takes them.
        adapt: Function from a batch to inputs, for batches of another form.

    Raises:
        ConfigError: Outputs have different shapes, or there are no batches.
    """
    references, others = [], []
    for batch in batches:
        args, kwargs = forward_inputs(model, batch, adapt)
        with torch.no_grad():
            reference = next(tensors_in(model(*args, **kwargs)))
        arrays = [_array(value) for value in args]
        named = {name: _array(value) for name, value in kwargs.items()}
        result = runner(*arrays, **named)
        other = result[0] if isinstance(result, list | tuple) else result
        references.append(_array(reference))
        others.append(np.asarray(other))
    if not references:
        raise ConfigError("there are no batches to compare")
    return compare(np.concatenate(references), np.concatenate(others))


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
