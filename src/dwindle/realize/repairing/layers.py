"""Pairs each layer of the small model with the one of the original that it shall do again."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dwindle.realize.repairing.affine_calls import shaped
from dwindle.realize.repairing.correspondence import Correspondence, cut_as, row_factors
from dwindle.realize.repairing.recording import Place, Recording


@dataclass(slots=True)
class Layer:
    """A layer of the small model and its counterpart.

    Attributes:
        place: Where its weight is used.
        source: Name of the weight in the original.
        keep: Which of the original's outputs it has; None is all.
        factor: By which number each of its outputs is larger than the original's; None is one.
        support: Which entries of the weight (and, last, of the bias) may differ from zero; None is all.
        weight: Whether the weight may change.
        constant: Whether a constant may be added to the outputs.
        sums: Which calls give a branch whose sum with something else shall be as in the original.
    """

    place: Place
    source: str
    keep: Tensor | None
    factor: Tensor | None
    support: Tensor | None
    weight: bool
    constant: bool
    sums: set[int] = field(default_factory=set)

    @property
    def unknowns(self) -> int:
        """Features of one problem, the one that is always one included."""
        return self.place.features * self.weight + self.constant

    @property
    def elements(self) -> int:
        """Numbers that its moments hold."""
        return self.place.groups * (self.unknowns + 1) * (self.unknowns + self.place.outputs)


def pair_layers(
    small: nn.Module,
    original: nn.Module,
    recordings: tuple[Recording, Recording],
    link: Correspondence,
    parts: Collection[str],
) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers that can be repaired, in the order of their calls, and why the others cannot.

    Args:
        small: The small model.
        original: The original.
        recordings: Of the small model and of the original.
        link: How the one came from the other.
        parts: What may change: ``"weights"``, ``"biases"``, ``"norms"``.
    """
    ours, theirs = recordings
    parameters, sources = dict(small.named_parameters()), dict(original.named_parameters())
    layers: list[Layer] = []
    left: dict[str, str] = {}
    for name, place in ours.places.items():
        source = link.source(name)
        reason = _reason(place, source, ours, theirs)
        if reason is None:
            cut = cut_as(sources[source].detach(), name, link)
            if cut.shape != parameters[name].shape:
                reason = f"its shape is {list(parameters[name].shape)}, not what was left of the original's"
        if reason is not None:
            left[name] = reason
            continue
        layer = _layer(place, source, parameters[name].detach(), cut, link, parts)
        if _absorbed(place, ours, parts):
            layer.weight = layer.constant = False  # the convolution before it does what it could do
        layer.sums = place.sums & theirs.places[source].sums
        if layer.weight or layer.constant:
            layers.append(layer)
    unseen = [name for name, held in parameters.items() if held.dim() > 1 and name not in ours.places]
    for name in unseen:
        left[name] = "no linear layer, convolution or norm uses it"
    return layers, left


def _reason(place: Place, source: str, ours: Recording, theirs: Recording) -> str | None:
    if place.name in ours.elsewhere:
        return "something else uses its weight too"
    if source not in theirs.places:
        return "the original has no such layer"
    if theirs.places[source].calls != place.calls:
        return "the original calls it another number of times"
    return None


def _absorbed(place: Place, ours: Recording, parts: Collection[str]) -> bool:
    """Whether a norm follows a convolution whose constant goes into its running mean."""
    if place.operation != "batch_norm" or "weights" not in parts or "biases" not in parts:
        return False
    prefix = place.name.rpartition(".")[0]
    return any(
        other.shift is not None and other.shift.rpartition(".")[0] == prefix for other in ours.places.values()
    )


def _layer(
    place: Place, source: str, weight: Tensor, cut: Tensor, link: Correspondence, parts: Collection[str]
) -> Layer:
    dim = 1 if place.transposed else 0
    wanted = "norms" if place.is_norm else "weights"
    return Layer(
        place,
        source,
        link.kept(place.name, dim),
        row_factors(weight, cut, dim) if link.is_scaled(place.name) else None,
        _support(place, weight),
        wanted in parts,
        ("norms" if place.is_norm else "biases") in parts and (place.bias or place.shift) is not None,
    )


def _support(place: Place, weight: Tensor) -> Tensor | None:
    """Return where the weight is not zero, ``[groups, features + 1, outputs]``; None when it is so everywhere.

    An output whose weights are all zero was masked as a whole, and keeps its bias too.
    """
    if bool((weight != 0).all()):
        return None
    held = shaped(place.groups, place.transposed, weight) != 0
    return torch.cat([held, held.any(1, keepdim=True)], dim=1)


def passes_of(layers: Sequence[Layer], count: int, memory: int) -> list[list[Layer]]:
    """Divide layers into runs of neighbours that are repaired in one pass over the data.

    Args:
        layers: In the order of their calls.
        count: How many passes are wanted.
        memory: Bytes that the moments of one pass may take; more passes are made where they would not fit.
    """
    result: list[list[Layer]] = []
    used = 0
    for number, layer in enumerate(layers):
        own = 2 * 8 * layer.elements
        begins = number * count // len(layers) != (number - 1) * count // len(layers)
        if begins or used + own > memory or not result:
            result.append([])
            used = 0
        result[-1].append(layer)
        used += own
    return result
