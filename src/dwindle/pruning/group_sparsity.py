"""Training that makes groups of coupled parameters sparse: the regularizer of DepGraph.

Fang et al., "DepGraph: Towards Any Structural Pruning" (https://arxiv.org/abs/2301.12900, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.graph.analysis import AxisInfo, analyse
from dwindle.pruning.importance import rows
from dwindle.pruning.shared_axes import SharedAxis, shared_axes

__all__ = ["GroupSparsity", "group_norms", "shrinkage"]


def group_norms(axis: SharedAxis, parameters: Mapping[str, Tensor]) -> Tensor:
    """Return ``I(k) = sum over w of |w[k]|^2`` over all parameters that share the axis, without biases.

    Args:
        axis: The axis.
        parameters: Their values by name; the result can be differentiated with respect to them.

    Returns:
        ``[axis.size]``, float64.
    """
    total: Tensor | None = None
    for place in axis.places:
        weight = parameters.get(place.name)
        if weight is None or place.shifts or not weight.is_floating_point():
            continue
        own = place.onto(rows(weight.square(), place.dim).sum(1), axis.size)
        total = own if total is None else total + own
    return torch.zeros(axis.size, dtype=torch.float64) if total is None else total


def shrinkage(norms: Tensor, sharpness: float) -> Tensor:
    """Return how strongly each index is pushed to zero: ``2^(sharpness (max - I) / (max - min))``.

    From 1 for the largest group to ``2^sharpness`` for the smallest; 1 everywhere when all are equal.

    Args:
        norms: ``I`` of each index.
        sharpness: The paper's alpha.
    """
    highest, lowest = norms.max(), norms.min()
    spread = highest - lowest
    if not bool(spread > 0):
        return torch.ones_like(norms)
    return torch.exp2(sharpness * (highest - norms) / spread)


class GroupSparsity:
    """A penalty that pushes to zero, all together, the parameters of indices that matter least.

    ``strength * sum over axes and indices of gamma(k) I(k)``, with ``I`` as in :func:`group_norms` and the weights
    ``gamma`` of :func:`shrinkage`, is added to the loss. Afterwards ``dw.prune(..., importance="group_norm",
    scope="global")`` finds whole groups near zero. It masks nothing and leaves nothing on the model:

        with dw.compress(model, [GroupSparsity(model, example_inputs)]) as run:
            ...

    Args:
        model: The model.
        example_inputs: A tensor or a tuple of positional inputs, from which the axes are found.
        example_kwargs: Keyword inputs.
        strength: Weight of the penalty (the paper's lambda). Best in place of weight decay, not on top of it.
        sharpness: The paper's alpha.
        axes: Kinds of axes that are made sparse, as for :func:`dwindle.prune`; None takes all that may shrink.
        training_steps: Optimizer steps with the penalty; what follows is fine-tuning. None never ends.

    Raises:
        ConfigError: An argument is not valid.
        CaptureError: The model fails on the inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        strength: float = 5e-4,
        sharpness: float = 4.0,
        axes: Sequence[str] | None = None,
        training_steps: int | None = None,
    ) -> None:
        for name, number in {"strength": strength, "sharpness": sharpness}.items():
            if not number >= 0:
                raise ConfigError(f"{name}: {number!r} is not a number from 0 on")
        if training_steps is not None and (isinstance(training_steps, bool) or training_steps < 1):
            raise ConfigError(f"training_steps: {training_steps!r} is not a positive number")
        self.model, self.strength, self.sharpness = model, strength, sharpness
        self.training_steps, self.steps = training_steps, 0
        inputs = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
        analysis = analyse(model, inputs, example_kwargs)
        chosen = _of_kinds(analysis.selected(), axes)
        self.axes = shared_axes(model, analysis, chosen)
        if not self.axes:
            raise ConfigError("no axis of the model may shrink, so there is nothing to make sparse")

    def loss(self) -> Tensor | float:
        """Return the penalty, a 0-d tensor; 0.0 once ``training_steps`` are over."""
        if self.finished or self.strength == 0:
            return 0.0
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        total: list[Tensor] = []
        for axis in self.axes:
            norms = group_norms(axis, parameters)
            total.append((shrinkage(norms.detach(), self.sharpness) * norms).sum())
        return (self.strength * torch.stack(total).sum()).to(next(iter(parameters.values())).dtype)

    @property
    def finished(self) -> bool:
        """Whether the penalty has done its work."""
        return self.training_steps is not None and self.steps >= self.training_steps

    def step(self) -> None:
        """The optimizer has made one step."""
        self.steps += 1

    def parameters(self) -> Iterator[nn.Parameter]:
        """The penalty has no parameters of its own."""
        yield from ()

    def attach(self) -> None:
        """There is nothing to put on the model."""

    def detach(self) -> nn.Module:
        """Return the model, on which there is nothing."""
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Return how many steps were made."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ConfigError: It is missing.
        """
        if "steps" not in state:
            raise ConfigError("the state of GroupSparsity needs steps")
        self.steps = int(state["steps"])


def _of_kinds(infos: Sequence[AxisInfo], kinds: Sequence[str] | None) -> list[AxisInfo]:
    if kinds is None:
        return list(infos)
    known = sorted({info.kind for info in infos})
    for kind in kinds:
        if kind not in known:
            raise ConfigError(
                f"axes: the model has no {kind!r} that may shrink, only {', '.join(known)}"
                f"{did_you_mean(kind, known)}"
            )
    return [info for info in infos if info.kind in kinds]
