"""Importances that run the model over data and differentiate: Taylor, Fisher, outputs, the Hessian's diagonal.

The first three score a *gate* on each index of an axis: a factor of one on what all readers of the axis get. Its
derivative is ``sum w dL/dw`` over the weights that read the index. It takes into account that whatever shares the axis
goes together, and that contributions can cancel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.pruning.axis_importance import AxisImportance, Loss, Normalize, over_mean
from dwindle.pruning.importance import rows
from dwindle.pruning.second_order import saliency, samples_of
from dwindle.pruning.shared_axes import AxisPlace, SharedAxis
from dwindle.pruning.statistics import agree
from dwindle.training.batches import logits_of
from dwindle.training.inputs import forward_inputs
from dwindle.training.model_pass import batches_for, device_of, task_loss, undisturbed
from dwindle.training.processes import is_distributed, rank, sum_over_processes

Products = Mapping[str, Tensor]


def gate_derivative(axis: SharedAxis, products: Products) -> Tensor | None:
    """Return the derivative with respect to a gate on each index of an axis (Molchanov et al., arXiv:1906.10771).

    Args:
        axis: The axis.
        products: ``w dL/dw`` of the parameters that have a gradient.

    Returns:
        ``[axis.size]`` in float64; None when nothing of the axis has a gradient.
    """
    total: Tensor | None = None
    for place in axis.gated:
        if place.name in products:
            own = place.onto(rows(products[place.name], place.dim).sum(1), axis.size)
            total = own if total is None else total + own
    return total


class MeasuredImportance(AxisImportance):
    """Base of importances that sum something up over batches, over all processes of a distributed run.

    Args:
        batches: How many batches of the data are used; None takes all. Ending earlier is an error.
        normalize: As in :class:`AxisImportance`.

    Raises:
        ConfigError: An argument is not valid.
    """

    needs_data = True
    #: Whether sums for single weights are always kept, not only where whole blocks or experts are scored.
    keeps_weights: ClassVar[bool] = False

    def __init__(self, *, batches: int | None = None, normalize: Normalize = "axis") -> None:
        super().__init__(reduce="sum", normalize=normalize)
        if batches is not None and (isinstance(batches, bool) or batches < 1):
            raise ConfigError(f"batches: {batches!r} is not a positive number")
        self.batches = batches
        self.count = 0.0
        self.axes: dict[Any, Tensor] = {}
        self.weights: dict[str, Tensor] = {}

    def measure(
        self, model: nn.Module, axes: Sequence[SharedAxis], data: Any, loss: Loss, *, weights: bool = False
    ) -> None:
        """Run the model over the data in evaluation mode; it is as before afterwards."""
        self.refuse_meta(model)
        parameters = {name: own for name, own in model.named_parameters() if own.is_floating_point()}
        device = device_of(model)
        self.count = 0.0
        self.axes = {axis.key: torch.zeros(axis.size, dtype=torch.float64, device=device) for axis in axes}
        kept = parameters if weights or self.keeps_weights else {}
        self.weights = {name: torch.zeros_like(own, dtype=_wide(own)) for name, own in kept.items()}
        description = f"{type(self).__name__}: data"

        def run() -> None:
            with undisturbed(model, parameters.values()), torch.enable_grad():
                for number, batch in enumerate(batches_for(data, self.batches, description), 1):
                    for value in self.values(model, batch, loss, number):
                        value.backward()  # type: ignore[no-untyped-call]
                        self._see(parameters, axes)
                        for parameter in parameters.values():
                            parameter.grad = None

        agree(run, device)
        self._reduce(device)

    def refuse_meta(self, model: nn.Module) -> None:
        """Refuse a model that cannot be run.

        Raises:
            ConfigError: It is on the meta device.
        """
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ConfigError(
                f"{type(self).__name__} runs the model, which a model on the meta device cannot be"
            )

    def values(self, model: nn.Module, batch: Any, loss: Loss, number: int) -> Iterator[Tensor]:
        """Yield what is differentiated for one batch, one observation each."""
        yield task_loss(model, batch, loss, number)

    @torch.no_grad()
    def _see(self, parameters: Mapping[str, nn.Parameter], axes: Sequence[SharedAxis]) -> None:
        """Add one observation: the gradients that stand in the parameters."""
        self.count += 1
        gradients = {name: own.grad for name, own in parameters.items() if own.grad is not None}
        self.observe({name: parameters[name] for name in gradients}, gradients, axes)

    def observe(
        self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], axes: Sequence[SharedAxis]
    ) -> None:
        """Add one observation: the square of the derivative at each gate, and of each weight's own share of it."""
        products = {
            name: weight.to(_wide(weight)) * gradients[name].to(_wide(weight))
            for name, weight in weights.items()
        }
        for axis in axes:
            derivative = gate_derivative(axis, products)
            if derivative is not None:
                self.axes[axis.key] += derivative.square()
        for name, total in self.weights.items():
            if name in products:
                total += products[name].square()

    def _reduce(self, device: torch.device) -> None:
        """Add everything up over all processes, and refuse what is not finite."""
        sums = [*self.axes.values(), *self.weights.values()]
        if is_distributed():
            count = torch.tensor([self.count], dtype=torch.float64, device=device)
            sum_over_processes([count, *sums])
            self.count = float(count)
        if not all(bool(torch.isfinite(own).all()) for own in sums):
            raise DwindleError(
                f"the statistics of {type(self).__name__} are not finite; do the data or the weights hold NaN or "
                "infinite values?"
            )

    def of_weight(self, name: str, weight: Tensor, dim: int) -> Tensor:
        """Return the sum over the elements of each index of what was measured for single weights."""
        if name not in self.weights:
            return torch.zeros(weight.shape[dim])
        return rows(self.weights[name] / max(self.count, 1.0), dim).sum(1)

    def of_axis(self, axis: SharedAxis, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the mean square of the derivative at the gate of each index."""
        scores = (self.axes[axis.key] / max(self.count, 1.0)).cpu()
        return over_mean(scores) if self.normalize == "axis" else scores


class Taylor(MeasuredImportance):
    """What the loss of a batch changes by when the gate of an index closes, to first order, squared.

    ``mean over batches of (sum w dL/dw)^2``: Molchanov et al., "Importance Estimation for Neural Network Pruning"
    (arXiv:1906.10771), with one gate on everything that shares the axis.
    """

    needs_labels = True


class Fisher(MeasuredImportance):
    """What the loss changes by when the gate of an index closes, to second order, with the Fisher information.

    ``mean over samples of (sum w dL/dw)^2``: Theis et al. (arXiv:1801.05787), for coupled channels as Liu et al.,
    "Group Fisher Pruning" (arXiv:2108.00708). One backward pass a sample.
    """

    needs_labels = True

    def values(self, model: nn.Module, batch: Any, loss: Loss, number: int) -> Iterator[Tensor]:
        """Yield the loss of each sample."""
        for sample in samples_of(batch):
            yield task_loss(model, sample, loss, number)


class Outputs(MeasuredImportance):
    """How far the model's outputs move when the gate of an index closes, to first order; no labels are needed.

    ``mean over samples of |d outputs / d gate|^2``: the Gauss-Newton form of the squared change of the outputs. It is
    estimated with one random direction a sample (Hutchinson), and does not fade where the loss is near zero. The
    outputs of a classifier (two dimensions) are taken about their mean, which no softmax notices.

    Args:
        batches: As in :class:`MeasuredImportance`.
        seed: Of the random directions.
        normalize: As in :class:`AxisImportance`.
    """

    def __init__(self, *, batches: int | None = None, seed: int = 0, normalize: Normalize = "axis") -> None:
        super().__init__(batches=batches, normalize=normalize)
        self.seed = seed
        self._directions = torch.Generator()

    def measure(
        self, model: nn.Module, axes: Sequence[SharedAxis], data: Any, loss: Loss, *, weights: bool = False
    ) -> None:
        """Start the random directions anew (others in each process), then run over the data."""
        self._directions.manual_seed(self.seed + 7919 * rank())
        super().measure(model, axes, data, loss, weights=weights)

    def values(self, model: nn.Module, batch: Any, loss: Loss, number: int) -> Iterator[Tensor]:
        """Yield the outputs of each sample along a random direction."""
        for sample in samples_of(batch):
            args, kwargs = forward_inputs(model, tuple(sample) if isinstance(sample, list) else sample)
            outputs = logits_of(model(*args, **kwargs))
            if not isinstance(outputs, Tensor) or not bool(torch.isfinite(outputs).all()):
                raise DwindleError(f"batch {number}: the model's outputs are no tensor of finite numbers")
            signs = torch.randint(0, 2, outputs.shape, generator=self._directions).to(outputs) * 2 - 1
            if outputs.dim() == 2 and outputs.shape[1] > 1:
                signs = signs - signs.mean(1, keepdim=True)
            yield (outputs * signs).sum()


class Hessian(MeasuredImportance):
    """Optimal Brain Damage: the sum of ``h w^2 / 2`` over everything that goes with an index.

    ``h`` is the Hessian's diagonal, estimated by the mean square of the gradient of single samples (the empirical
    Fisher information). Weights, norms and biases count alike; that they go together is not taken into account.
    """

    needs_labels = True

    keeps_weights = True

    def values(self, model: nn.Module, batch: Any, loss: Loss, number: int) -> Iterator[Tensor]:
        """Yield the loss of each sample."""
        for sample in samples_of(batch):
            yield task_loss(model, sample, loss, number)

    def observe(
        self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], axes: Sequence[SharedAxis]
    ) -> None:
        """Add the squared gradients of one sample."""
        for name, gradient in gradients.items():
            self.weights[name] += gradient.to(_wide(gradient)).square()

    def of_weight(self, name: str, weight: Tensor, dim: int) -> Tensor:
        """Return the sum of ``h w^2 / 2`` over the elements of each index."""
        if name not in self.weights:
            return torch.zeros(weight.shape[dim])
        return rows(saliency(weight, self.weights[name] / max(self.count, 1.0)), dim).sum(1)

    def of_axis(self, axis: SharedAxis, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the sum over all parameters that share the axis."""
        return AxisImportance.of_axis(self, axis, tensors)

    def counts(self, place: AxisPlace, weight: Tensor) -> bool:
        """Whether a parameter has a say: every one."""
        return True


def _wide(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)
