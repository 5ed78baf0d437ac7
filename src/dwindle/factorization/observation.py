"""What a model's layers are called with: where they compute, and the second moments of their inputs on data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import CaptureError, DwindleError
from dwindle.factorization.forms import LayerForm, Places
from dwindle.graph.macs import counting_kernels
from dwindle.training.inputs import Inputs, input_batches
from dwindle.training.linear_layers import columns, input_of
from dwindle.training.model_pass import undisturbed, within_memory
from dwindle.training.progress import tracked

__all__ = ["Moments", "input_moments", "observed_calls"]

#: Second moments that are gathered in one pass over the data take no more bytes than this.
_MEMORY = 1 << 31


def observed_calls(
    model: nn.Module, forms: Mapping[str, LayerForm], inputs: Inputs
) -> dict[str, tuple[Places, ...]]:
    """Run the model once; return where each layer computed (nothing for layers that were not called).

    Args:
        model: Left as it was.
        forms: The layers, by path.
        inputs: Arguments of the forward.

    Raises:
        CaptureError: The model fails on the inputs.
    """
    found: dict[str, list[Places]] = {}

    def hook(name: str, form: LayerForm) -> Any:
        def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            value = input_of(args, kwargs)
            if value is None or not isinstance(output, Tensor):
                return
            dims = len(form.kernel)
            if not dims:
                found.setdefault(name, []).append(Places(value.numel() // max(form.inputs, 1)))
                return
            before, after = tuple(value.shape[-dims:]), tuple(output.shape[-dims:])
            count = value.shape[0] if value.dim() == dims + 2 else 1
            found.setdefault(name, []).append(Places(count, before, after))

        return observe

    handles = [
        model.get_submodule(name).register_forward_hook(hook(name, form), with_kwargs=True)
        for name, form in forms.items()
    ]
    args, kwargs = inputs
    try:
        with undisturbed(model), torch.no_grad(), counting_kernels():
            model(*args, **kwargs)
    except Exception as error:  # the model's own code may raise anything
        raise CaptureError(f"the model fails on the example inputs: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return {name: tuple(calls) for name, calls in found.items()}


@dataclass
class Moments:
    """What one layer read.

    Attributes:
        products: Sum of the outer products of its columns, ``[columns, columns]``.
        sums: Sum of its columns.
        samples: How many.
    """

    products: Tensor
    sums: Tensor
    samples: int

    @property
    def mean(self) -> Tensor:
        """The mean column."""
        return self.sums / self.samples

    def second(self, *, centred: bool) -> Tensor:
        """Return the second moments, or the covariance, ``[columns, columns]``."""
        second = self.products / self.samples
        return second - torch.outer(self.mean, self.mean) if centred else second


def input_moments(
    model: nn.Module, forms: Mapping[str, LayerForm], data: Any, *, memory: int = _MEMORY
) -> dict[str, Moments]:
    """Run the model over data; return what each layer read.

    Large models are run several times, for as many layers at once as the memory allows.

    Args:
        model: In evaluation mode while it runs; left as it was.
        forms: The layers, by path.
        data: Batches as for :func:`dwindle.training.inputs.input_batches`.
        memory: Bytes for the moments of one pass.

    Raises:
        ConfigError: No data.
        DwindleError: A layer's inputs are not finite, or nothing reached it.
    """
    batches = list(input_batches(model, data))
    found: dict[str, Moments] = {}

    def size_of(name: str) -> int:
        return 8 * (forms[name].inputs * forms[name].places) ** 2

    for group in within_memory(forms, size_of, memory):
        found |= _pass(model, group, batches)
    for name in forms:
        if name not in found:
            raise DwindleError(f"{name}: nothing reached it in the data")
        if not bool(torch.isfinite(found[name].products).all()):
            raise DwindleError(f"{name}: its inputs hold NaN or infinite values")
    return found


def _pass(model: nn.Module, names: Sequence[str], batches: Sequence[Inputs]) -> dict[str, Moments]:
    found: dict[str, Moments] = {}

    def hook(name: str) -> Any:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = input_of(args, kwargs)
            if value is None:
                return
            for piece in columns(module, value):
                rows = piece[0]
                products, sums = (rows.t() @ rows).double(), rows.sum(0, dtype=torch.float64)
                if name in found:
                    found[name].products += products
                    found[name].sums += sums
                    found[name].samples += len(rows)
                else:
                    found[name] = Moments(products, sums, len(rows))

        return observe

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in names
    ]
    try:
        with undisturbed(model), torch.no_grad(), counting_kernels():
            for args, kwargs in tracked(batches, "inputs of layers"):
                model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found
