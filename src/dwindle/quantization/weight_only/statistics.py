"""Sums over the inputs of linear layers, in passes over the data that stop as soon as nothing more is wanted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import DwindleError
from dwindle.quantization.weight_only.structure import Reading
from dwindle.training.inputs import forward_inputs
from dwindle.training.linear_layers import columns, input_of
from dwindle.training.model_pass import batches_for, undisturbed


@dataclass
class InputSums:
    """What is known of the inputs of a layer.

    Attributes:
        products: Sum of ``x x'`` over the samples, ``[columns, columns]``.
        magnitudes: Sum of ``|x|``, ``[columns]``.
        samples: How many there were.
    """

    products: Tensor
    magnitudes: Tensor
    samples: int

    @property
    def hessian(self) -> Tensor:
        """Mean of ``x x'``."""
        return self.products / max(self.samples, 1)

    @property
    def magnitude(self) -> Tensor:
        """Mean of ``|x|``."""
        return self.magnitudes / max(self.samples, 1)


LARGEST_NORM = 4.0
"""Inputs with more than so many times the median norm are scaled down to it before they count.

The first token of a text, to which attention turns when it has nothing to look for, is hundreds of times as large as
the others in some layers of language models (Sun et al. 2024, arXiv:2402.17762). Squared, it alone would decide what
a weight is rounded for, and the other tokens would be the worse for it.
"""


def without_giants(rows: Tensor) -> Tensor:
    """Return inputs, ``[samples, columns]``, none of them larger than a few times the median."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    limit = LARGEST_NORM * norms.median()
    if not bool((norms > limit).any()) or float(limit) == 0.0:
        return rows
    return rows * (limit / norms).clamp(max=1.0)


class _Seen(BaseException):
    """The inputs that are wanted have been seen: the rest of the forward is not needed."""


class _Observer:
    """Adds up the inputs of one layer of each reading, and ends a forward after the last of them."""

    def __init__(self, wanted: Sequence[Reading]) -> None:
        self.sums: dict[str, InputSums] = {}
        self.calls = {reading.layers[0]: reading.calls for reading in wanted}
        self.left = dict(self.calls)

    def hook(self, name: str) -> Callable[..., None]:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = input_of(args, kwargs)
            if value is not None:
                self._add(name, module, value)
            self.left[name] -= 1
            if all(count <= 0 for count in self.left.values()):
                raise _Seen

        return observe

    def _add(self, name: str, module: nn.Module, value: Tensor) -> None:
        with torch.autocast(value.device.type, enabled=False):
            for piece in columns(module, value):
                rows = without_giants(piece[0])
                products, magnitudes = rows.t() @ rows, rows.abs().sum(0)
                sums = self.sums.get(name)
                if sums is None:
                    self.sums[name] = InputSums(products, magnitudes, len(rows))
                    continue
                sums.products += products
                sums.magnitudes += magnitudes
                sums.samples += len(rows)


def input_sums(
    model: nn.Module,
    wanted: Sequence[Reading],
    data: Any,
    batches: int | None,
    adapt: Callable[[Any], Any] | None,
) -> dict[str, InputSums]:
    """Run the model over the data; return what its layers read, by the first layer of each reading.

    Args:
        model: Run in evaluation mode, as far as needed; left as it was.
        wanted: Which layers.
        data: Batches.
        batches: How many; None takes all.
        adapt: Applied to each batch first.

    Raises:
        ConfigError: The data end early.
        DwindleError: A layer's inputs are not finite.
    """
    observer = _Observer(wanted)
    handles = [
        model.get_submodule(name).register_forward_pre_hook(observer.hook(name), with_kwargs=True)
        for name in observer.calls
    ]
    try:
        with undisturbed(model), torch.no_grad():
            for batch in batches_for(data, batches, "inputs of layers"):
                observer.left = dict(observer.calls)
                args, kwargs = forward_inputs(model, batch, adapt)
                with contextlib.suppress(_Seen):
                    model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for name in observer.calls:
        if name not in observer.sums:
            raise DwindleError(f"{name}: nothing reached it in the data")
        if not bool(torch.isfinite(observer.sums[name].products).all()):
            raise DwindleError(f"{name}: its inputs hold NaN or infinite values")
    return observer.sums
