"""``uniform=True``: only cuts that the model's own config can describe.

Two sizes that answer alike to every integer of the config are the same function of it, so they must stay equal;
two sizes that one and the same integer gives stay in their relation. These are constraints between counts, beside
those of the code. What the config computes anew (rotation frequencies) is checked when indices are chosen.
"""

from __future__ import annotations

import itertools
from fractions import Fraction
from math import lcm

import torch
from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.graph.analysis import Analysis, AxisInfo
from dwindle.graph.axes import Axis
from dwindle.graph.counts import count_of, summed_size
from dwindle.graph.expressions import Operation
from dwindle.graph.positions import kept_positions
from dwindle.realize.blueprint import Setting, Size, Sizes
from dwindle.realize.config_search import ConfigSearch, NotDescribedError
from dwindle.realize.configuration import blueprint_of

_WHERE = "the model's config"
_MOST_MORE = 17
_MOST_TRIALS = 150


class Uniformity:
    """Constraints that keep a model within what its config can describe.

    Args:
        model: The model, before the cut.
        analysis: Its axes.

    Raises:
        ConfigError: The model has no config that builds it.
    """

    def __init__(self, model: nn.Module, analysis: Analysis) -> None:
        blueprint = blueprint_of(model)
        if blueprint is None:
            raise ConfigError(
                f"uniform: {type(model).__name__} has no config that builds it (with to_dict, beside "
                "save_pretrained), so there is nothing to be uniform for"
            )
        self.model, self.analysis, self.blueprint = model, analysis, blueprint
        self.axes = _observables(model, analysis)
        sizes = {key: sum(axis.size for axis in axes) for key, axes in self.axes.items()}
        try:
            self.search = ConfigSearch(blueprint, sizes)
        except NotDescribedError as error:
            raise ConfigError(f"uniform: {error}") from error
        for key, size in sizes.items():
            if self.search.base.get(key) != size:
                raise ConfigError(
                    f"uniform: {type(model).__name__}(config) does not build {key[1]!r} as it is in this model"
                )
        self.solver = analysis.solver.extended()
        self._constrain()
        #: Constraints behind these may be taken back.
        self.lasting = len(self.solver.constraints)

    def _constrain(self) -> None:
        groups: dict[tuple[int, object], Size] = {}
        single: dict[Setting, Size] = {}
        for key in self.axes:
            signature = self.search.signature(key)
            if not signature:
                self._keep(key)
                continue
            identity = (self.search.base[key], signature)
            if identity in groups:
                self._equal(groups[identity], key)
                continue
            groups[identity] = key
            setting, answer = signature[0]
            # no answer: the integer that was tried builds the model without this tensor
            if len(signature) == 1 and answer is not None and self.search.present[setting] is not None:
                if setting in single:
                    self._related(setting, single[setting], key)
                else:
                    single[setting] = key

    def _keep(self, key: Size) -> None:
        """It must stay as it is."""
        self.solver.require(self.search.base[key], self.axes[key], _WHERE)

    def _equal(self, first: Size, second: Size) -> None:
        one, other = self.axes[first], self.axes[second]
        if [axis.find() for axis in one] != [axis.find() for axis in other]:
            self.solver.require(summed_size(one), other, _WHERE)

    def _related(self, setting: Setting, first: Size, second: Size) -> None:
        """Two linear functions of one integer: ``a (x - p) = b (y - q)`` in whole numbers."""
        present = self.search.present[setting]
        assert present is not None  # only such settings are related
        tried, answers = self.search.responses[setting]
        lines = []
        for key in (first, second):
            base = self.search.base[key]
            slope = Fraction(answers[key] - base, tried - present)
            lines.append((slope, base - slope * present))
        (a, p), (b, q) = lines
        whole = lcm(a.denominator, b.denominator, (b * p).denominator, (a * q).denominator)
        left = Operation("mul", (summed_size(self.axes[first]), int(b * whole)))
        right = Operation("mul", (summed_size(self.axes[second]), int(a * whole)))
        left = Operation("sub", (left, int(b * p * whole)))
        right = Operation("sub", (right, int(a * q * whole)))
        self.solver.require(left, right, _WHERE)

    def joined(self, wanted: list[AxisInfo], allowed: list[AxisInfo]) -> list[AxisInfo]:
        """Return the axes to shrink and those that the config makes go with them.

        Args:
            wanted: The axes that the caller chose.
            allowed: The axes that may join them.
        """
        chosen = {info.axis for info in wanted}
        free = {info.axis for info in allowed}
        ties = [
            c.leaves for c in self.solver.constraints if c.where == _WHERE and not isinstance(c.left, int)
        ]
        before = -1
        while before != len(chosen):
            before = len(chosen)
            for leaves in ties:
                if any(leaf in chosen for leaf in leaves):
                    chosen.update(leaf for leaf in leaves if leaf in free)
        return [info for info in self.analysis.axes if info.axis in chosen]

    def accepts(self, keep: dict[Axis, torch.Tensor]) -> bool:
        """Whether what the config computes anew fits the kept indices; otherwise constraints are added.

        Args:
            keep: Which indices of each cut leaf stay.
        """
        counts = {leaf: int(chosen.sum()) for leaf, chosen in keep.items()}
        target: Sizes = {key: size for key, size in self.search.base.items() if key[0] in ("tensor", "list")}
        for key, axes in self.axes.items():
            target[key] = sum(count_of(axis, counts) for axis in axes)
        search = self.search.aimed_at(target)
        values = next(search.solutions(), None)
        if values is None:
            # what nothing gives, the note of the result will say
            return search.refused is None or not self._widen(search.refused)
        if not values:
            return True
        computed = _computed(self.model)
        built = _computed(self.blueprint.build(values, "cpu"))
        odd = [
            name
            for name, tensor in built.items()
            if name in computed and not self._fits(name, computed[name], tensor, keep)
        ]
        culprits = [setting for setting in values if odd and self._changes(setting, odd, computed)]
        if not culprits:
            return True
        self._withdraw()
        for setting in culprits:
            alone = [key for key in self.axes if [own for own, _ in self.search.signature(key)] == [setting]]
            every = [key for key in self.axes if setting in dict(self.search.signature(key))]
            for key in alone or every:
                self._keep(key)
        self.lasting = len(self.solver.constraints)
        return False

    def _withdraw(self) -> None:
        """Take back what :meth:`_widen` asked for: it was for another choice of sizes."""
        del self.solver.constraints[self.lasting :]

    def _widen(self, values: dict[Setting, int]) -> bool:
        """Ask for more, with which the class accepts a config that it refuses; whether there is such a thing.

        One integer may be larger by a little; otherwise as few integers as possible stay as they are.
        """
        self._withdraw()
        present = self.search.present
        trials: list[dict[Setting, int]] = []
        for more in range(1, _MOST_MORE):
            for setting, number in values.items():
                limit = present[setting]
                if limit is None or number + more < limit:
                    trials.append({**values, setting: number + more})
        for count in range(1, len(values) + 1):
            for chosen in itertools.combinations(values, count):
                trials.append(
                    {setting: number for setting, number in values.items() if setting not in chosen}
                )
        for trial in trials[:_MOST_TRIALS]:
            if self.blueprint.sizes(trial) is not None:
                changed = {setting for setting in values if trial.get(setting) != values[setting]}
                sizes = self.search.predicted(trial)
                for key, axes in self.axes.items():
                    if changed.intersection(dict(self.search.signature(key))):
                        self.solver.require(sizes[key], axes, _WHERE)
                return True
        return False

    def _fits(
        self, name: str, own: torch.Tensor, tensor: torch.Tensor, keep: dict[Axis, torch.Tensor]
    ) -> bool:
        """Whether a buffer that the config computes has the numbers that the cut leaves of the present one."""
        axes = self.analysis.parameter_axes.get(name)
        for dim, axis in enumerate(axes or []):
            index = kept_positions(axis, keep, self.analysis.memory)
            if index is not None:
                own = own.index_select(dim, index.to(own.device))
        return own.shape == tensor.shape and torch.equal(own.cpu(), tensor)

    def _changes(self, setting: Setting, names: list[str], before: dict[str, torch.Tensor]) -> bool:
        """Whether an integer changes the numbers in any of the named buffers, and not only how many there are."""
        after = _computed(self.blueprint.build({setting: self.search.responses[setting][0]}, "cpu"))
        for name in names:
            old, new = before[name], after.get(name)
            if new is None or old.dim() != new.dim():
                return True
            common = tuple(slice(0, min(pair)) for pair in zip(old.shape, new.shape, strict=True))
            if not torch.equal(old[common].cpu(), new[common]):
                return True
        return False


def _computed(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that are not saved with the weights."""
    saved = set(model.state_dict())
    return {name: tensor for name, tensor in model.named_buffers() if name not in saved}


def _observables(model: nn.Module, analysis: Analysis) -> dict[Size, list[Axis]]:
    """Every size that the small model will have, as the axes that add up to it."""
    found: dict[Size, list[Axis]] = {}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        own = first.setdefault(id(tensor), name)  # tied weights have several names
        for dim, axis in enumerate(analysis.parameter_axes.get(own, [])):
            if axis.size > 1:
                found["tensor", name, dim] = [axis]
    paths = {id(module): path for path, module in model.named_modules()}
    for attribute, axes in analysis.solver.definitions.items():
        if attribute.owner in paths and sum(axis.size for axis in axes) == attribute.number:
            found["attribute", paths[attribute.owner], attribute.key, attribute.index] = axes
    return found
