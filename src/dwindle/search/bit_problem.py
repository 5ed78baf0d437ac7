"""Bits instead of counts: a model whose layers get numbers of bits by trials, on the trial interface of all searches.

A variable is a weight (or several that share their bits), or what layers read; its "count" is its number of bits. A
trial quantizes the model with these bits and scores it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.graph.modes import in_mode
from dwindle.quantization.mixed_precision.allocation import Assignment
from dwindle.quantization.mixed_precision.choose import checked_bits, default_levels, result_of
from dwindle.quantization.mixed_precision.layers import examine
from dwindle.quantization.mixed_precision.policies import Posed, check_policy, pose_without_harm
from dwindle.quantization.mixed_precision.result import MixedPrecision
from dwindle.quantization.quantize import quantize
from dwindle.search.cost import Budget
from dwindle.search.journal import checksum
from dwindle.search.storage import TrialStore
from dwindle.search.trial import Trial, key_of
from dwindle.training.inputs import forward_inputs, input_batches

__all__ = ["BitProblem", "BitSpace", "BitVariable"]

NamedBits = dict[str, int]
Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class BitVariable:
    """What gets one number of bits.

    Attributes:
        name: Of the weights, or of what layers read.
        choices: The bits that it may get, rising.
        facts: What an agent is told of it: outputs, inputs, kernel, positions, weights, multiplications, whether it
            is a weight, whether it is depthwise.
    """

    name: str
    choices: tuple[int, ...]
    facts: tuple[float, ...]

    @property
    def size(self) -> int:
        """The most bits."""
        return self.choices[-1]

    @property
    def largest_ratio(self) -> float:
        """The largest share of the bits that may go."""
        return 1 - self.choices[0] / self.size

    @property
    def extent(self) -> int:
        """Number of weights, or of multiplications where it is no weight."""
        return int(self.facts[4] or self.facts[5])

    def nearest(self, bits: float) -> int:
        """Return the choice nearest to a number of bits (of two equally near, the larger)."""
        return min(self.choices, key=lambda own: (abs(own - bits), -own))

    def next_below(self, bits: int) -> int:
        """Return the next smaller choice, or the same where there is none."""
        return max((own for own in self.choices if own < bits), default=bits)

    def next_above(self, bits: int) -> int:
        """Return the next larger choice, or the same where there is none."""
        return min((own for own in self.choices if own > bits), default=bits)


class BitSpace:
    """All variables of a model.

    Args:
        variables: In the order of use.
    """

    def __init__(self, variables: Sequence[BitVariable]) -> None:
        self.variables = tuple(variables)

    def full(self) -> NamedBits:
        """The most bits everywhere."""
        return {own.name: own.size for own in self.variables}

    def smallest(self) -> NamedBits:
        """The fewest bits everywhere."""
        return {own.name: own.choices[0] for own in self.variables}

    def named(self, bits: Mapping[str, int]) -> NamedBits:
        """Return bits by name."""
        return dict(bits)

    from_names = named

    def ratios(self, bits: Mapping[str, int]) -> dict[str, float]:
        """Return the share of the bits of each variable that goes."""
        return {own.name: 1 - bits[own.name] / own.size for own in self.variables}

    def lowered(
        self, bits: Mapping[str, int], cost: Callable[[NamedBits], float], budget: float
    ) -> NamedBits:
        """Take bits away from the last variable to the first, again and again, until the budget is met (HAQ, AutoQ).

        Raises:
            ConfigError: Not even the fewest bits meet it.
        """
        found = dict(bits)
        while cost(found) > budget:
            before = dict(found)
            for variable in reversed(self.variables):
                found[variable.name] = variable.next_below(found[variable.name])
                if cost(found) <= budget:
                    break
            if found == before:
                raise ConfigError(f"the fewest bits cost {cost(found):g}, more than the budget of {budget:g}")
        return found

    def filled(self, bits: Mapping[str, int], cost: Callable[[NamedBits], float], budget: float) -> NamedBits:
        """Give bits back, to the variable with the fewest first, until no single one fits into the budget."""
        found = dict(bits)
        growing = list(self.variables)
        while growing:
            variable = min(growing, key=lambda own: found[own.name])
            grown = {**found, variable.name: variable.next_above(found[variable.name])}
            if grown != found and cost(grown) <= budget:
                found = grown
            else:
                growing.remove(variable)
        return found

    def fit(
        self, ratios: Mapping[str, float], cost: Callable[[NamedBits], float], budget: float
    ) -> NamedBits:
        """Return the bits nearest to shares that go, brought to the budget from either side."""
        wanted = {own.name: own.nearest(own.size * (1 - ratios.get(own.name, 0.0))) for own in self.variables}
        return self.filled(self.lowered(wanted, cost, budget), cost, budget)


class _BitCost:
    """Bit operations or bits, counted."""

    def __init__(self, problem: BitProblem) -> None:
        self.name, self._problem = problem.posed.problem.cost, problem

    def predicted(self, bits: Mapping[str, int]) -> float:
        """Return the cost of bits."""
        return float(self._problem.posed.problem.cost_of(self._problem.assignment(bits)))

    def measured(self, bits: Mapping[str, int], model: nn.Module) -> float:
        """Return the same: nothing needs to be measured."""
        return self.predicted(bits)

    def observe(self, bits: Mapping[str, int], cost: float) -> None:
        """Nothing is learned: the count is exact."""


class BitProblem:
    """A model that gets bits within a budget. The model itself is never changed.

    Args:
        model: A trained float model.
        calibration_data: Batches for :func:`dwindle.quantize`, read in every trial: an iterator is kept as a list.
        evaluate: Score of a quantized model, higher is better.
        ratio: Compression ratio to reach, as in :func:`dwindle.quantization.choose_bits`.
        cost: ``bit_operations`` or ``size``.
        bits: The bits that may be chosen.
        activations: ``"liberal"``, ``"strict"``, ``"sensitive"`` (what layers read gets bits of its own) or a number.
        config_list: Settings for single targets, which stay.
        example_inputs: Arguments to record the model with; the first batch when not given.
        backend: Whose places.
        options: More arguments of :func:`dwindle.quantize` (``weight_range="mse"``, ...).

    Raises:
        ConfigError: An argument is not valid, nothing is free, or the ratio cannot be reached.
    """

    base = ""
    is_measured = False

    def __init__(
        self,
        model: nn.Module,
        calibration_data: Any,
        evaluate: Evaluate,
        *,
        ratio: float = 1.5,
        cost: str = "bit_operations",
        bits: Sequence[int] = (2, 4, 8),
        activations: str | int = "strict",
        config_list: list[dict[str, Any]] | None = None,
        example_inputs: Any = None,
        backend: str = "layers",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        check_policy(activations)
        self.model, self.evaluate = model, evaluate
        self.data = list(calibration_data) if iter(calibration_data) is calibration_data else calibration_data
        self.config_list, self.backend, self.options = config_list, backend, dict(options or {})
        example = (
            next(input_batches(model, self.data, name="calibration_data"))
            if example_inputs is None
            else forward_inputs(model, example_inputs, lambda batch: batch)
        )
        structure = examine(model, example, config_list, backend, default_levels(activations))
        self.posed: Posed = pose_without_harm(structure, checked_bits(bits), activations, cost)
        self.limit = float(self.posed.problem.limit(ratio))
        self.space = BitSpace(self._variables())
        if not self.space.variables:
            raise ConfigError("there is no layer whose bits could be chosen")
        self.cost = _BitCost(self)
        self.budget = Budget(cost, self.limit / self.cost.predicted(self.space.full()))

    def _variables(self) -> list[BitVariable]:
        problem, structure = self.posed.problem, self.posed.structure
        found = []
        for number, variable in enumerate(problem.weights):
            layers = [
                layer
                for layer, own in zip(structure.layers, self.posed.layer_of, strict=True)
                if own == number
            ]
            outputs, inputs, *kernel = layers[0].shape
            size, macs = sum(own.size for own in layers), sum(own.macs for own in layers)
            depthwise = float(inputs == 1 and outputs > 1 and bool(kernel))
            facts = (outputs, inputs, math.prod(kernel), macs / size, size, macs, 1.0, depthwise)
            found.append((variable, tuple(map(float, facts))))
        for own, variable in zip(structure.activations, problem.activations, strict=True):
            macs = sum(term.activations.get(own.number, 0) for term in problem.terms)
            found.append((variable, (0.0, 0.0, 0.0, 0.0, 0.0, float(macs), 0.0, 0.0)))
        return [BitVariable(own.name, own.choices, facts) for own, facts in found if len(own.choices) > 1]

    def assignment(self, bits: Mapping[str, int]) -> Assignment:
        """Return the bits of all variables, those that are not free too."""
        problem = self.posed.problem
        weights, activations = (
            tuple(bits.get(own.name, own.choices[0]) for own in variables)
            for variables in (problem.weights, problem.activations)
        )
        return weights, activations

    def described(self, bits: Mapping[str, int]) -> MixedPrecision:
        """Return what bits mean for the model."""
        return result_of(self.posed, self.assignment(bits), self.config_list)

    def identity(self) -> dict[str, Any]:
        """What must agree for stored trials to be valid for this problem."""
        return {
            "model": checksum(self.model.state_dict()),
            "bits": {own.name: list(own.choices) for own in self.space.variables},
            "activations": self.posed.policy,
            "config_list": repr(self.config_list),
            "backend": self.backend,
            "options": {name: repr(value) for name, value in sorted(self.options.items())},
        }

    def prepare(self, store: TrialStore) -> None:
        """Nothing needs to be measured beforehand."""

    def build(self, bits: Mapping[str, int]) -> nn.Module:
        """Return the quantized model."""
        config_list = self.described(bits).config_list
        return quantize(self.model, self.data, config_list=config_list, backend=self.backend, **self.options)

    def assess(self, bits: Mapping[str, int]) -> Trial:
        """Carry out one trial; it has a score of ``-inf`` and the reason where the model has none."""
        started = time.perf_counter()
        score, error = -math.inf, None
        try:
            model = self.build(bits)
            with torch.no_grad(), in_mode(model, training=False):
                score = float(self.evaluate(model))
        except DwindleError as failure:
            error = str(failure)
        if error is None and not math.isfinite(score):
            error, score = f"the score is {score}", -math.inf
        cost, ratios = self.cost.predicted(bits), self.space.ratios(bits)
        seconds = time.perf_counter() - started
        return Trial(key_of(bits), dict(bits), ratios, score, cost, seconds, self.base, error)

    def meets(self, trial: Trial, tolerance: float = 0.0) -> bool:
        """Whether a trial succeeded within the budget."""
        return trial.error is None and trial.cost <= self.limit * (1 + tolerance)
