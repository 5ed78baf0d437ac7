"""Finds the integers of a config that give a model its sizes, with the model's own class as the judge."""

from __future__ import annotations

import copy
import heapq
from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import count
from typing import Any

from dwindle.realize.blueprint import Blueprint, Setting, Size, Sizes, label_of, settings_of

_Values = dict[Setting, int]
_WIDTH = 12
_SECOND = 96
_MOST_TRIES = 80


class NotDescribedError(Exception):
    """No config describes the model, and why.

    Args:
        reason: Why.
        final: Whether no other config with the same sizes could do better.
    """

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


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
        self._signatures: dict[Size, tuple[tuple[Setting, int | None], ...]] = {}
        for setting, number in self.present.items():
            found = blueprint.response(setting, number)
            if found is not None and any(
                found[1].get(key) != size for key, size in base.items() if key in target
            ):
                self.responses[setting] = found

    def aimed_at(self, target: Sizes) -> ConfigSearch:
        """Return a search for another target; what the integers do need not be observed again."""
        twin = copy.copy(self)
        twin.target = target
        return twin

    def signature(self, key: Size) -> tuple[tuple[Setting, int | None], ...]:
        """How a size answers to every integer; empty where nothing changes it."""
        found = self._signatures.get(key)
        if found is None:
            own = self.base.get(key)
            found = self._signatures[key] = tuple(
                (setting, sizes.get(key))
                for setting, (_, sizes) in self.responses.items()
                if sizes.get(key) != own
            )
        return found

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

    def mismatches(
        self, values: Mapping[Setting, int], *, build: bool
    ) -> tuple[bool | None, dict[Size, tuple[int | None, int | None]]]:
        """Whether the class builds a config (None: not tried), and the sizes that differ from the target.

        Args:
            values: The config.
            build: Build it in any case. Otherwise only a config that should give the target is built, and others
                are judged by their predicted sizes, as those are that the class refuses: its reason may be a check
                of two integers of which one is not yet as it will be.
        """
        sizes = self.blueprint.sizes(values) if build else None
        wrong = self._wrong(self.predicted(values) if sizes is None else sizes)
        if build or wrong:
            return (sizes is not None if build else None), wrong
        sizes = self.blueprint.sizes(values)
        return (False, wrong) if sizes is None else (True, self._wrong(sizes))

    def _wrong(self, sizes: Sizes) -> dict[Size, tuple[int | None, int | None]]:
        have = observables(sizes, self.target)
        return {
            key: (have.get(key), self.target.get(key))
            for key in {**have, **self.target}
            if have.get(key) != self.target.get(key)
        }

    def predicted(self, values: Mapping[Setting, int]) -> Sizes:
        """Sizes for a config, if every size is a product of what its integers were seen to do."""
        found = dict(self.base)
        known: dict[tuple[int, Any], int] = {}
        for key in self.target:
            signature = self.signature(key) if key in found else ()
            if not signature:
                continue
            alike = found[key], signature
            if alike not in known:
                known[alike] = self._product(found[key], signature, values)
            found[key] = known[alike]
        return found

    def _product(
        self, base: int, signature: tuple[tuple[Setting, int | None], ...], values: Mapping[Setting, int]
    ) -> int:
        """One size, from what each integer alone was seen to make of it."""
        number, offset = Fraction(base), Fraction(0)
        for setting, answer in signature:
            present, tried = self.present[setting], self.responses[setting][0]
            now = values.get(setting, present)
            if answer is None or now is None or now == present:
                continue
            if present is None:
                return int(Fraction(now * answer, tried))
            if answer * present == base * tried:
                number *= Fraction(now, present)
            elif answer * tried == base * present:
                number *= Fraction(present, now)
            else:
                offset += Fraction(answer - base, tried - present) * (now - present)
        return int(number + offset)

    def solutions(self) -> Iterator[_Values]:
        """Yield configs that give exactly the wanted sizes, the nearest first, until the tries are used up.

        A config that should give them but that the class refuses ends the search; it stays in ``refused``.
        """
        self.refused: _Values | None = None
        found = False
        for values, builds in self._search(build=False):
            if not builds:
                self.refused = values
                return
            found = True
            yield values
        if not found:
            yield from (values for values, _ in self._search(build=True))

    def _search(self, *, build: bool) -> Iterator[tuple[_Values, bool]]:
        numbers = count()
        queue: list[tuple[int, int, int, bool | None, _Values, dict[Size, Any]]] = []
        seen: set[frozenset[tuple[Setting, int]]] = set()

        def enter(values: _Values) -> None:
            key = frozenset(values.items())
            if key not in seen:
                seen.add(key)
                builds, wrong = self.mismatches(values, build=build)
                heapq.heappush(queue, (len(wrong), len(values), next(numbers), builds, values, wrong))

        enter({})
        while queue and self.blueprint.remaining > 0 and len(seen) < _MOST_TRIES:
            left, _, _, builds, values, wrong = heapq.heappop(queue)
            if not left:
                yield values, bool(builds)
                continue
            for setting, number in self._proposals(values, wrong):
                trial = {**values, setting: number}
                if number == self.present[setting]:
                    del trial[setting]
                enter(trial)

    def _proposals(
        self, values: _Values, wrong: Mapping[Size, tuple[int | None, int | None]]
    ) -> list[tuple[Setting, int]]:
        """Single changes that would mend some of what is wrong, those that mend the most first."""
        votes: Counter[tuple[Setting, int]] = Counter()
        alike: Counter[tuple[int, int, Any]] = Counter()
        example: dict[tuple[int, int, Any], Size] = {}
        for key, (have, want) in wrong.items():
            if have is not None and want is not None and have > 0 and want > 0 and key in self.base:
                identity = have, want, (self.base[key], self.signature(key))
                alike[identity] += 1
                example[identity] = key
        for identity, number_of in alike.items():
            have, want, (_, signature) = identity
            for setting, answer in signature:
                if answer is None:
                    continue
                tried = self.responses[setting][0]
                for number in self._values_for(setting, values, example[identity], have, want, tried, answer):
                    if number.denominator == 1 and number > 0:
                        votes[setting, int(number)] += number_of
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
