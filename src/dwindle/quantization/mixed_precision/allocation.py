"""The problem of choosing bits, as numbers: what may be chosen, what it costs, and what it harms.

Variables are *weights* (units of layers that share their bits) and *activations* (what layers read). The harm is a sum
over variables; so is the size. Bit operations are a sum over layers of multiplications times the larger of the two
numbers of bits, which is how HAWQ and NNCF count them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.quantization.mixed_precision.layers import Unions

COSTS = ("bit_operations", "size")
REFERENCE_BITS = 8
"""A compression ratio compares with everything in so many bits."""


@dataclass(frozen=True)
class Variable:
    """What gets one number of bits.

    Attributes:
        name: For messages.
        harm: The harm of each number of bits that it may get.
    """

    name: str
    harm: dict[int, float]

    @property
    def choices(self) -> tuple[int, ...]:
        """The bits it may get."""
        return tuple(self.harm)


@dataclass(frozen=True)
class Term:
    """One layer's part of the cost.

    Attributes:
        weight: Number of the variable of its weight.
        activations: Multiplications by the number of the activation's variable that they read.
        size: Number of weights.
    """

    weight: int
    activations: dict[int, int]
    size: int


Assignment = tuple[tuple[int, ...], tuple[int, ...]]
"""Bits of every weight variable, and of every activation variable."""


@dataclass(frozen=True)
class Allocation:
    """A problem.

    Attributes:
        weights: Variables of weights.
        activations: Variables of activations.
        terms: The layers.
        cost: ``bit_operations`` or ``size``.
    """

    weights: tuple[Variable, ...]
    activations: tuple[Variable, ...]
    terms: tuple[Term, ...]
    cost: str = "bit_operations"

    def __post_init__(self) -> None:
        if self.cost not in COSTS:
            raise ConfigError(
                f"cost {self.cost!r} is not one of {', '.join(COSTS)}{did_you_mean(self.cost, COSTS)}"
            )

    def cost_of(self, bits: Assignment) -> int:
        """Return bit operations or bits of all layers."""
        return sum(self.term_cost(term, bits[0][term.weight], bits[1]) for term in self.terms)

    def term_cost(self, term: Term, weight: int, activations: Sequence[int]) -> int:
        """Return the cost of one layer."""
        if self.cost == "size":
            return term.size * weight
        return sum(macs * max(weight, activations[read]) for read, macs in term.activations.items())

    def harm_of(self, bits: Assignment) -> float:
        """Return the harm of all variables."""
        variables = (*self.weights, *self.activations)
        return sum(own.harm[number] for own, number in zip(variables, (*bits[0], *bits[1]), strict=True))

    @cached_property
    def reference(self) -> int:
        """What everything costs at 8 bits."""
        if self.cost == "size":
            return sum(term.size for term in self.terms) * REFERENCE_BITS
        return sum(sum(term.activations.values()) for term in self.terms) * REFERENCE_BITS

    def ratio_of(self, bits: Assignment) -> float:
        """Return the compression ratio: what 8 bits cost, as a multiple of what these do."""
        return self.reference / self.cost_of(bits)

    def limit(self, ratio: float) -> int:
        """Return the largest cost at which a ratio is reached.

        Raises:
            ConfigError: The ratio is no positive number, or even the fewest bits do not reach it.
        """
        if not 0 < ratio < float("inf"):
            raise ConfigError(f"ratio {ratio!r} is not a positive number")
        least = self.cost_of(self.cheapest)
        limit = int(self.reference / ratio * (1 + 1e-12))
        if least > limit:
            raise ConfigError(
                f"ratio {ratio:g} cannot be reached: with the fewest bits that may be chosen it is "
                f"{self.reference / least:.4g} ({self.cost})"
            )
        return limit

    @property
    def cheapest(self) -> Assignment:
        """The fewest bits everywhere."""
        return tuple(min(own.choices) for own in self.weights), tuple(
            min(own.choices) for own in self.activations
        )

    def components(self) -> list[tuple[list[int], list[int]]]:
        """Return the numbers of weights and activations that depend on each other, component by component."""
        unions = Unions()
        for term in self.terms:
            for read in term.activations:
                unions.unite(("weight", term.weight), ("activation", read))
        keys = [("weight", own) for own in range(len(self.weights))]
        keys += [("activation", own) for own in range(len(self.activations))]
        return [
            (
                [own for kind, own in found if kind == "weight"],
                [own for kind, own in found if kind == "activation"],
            )
            for found in unions.sets(keys)
        ]

    def all_assignments(self) -> Iterator[Assignment]:
        """Yield every assignment there is (for small problems)."""
        weights = [own.choices for own in self.weights]
        activations = [own.choices for own in self.activations]
        for chosen in itertools.product(*weights, *activations):
            yield chosen[: len(weights)], chosen[len(weights) :]


__all__ = ["COSTS", "REFERENCE_BITS", "Allocation", "Assignment", "Term", "Variable"]
