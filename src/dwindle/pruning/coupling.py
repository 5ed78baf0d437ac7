"""What an analysis of the model says to a pruner: which channels go together, which must stay, what follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config import Target
from dwindle.config.granularity import weight_axes
from dwindle.graph.rounding import count_steps

#: Classes whose weights read the channels of their input dimension.
READERS = ("_ConvNd", "Linear", "Conv1D", "Bilinear", "MultiheadAttention", "RNNBase", "RNNCellBase")


class Coupling:
    """An analysis with the modules that own its parameters.

    Args:
        model: The model.
        analysis: What :func:`dwindle.graph.analyse` gave for it.
        excluded: Modules whose parameters must stay whole.
    """

    def __init__(self, model: nn.Module, analysis: Any, excluded: Iterable[str] = ()) -> None:
        self.analysis = analysis
        self.excluded = set(excluded)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.infos = {info.id: info for info in analysis.axes}
        self._known: dict[int, str] = {}
        self._steps: dict[int, dict[Any, int]] = {}
        for path in analysis.parameter_axes:
            parameter = self._parameter(path)[0]
            if parameter is not None:
                self._known.setdefault(id(parameter), path)

    def path_of(self, target: Target) -> str:
        """Return the name that the analysis has for a parameter: a tied one has a name in each of its modules."""
        return self._known.get(id(self._parameter(target.path)[0]), target.path)

    def knows(self, target: Target) -> bool:
        """Return whether the analysis followed this parameter."""
        return self.path_of(target) in self.analysis.parameter_axes

    def axes_of(self, target: Target, dim: int) -> tuple[list[tuple[Any, Tensor]], str | None]:
        """Return the axes of a dimension that may be masked, and why the rest of it must stay.

        Args:
            target: A parameter.
            dim: A dimension of it.

        Returns:
            Axes with the index that each position has on them (-1 is none), and a reason or None.
        """
        path = self.path_of(target)
        ids, index = self.analysis.units(path, dim)
        members = [
            (self.infos[axis], torch.where(ids == axis, index, -1))
            for axis in ids.unique().tolist()
            if axis >= 0
        ]
        if not bool((ids < 0).any()):
            return members, None
        leaves = self.analysis.positions(path, dim)
        known = [
            (self.analysis.by_axis[leaf], own)
            for leaf, own in leaves.items()
            if leaf in self.analysis.by_axis
        ]
        if not members and len(known) == len(leaves) == 1:
            info, own = known[0]
            # Too small to be chosen by default, or a literal size, which a rewritten graph can change: maskable.
            if info.frozen_reason is None or "literal" in info.frozen_reason:
                return [(info, own)], None
        rest = ids < 0
        reasons = [
            info.frozen_reason for info, own in known if info.frozen_reason and bool((own[rest] >= 0).any())
        ]
        return members, reasons[0] if reasons else None

    def is_reader(self, path: str, dim: int) -> bool:
        """Return whether a parameter reads the channels of a dimension, rather than makes or shifts them."""
        parameter, module = self._parameter(path)
        if parameter is None or parameter.dim() < 2:
            return False
        names = {base.__name__ for base in type(module).__mro__}
        if not names.intersection(READERS):
            return False
        out_axis, in_axis = weight_axes(type(module), parameter.dim())
        return dim == in_axis != out_axis

    def held_by(self, info: Any, members: Mapping[Target, Tensor]) -> str | None:
        """Return a parameter of an excluded module that makes the same channels; None when there is none."""
        own = {self.path_of(target) for target in members}
        for path, dim in info.parameter_dims:
            excluded = path.rpartition(".")[0] in self.excluded and path not in own
            if excluded and self._parameter(path)[0] is not None and not self.is_reader(path, dim):
                return str(path)
        return None

    def count_step(self, info: Any, multiple: int) -> int:
        """Return of what the count of an axis must be a multiple, so that sizes of weights are one of ``multiple``."""
        if multiple not in self._steps:
            self._steps[multiple] = count_steps(self.analysis, multiple)
        return self._steps[multiple].get(info.axis, multiple)

    def solved(self, counts: dict[Any, int], multiples: Mapping[Any, int]) -> dict[Any, int]:
        """Return counts for axes that satisfy every constraint between sizes, none below what was asked.

        Args:
            counts: What is wanted of each axis.
            multiples: Of what each count should be a multiple.
        """
        candidates = {
            axis: count for axis, count in counts.items() if axis in self.analysis.solver.candidates
        }
        repaired = self.analysis.solver.solve(candidates, multiples) if candidates else {}
        return {**counts, **{axis: repaired[axis] for axis in candidates}}

    def followers(
        self, info: Any, keep: Tensor, ranked: set[tuple[str, int]]
    ) -> dict[Target, dict[int, Tensor]]:
        """Return what else must be masked so that the channels of an axis are exactly zero.

        Args:
            info: The axis.
            keep: Which of its indices stay.
            ranked: Parameters and dimensions that are masked already.

        Returns:
            For each parameter that makes or shifts these channels (other layers of the branch, depthwise
            convolutions, biases, norms), the positions that stay by dimension.
        """
        found: dict[Target, dict[int, Tensor]] = {}
        for path, dim in info.parameter_dims:
            if (path, dim) in ranked or self._parameter(path)[0] is None or self.is_reader(path, dim):
                continue
            index = self.analysis.positions(path, dim)[info.axis]
            stays = keep.cpu()[index.clamp(min=0)] | (index < 0)
            module, _, name = path.rpartition(".")
            found.setdefault(Target(module, name), {})[dim] = stays
        return found

    def _parameter(self, path: str) -> tuple[nn.Parameter | None, nn.Module | None]:
        module_name, _, name = path.rpartition(".")
        module = self.modules.get(module_name)
        # of a scripted module it is no dict
        held = dict(module._parameters.items()) if module is not None else {}
        return held.get(name), module
