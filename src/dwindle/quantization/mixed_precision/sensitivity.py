"""HAWQ-v2's sensitivity: the mean curvature of the loss at a tensor, times the squared error of rounding it.

The curvature is the trace of the loss's Hessian over the tensor (Hutchinson: the mean of ``z^T H z`` over random signs
``z``), and the sensitivity at ``b`` bits is ``trace / n * ||Q_b(W) - W||^2`` with the ``n`` entries of the tensor
(Dong et al. 2020, arXiv:1911.03852). What layers read has a sensitivity of the same kind, averaged over samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dwindle.config.errors import ConfigError, DwindleError, did_you_mean
from dwindle.quantization.calls import CallKey, track_modules
from dwindle.quantization.mixed_precision.layers import ReadingMode, Structure
from dwindle.quantization.simulation import WeightSlot
from dwindle.training.batches import logits_of, move_batch, split_batch
from dwindle.training.hessian import hutchinson
from dwindle.training.inputs import forward_inputs
from dwindle.training.model_pass import batches_for, device_of
from dwindle.training.progress import tracked

Loss = Callable[[Any, Any], Tensor]


def own_distribution(outputs: Tensor) -> Tensor:
    """Return the cross-entropy of a model with its own distribution: a loss that needs no labels.

    Its gradient is zero, and its Hessian, that of the Kullback-Leibler distance to the unchanged model, never negative.

    Args:
        outputs: Logits, ``[..., classes]``.
    """
    logits = outputs.flatten(0, -2)
    return nn.functional.cross_entropy(logits, logits.detach().softmax(-1))


def own_outputs(outputs: Tensor) -> Tensor:
    """Return the mean squared distance of outputs to themselves: for outputs that are no logits."""
    return nn.functional.mse_loss(outputs, outputs.detach())


UNLABELLED: dict[str, Callable[[Tensor], Tensor]] = {
    "own_distribution": own_distribution,
    "own_outputs": own_outputs,
}
"""Losses by name that need no labels."""


@dataclass(frozen=True)
class Options:
    """How traces are estimated.

    Attributes:
        loss: ``loss(outputs, target)``, or a name of :data:`UNLABELLED`.
        probes: At most so many random directions.
        tolerance: The estimate has settled when the standard error of every trace is at most this share of it.
        seed: Of the directions.
    """

    loss: Loss | str = nn.functional.cross_entropy
    probes: int = 200
    tolerance: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.loss, str) and self.loss not in UNLABELLED:
            hint = did_you_mean(self.loss, UNLABELLED)
            raise ConfigError(
                f"loss {self.loss!r} is no function and not one of {', '.join(UNLABELLED)}{hint}"
            )
        if isinstance(self.probes, bool) or self.probes < 2:
            raise ConfigError(f"probes: {self.probes!r} directions give no estimate; at least 2 do")
        if not self.tolerance > 0:
            raise ConfigError(f"tolerance: {self.tolerance!r} is not above 0")


class Estimates:
    """Running means of several quantities with their standard errors (Welford).

    Args:
        count: How many quantities.
    """

    def __init__(self, count: int) -> None:
        self.seen = 0
        self.mean = torch.zeros(count, dtype=torch.float64)
        self._squares = torch.zeros(count, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Take in one observation of each, float64, ``[count]``."""
        self.seen += 1
        before = values - self.mean
        self.mean = self.mean + before / self.seen
        self._squares = self._squares + before * (values - self.mean)

    @property
    def standard_error(self) -> Tensor:
        """Of the means; infinite before the second observation."""
        if self.seen < 2:
            return torch.full_like(self.mean, math.inf)
        return (self._squares / (self.seen - 1) / self.seen).sqrt()

    def settled(self, tolerance: float) -> bool:
        """Whether every standard error is at most this share of its mean."""
        return bool((self.standard_error <= tolerance * self.mean.abs()).all())


@dataclass(frozen=True)
class Traces:
    """Estimated traces.

    Attributes:
        layers: Of every layer's weight, in the order of the structure, float64.
        layer_errors: Their standard errors.
        activations: Of what layers read, summed over one sample, float64; zeros where they were not asked for.
        activation_errors: Their standard errors.
        probes: How many directions were taken.
        settled: Whether the tolerance was met.
    """

    layers: Tensor
    layer_errors: Tensor
    activations: Tensor
    activation_errors: Tensor
    probes: int
    settled: bool


def kept_batches(model: nn.Module, data: Any, options: Options, limit: int | None, adapt: Any) -> list[Any]:
    """Return the batches as ``(args, kwargs, target)``.

    Args:
        model: Whose inputs they are.
        data: Batches: with labels where the loss needs them.
        options: The loss.
        limit: Take so many; None takes all.
        adapt: Applied to each batch first.

    Raises:
        ConfigError: There are none, they end early, have no labels that the loss needs, or hold NaN.
    """
    kept = []
    device = device_of(model)
    for number, batch in enumerate(batches_for(data, limit, "batches")):
        if isinstance(options.loss, str):
            args, kwargs, target = *forward_inputs(model, batch, adapt), None
        else:
            args, kwargs, target = split_batch(
                move_batch(adapt(batch) if adapt is not None else batch, device)
            )
        for value in (*args, *kwargs.values()):
            if (
                isinstance(value, Tensor)
                and value.is_floating_point()
                and not bool(torch.isfinite(value).all())
            ):
                raise ConfigError(f"batch {number} of data holds values that are not finite")
        kept.append((args, kwargs, target))
    return kept


