"""How much of what the readers of an axis make comes from each index: activations and weights, without labels."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config import Target
from dwindle.config.errors import DwindleError
from dwindle.config.granularity import activation_axis
from dwindle.pruning.axis_importance import GroupNorm, Loss, Normalize, over_mean
from dwindle.pruning.importance import rows
from dwindle.pruning.measured import MeasuredImportance
from dwindle.pruning.places import hook_places
from dwindle.pruning.shared_axes import SharedAxis
from dwindle.pruning.statistics import Statistics, agree
from dwindle.training.inputs import forward_inputs
from dwindle.training.model_pass import batches_for, device_of, undisturbed


def read_energy(moments: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Return ``E[x_c^2] |W[:, c]|^2`` for each input channel: the energy that it gives to the outputs.

    Args:
        moments: ``E[x^2]`` (or the variance) of each channel that the layer gets; with groups there are several for
            each position of the weight's dimension.
        weight: The weight that reads them.
        dim: Its input dimension.

    Returns:
        ``[weight.shape[dim]]``, float64.
    """
    size = weight.shape[dim]
    groups = moments.numel() // size
    squares = weight.detach().double().square().movedim(dim, 0)  # (in, out, ...)
    by_group = squares.reshape(size, groups, -1).sum(2)
    return (by_group * moments.double().reshape(groups, size).T).sum(1)


class Activation(MeasuredImportance):
    """How much of what the readers of an axis make would be missing: ``sum over readers of E[x^2] |W|^2``.

    The error of a layer's outputs when one of its inputs is left out, on average over data and places, inputs taken as
    uncorrelated: the structured form of Wanda (Sun et al., arXiv:2306.11695). With ``centered`` it is the error that is
    left when the input is replaced by its mean (FLAP, An et al., arXiv:2312.11983), which a bias, a norm or
    fine-tuning makes up for. No labels, no gradients. Axes that no layer reads (the width of queries and keys) are
    scored by their group norm.

    Args:
        centered: Use the variance in place of the mean square.
        batches: How many batches of the data are used; None takes all. Ending earlier is an error.
        normalize: As in :class:`~dwindle.pruning.axis_importance.AxisImportance`.
    """

    def __init__(
        self, *, centered: bool = False, batches: int | None = None, normalize: Normalize = "axis"
    ) -> None:
        super().__init__(batches=batches, normalize=normalize)
        self.centered = centered
        self._fallback = GroupNorm(normalize="none")
        self._moments = Statistics()

    def measure(
        self, model: nn.Module, axes: Sequence[SharedAxis], data: Any, loss: Loss, *, weights: bool = False
    ) -> None:
        """Run the model over the data in evaluation mode; it is as before afterwards."""
        self.refuse_meta(model)
        modules = dict(model.named_modules())
        names = {place.name for axis in axes for place in axis.places if place.reads}
        if weights:
            names.update(name for name, own in model.named_parameters() if own.dim() > 1)
        targets = dict.fromkeys(_input_of(name) for name in sorted(names))
        self._moments = Statistics()

        def see(target: Target, value: Tensor) -> None:
            axis = activation_axis(type(modules[target.module]))
            if value.is_floating_point() and -value.dim() <= axis < value.dim():
                channels = rows(value.detach(), axis % value.dim()).double()
                self._moments.add(
                    target, torch.stack([channels.sum(1), channels.square().sum(1)]), channels.shape[1]
                )

        def run() -> None:
            with undisturbed(model), torch.no_grad(), contextlib.ExitStack() as stack:
                for handle in hook_places(model, list(targets), see):
                    stack.callback(handle.remove)
                for batch in batches_for(data, self.batches, "Activation: data"):
                    args, kwargs = forward_inputs(model, batch)
                    model(*args, **kwargs)

        agree(run, device_of(model))
        self._moments.reduce(device_of(model))
        if self._moments.not_finite():
            raise DwindleError(f"the activations of {self._moments.not_finite()[0].module} are not finite")

    def of_weight(self, name: str, weight: Tensor, dim: int) -> Tensor:
        """Return the energy that the inputs of a layer give to its outputs; by its size where none was seen."""
        moments = self._seen(name, weight, dim)
        if moments is None:
            return self._fallback.of_weight(name, weight, dim)
        return read_energy(moments, weight, dim)

    def _seen(self, name: str, weight: Tensor, dim: int) -> Tensor | None:
        target = _input_of(name)
        if target not in self._moments or weight.dim() < 2:
            return None
        mean, square = self._moments.mean(target).unbind()
        whole = mean.numel() >= weight.shape[dim] and mean.numel() % weight.shape[dim] == 0
        if not whole or weight.shape[0] % (mean.numel() // weight.shape[dim]):
            return None
        return (square - mean.square()).clamp(min=0) if self.centered else square

    def of_axis(self, axis: SharedAxis, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the energy that the readers of an axis get from each index."""
        total: Tensor | None = None
        for place in axis.places:
            tensor = tensors.get(place.name)
            if place.reads and tensor is not None and self._seen(place.name, tensor, place.dim) is not None:
                own = place.onto(self.of_weight(place.name, tensor.detach(), place.dim), axis.size).cpu()
                total = own if total is None else total + own
        scores = self._fallback.of_axis(axis, tensors) if total is None else total
        return over_mean(scores) if self.normalize == "axis" else scores


def _input_of(name: str) -> Target:
    return Target(name.rpartition(".")[0], "_input_0")
