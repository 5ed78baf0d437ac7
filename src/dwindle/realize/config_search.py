"""Finds the integers of a config that give a model its sizes, with the model's own class as the judge."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import count

from dwindle.realize.blueprint import Blueprint, Setting, Size, Sizes, label_of, settings_of

_Values = dict[Setting, int]
_WIDTH = 12
_SECOND = 96


class NotDescribedError(Exception):
    """No config describes the model, and why."""


def observables(sizes: Sizes, target: Sizes) -> Sizes:
    """The sizes that count: those that the target names, and every tensor."""
    return {key: size for key, size in sizes.items() if key in target or key[0] == "tensor"}


class ConfigSearch:
    """What the integers of a config do, and which of them give a wanted model.

    Args:
        blueprint: Builds the model's class.
        target: The wanted sizes; every tensor of the model is among them.
    """

    def __init__(self, blueprint: Blueprint, target: Sizes) -> None:
        self.blueprint = blueprint
        self.target = target
        base = blueprint.sizes({})
        if base is None:
            raise NotDescribedError(f"{blueprint.name} cannot be built from its own config")
        self.base = base
        self.present: dict[Setting, int | None] = dict(settings_of(blueprint.config))
        self.responses: dict[Setting, tuple[int, Sizes]] = {}
        for setting, number in self.present.items():
            found = blueprint.response(setting, number)
            if found is not None and any(
                found[1].get(key) != size for key, size in base.items() if key in target
            ):
                self.responses[setting] = found

    def signature(self, key: Size) -> tuple[tuple[Setting, int | None], ...]:
        """How a size answers to every integer; empty where nothing changes it."""
        own = self.base.get(key)
        return tuple(
            (setting, sizes.get(key))
            for setting, (_, sizes) in self.responses.items()
            if sizes.get(key) != own
        )

    def check_uniform(self) -> None:
        """Refuse a target in which one integer would need two values.

        Raises:
            NotDescribedError: Naming two sizes and the integers that size both.
        """
        groups: dict[object, Size] = {}
        for key, wanted in self.target.items():
            if key not in self.base or key[0] == "list":
                continue
            signature = self.signature(key)
            if not signature:
                if wanted != self.base[key]:
                    raise NotDescribedError(f"{_name(key)} is {wanted} now, and no setting sizes it")
                continue
            first = groups.setdefault((self.base[key], signature), key)
            if self.target[first] != wanted:
                settings = ", ".join(label_of(setting) for setting, _ in signature)
                raise NotDescribedError(
                    f"{_name(first)} is {self.target[first]} and {_name(key)} is {wanted}, "
                    f"but {settings} gives both the same size"
                )

    def mismatches(self, values: Mapping[Setting, int]) -> dict[Size, tuple[int | None, int | None]] | None:
        """Sizes that differ from the target; None where the class refuses the config."""
        sizes = self.blueprint.sizes(values)
        if sizes is None:
            return None
        have = observables(sizes, self.target)
        return {
            key: (have.get(key), self.target.get(key))
            for key in {**have, **self.target}
            if have.get(key) != self.target.get(key)
        }

    def solutions(self) -> Iterator[_Values]:
        """Yield configs that give exactly the wanted sizes, the nearest first, until the builds are used up."""
        numbers = count()
        first = self.mismatches({})
        assert first is not None  # the unchanged config was built in the constructor
        queue: list[tuple[int, int, int, _Values]] = [(len(first), 0, next(numbers), {})]
        seen: set[frozenset[tuple[Setting, int]]] = {frozenset()}
        while queue and self.blueprint.remaining > 0:
            left, _, _, values = heapq.heappop(queue)
            if not left:
                yield values
                continue
            wrong = self.mismatches(values) or {}
            for setting, number in self._proposals(values, wrong):
                trial = {**values, setting: number}
                if number == self.present[setting]:
                    del trial[setting]
                key = frozenset(trial.items())
                if key in seen:
                    continue
                seen.add(key)
                found = self.mismatches(trial)
                if found is not None:
                    heapq.heappush(queue, (len(found), len(trial), next(numbers), trial))

    def _proposals(
        self, values: _Values, wrong: Mapping[Size, tuple[int | None, int | None]]
    ) -> list[tuple[Setting, int]]:
        """Single changes that would mend some of what is wrong, those that mend the most first."""
        votes: Counter[tuple[Setting, int]] = Counter()
        for key, (have, want) in wrong.items():
            if have is None or want is None or have <= 0 or want <= 0:
                continue
            for setting, (tried, sizes) in self.responses.items():
                answer = sizes.get(key)
                if answer is None or answer == self.base.get(key):
                    continue
                for number in self._values_for(setting, values, key, have, want, tried, answer):
                    if number.denominator == 1 and number > 0:
                        votes[setting, int(number)] += 1
        return [proposal for proposal, _ in votes.most_common(_WIDTH)]

    def _values_for(
        self, setting: Setting, values: _Values, key: Size, have: int, want: int, tried: int, answer: int
    ) -> set[Fraction]:
        """Values of one integer that would give one size, if it grows linearly with it or shrinks with it."""
        present = self.present[setting]
        if present is None:
            second = self.blueprint.sizes({setting: _SECOND})
            other = None if second is None else second.get(key)
            if other is None or other == answer:
                return set()
            return {tried + Fraction(want - answer) * (_SECOND - tried) / (other - answer)}
        now = values.get(setting, present)
        slope = Fraction(answer - self.base[key], tried - present)
        return {Fraction(now * want, have), Fraction(now * have, want), now + Fraction(want - have) / slope}


def _name(key: Size) -> str:
    kind, path, *rest = key
    if kind in ("tensor", "computed"):
        return f"{path}[{rest[0]}]"
    if kind == "list":
        return f"the length of {path}"
    return f"{path}.{rest[0]}" + ("" if rest[1] is None else f"[{rest[1]}]")