class Curved:
    """One differentiable pass: every weight and every value that a layer reads becomes a point to differentiate at."""

    def __init__(self, structure: Structure, activations: bool) -> None:
        self.structure, self.with_activations = structure, activations
        reads = structure.reads()
        index = {layer.name: number for number, layer in enumerate(structure.layers)}
        self._layer_of = {key: index[layer.name] for key, (layer, _) in reads.items()}
        self._activation_of = {key: activation.number for key, (_, activation) in reads.items()}
        self.weights: dict[int, Tensor] = {}
        self.values: list[tuple[int, Tensor]] = []
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def loss(self, args: Any, kwargs: Any, target: Any, loss: Loss | str) -> Tensor:
        """Run the float model; afterwards :attr:`weights` and :attr:`values` hold the points.

        Raises:
            DwindleError: The loss is not finite.
        """
        mode = ReadingMode(self.structure.simulation, self._on_input, self._on_weight)
        model = self.structure.model
        handles = track_modules(model, mode.path)
        try:
            with mode:
                outputs = logits_of(model(*args, **kwargs))
        finally:
            for handle in handles:
                handle.remove()
        value = UNLABELLED[loss](outputs) if isinstance(loss, str) else loss(outputs, target)
        if not math.isfinite(float(value.detach())):
            raise DwindleError(f"the loss is {float(value.detach())}")
        return value

    def _on_weight(self, key: CallKey, value: Tensor, slot: WeightSlot) -> Tensor:
        number = self._layer_of[key]
        if number not in self.weights:
            self.weights[number] = value.detach().clone().requires_grad_()
        return self.weights[number]

    def _on_input(self, key: CallKey, value: Tensor) -> Tensor:
        if not self.with_activations:
            return value
        if id(value) not in self._seen:  # readers of one value share its point
            point = value.clone() if value.requires_grad else value.detach().clone().requires_grad_()
            self._seen[id(value)] = (value, point)
            self.values.append((self._activation_of[key], point))
        return self._seen[id(value)][1]


@contextmanager
def _frozen(model: nn.Module) -> Any:
    """Parameters need no gradients of their own: the points do."""
    wanted = [(own, own.requires_grad) for own in model.parameters()]
    try:
        for own, _ in wanted:
            own.requires_grad_(False)
        # The fused kernels of attention can be differentiated once only.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for own, before in wanted:
            own.requires_grad_(before)


def traces(
    structure: Structure, batches: Sequence[Any], options: Options, activations: bool = False
) -> Traces:
    """Estimate the trace of the loss's Hessian for every weight, and for what layers read.

    Each direction is drawn for all tensors together, on one batch after the other, until the estimates have settled
    (not before every batch was seen).

    Args:
        structure: The float model.
        batches: ``(args, kwargs, target)``.
        options: Loss, number of directions, tolerance.
        activations: Estimate those of activations too.

    Raises:
        DwindleError: The loss or a trace is not finite.
    """
    generator = torch.Generator().manual_seed(options.seed)
    count = len(structure.layers)
    found = Estimates(count + (len(structure.activations) if activations else 0))
    least = max(len(batches), 10)
    with _frozen(structure.model):
        source = itertools.islice(itertools.cycle(batches), max(options.probes, len(batches)))
        for batch in tracked(source, "curvature: directions", total=options.probes):
            found.add(_one_probe(structure, batch, options, activations, generator, len(found.mean)))
            if found.seen >= least and found.settled(options.tolerance):
                break
    errors, nothing = found.standard_error, torch.zeros(len(structure.activations), dtype=torch.float64)
    return Traces(
        found.mean[:count],
        errors[:count],
        found.mean[count:] if activations else nothing,
        errors[count:] if activations else nothing,
        found.seen,
        found.settled(options.tolerance),
    )


def _one_probe(
    structure: Structure,
    batch: Any,
    options: Options,
    activations: bool,
    generator: torch.Generator,
    count: int,
) -> Tensor:
    """Return one random estimate of every trace, float64."""
    curved = Curved(structure, activations)
    args, kwargs, target = batch
    loss = curved.loss(args, kwargs, target, options.loss)
    places = [*curved.weights, *(len(structure.layers) + number for number, _ in curved.values)]
    points = [*curved.weights.values(), *(point for _, point in curved.values)]
    estimates = hutchinson(loss, points, generator)
    values = torch.zeros(count, dtype=torch.float64)
    for place, estimate in zip(places, estimates, strict=True):
        if estimate is not None:
            values[place] += estimate.detach().double().sum().cpu()
    if not bool(torch.isfinite(values).all()):
        raise DwindleError(
            "the curvature of the loss is not finite; is the model trained, and are its inputs sound?"
        )
    return values


__all__ = [
    "UNLABELLED",
    "Loss",
    "Options",
    "Traces",
    "kept_batches",
    "own_distribution",
    "own_outputs",
    "traces",
]
