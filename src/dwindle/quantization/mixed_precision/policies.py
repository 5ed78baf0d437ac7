"""How activations get their bits, and the problem that this makes of a model.

``strict``: weights that read the same values, and these values, all have the same bits (NNCF's strict mode).
``liberal``: every weight by itself; what layers read has the fewest bits of the weights that read it (NNCF's
liberal mode).
``sensitive``: what layers read has bits of its own, by its own curvature and rounding error (HAWQ-v2).
A number: all activations have so many bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.quantization.mixed_precision.allocation import Allocation, Assignment, Term, Variable
from dwindle.quantization.mixed_precision.layers import Activation, Layer, Structure, Unions
from dwindle.quantization.mixed_precision.perturbation import Errors

POLICIES = ("liberal", "strict", "sensitive")


def check_policy(policy: str | int) -> None:
    """Raise ConfigError when there is no such policy."""
    if isinstance(policy, str):
        if policy not in POLICIES:
            hint = did_you_mean(policy, POLICIES)
            raise ConfigError(
                f"activations {policy!r} is not one of {', '.join(POLICIES)}, nor a number of bits{hint}"
            )
    elif isinstance(policy, bool) or not 2 <= policy <= 16:
        raise ConfigError(f"activations: {policy!r} is not a number of bits from 2 to 16")


@dataclass(frozen=True)
class Posed:
    """A model's choice of bits as a problem.

    Attributes:
        problem: The numbers.
        layer_of: The variable of each layer's weight.
        policy: How activations get their bits.
        structure: The model.
    """

    problem: Allocation
    layer_of: tuple[int, ...]
    policy: str | int
    structure: Structure

    def layer_bits(self, bits: Assignment) -> list[int]:
        """Return the bits of every layer's weight."""
        return [bits[0][variable] for variable in self.layer_of]

    def activation_bits(self, bits: Assignment) -> list[int]:
        """Return the bits of every activation."""
        weights = self.layer_bits(bits)
        found = []
        for own in self.structure.activations:
            if own.fixed or self.policy == "sensitive":
                found.append(bits[1][own.number])
            elif isinstance(self.policy, int):
                found.append(self.policy)
            else:
                found.append(min(weights[place] for place in readers(self.structure, own)))
        return found


def readers(structure: Structure, activation: Activation) -> list[int]:
    """Return the places of the layers that read an activation."""
    return [place for place, own in enumerate(structure.layers) if activation.number in own.activations]


def pose(
    structure: Structure,
    bits: Sequence[int],
    policy: str | int,
    cost: str,
    harms: Errors,
    activation_harms: Errors | None = None,
) -> Posed:
    """Return the problem of a model.

    Args:
        structure: The model.
        bits: What may be chosen.
        policy: How activations get their bits.
        cost: ``bit_operations`` or ``size``.
        harms: Harm of each layer's weight by bits; of one that is not free only at its own.
        activation_harms: The same of activations, for ``sensitive``.

    Raises:
        ConfigError: Weights that must have the same bits were given different ones.
    """
    units = _units(structure, policy)
    layer_of = [0] * len(structure.layers)
    weights = []
    for number, places in enumerate(units):
        for place in places:
            layer_of[place] = number
        weights.append(
            _weight([structure.layers[place] for place in places], [harms[place] for place in places], bits)
        )
    activations = tuple(_activation(own, bits, policy, activation_harms) for own in structure.activations)
    terms = tuple(_term(structure, layer, layer_of[place]) for place, layer in enumerate(structure.layers))
    return Posed(Allocation(tuple(weights), activations, terms, cost), tuple(layer_of), policy, structure)


def pose_without_harm(structure: Structure, bits: Sequence[int], policy: str | int, cost: str) -> Posed:
    """Return the problem of a model of which only the cost is known: for a search, or to see what can be reached.

    Args:
        structure: The model.
        bits: What may be chosen.
        policy: How activations get their bits; ``sensitive`` makes them variables of their own.
        cost: ``bit_operations`` or ``size``.

    Raises:
        ConfigError: As in :func:`pose`.
    """
    weights: Errors = [dict.fromkeys(bits if own.is_free else (own.bits,), 0.0) for own in structure.layers]
    return pose(
        structure, bits, policy, cost, weights, [dict.fromkeys(bits, 0.0) for _ in structure.activations]
    )


def _units(structure: Structure, policy: str | int) -> list[list[int]]:
    """Return the places of the layers that share their bits."""
    unions = Unions()
    if policy == "strict":
        for activation in structure.activations:
            own = [] if activation.fixed else readers(structure, activation)
            for place in own[1:]:
                unions.unite(own[0], place)
    return unions.sets(range(len(structure.layers)))


def _weight(layers: list[Layer], harms: Errors, bits: Sequence[int]) -> Variable:
    given = {layer.bits: layer.name for layer in layers if not layer.is_free}
    if len(given) > 1:
        said = ", ".join(f"{name} has {own} bits" for own, name in given.items())
        raise ConfigError(f"these weights read the same values and must have the same bits (strict): {said}")
    choices = list(given) or list(bits)
    harm = {own: sum(known.get(own, 0.0) for known in harms) for own in choices}
    return Variable(", ".join(layer.name for layer in layers), harm)


def _activation(own: Activation, bits: Sequence[int], policy: str | int, harms: Errors | None) -> Variable:
    if own.fixed:
        return Variable(own.name, {own.form.bits: 0.0})
    if policy == "sensitive":
        assert harms is not None
        return Variable(own.name, {number: harms[own.number][number] for number in bits})
    # Never more bits than the weights that read it, so that they alone decide over the cost.
    return Variable(own.name, {policy if isinstance(policy, int) else 0: 0.0})


def _term(structure: Structure, layer: Layer, variable: int) -> Term:
    reads = structure.reads()
    macs: dict[int, int] = {}
    for key in layer.calls:
        number = reads[key][1].number
        macs[number] = macs.get(number, 0) + structure.macs[key]
    return Term(variable, macs, layer.size)


__all__ = ["POLICIES", "Posed", "check_policy", "pose", "pose_without_harm", "readers"]
