"""How much each index of an axis matters to the model: the protocol of every importance of ``dw.prune``.

An importance may look at weights alone (:class:`WeightImportance`) or run the model first
(:mod:`~dwindle.pruning.measured`). Either way it scores the indices of single weights
(:meth:`AxisImportance.of_weight`) and makes of them the scores of a whole axis (:meth:`AxisImportance.of_axis`),
which all parameters share that would lose the index. How weights are added up and what is divided by what stands in
two words, ``reduce`` and ``normalize``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.pruning.importance import Importance, rows
from dwindle.pruning.shared_axes import AxisPlace, SharedAxis

Reduce = Literal["mean", "sum", "max"]
Normalize = Literal["weight", "axis", "none"]

#: A loss of the task: ``loss(outputs, target)`` gives a 0-d tensor.
Loss = Callable[[Any, Any], Tensor]


class AxisImportance:
    """Base of everything that scores the indices of axes; larger is more important.

    Args:
        reduce: How the scores of the weights that share an axis become one: their ``mean``, ``sum`` or ``max``.
        normalize: What is divided by its mean, so that scores of different axes can be ranked together: the scores of
            each ``weight``, those of the whole ``axis``, or nothing (``none``: they are in one unit already).

    Raises:
        ConfigError: One of them is another word.
    """

    #: Whether the model is run over data.
    needs_data: ClassVar[bool] = False

    #: Whether the data must hold labels.
    needs_labels: ClassVar[bool] = False

    def __init__(self, *, reduce: Reduce = "mean", normalize: Normalize = "axis") -> None:
        for name, value, words in (("reduce", reduce, Reduce), ("normalize", normalize, Normalize)):
            if value not in get_args(words):
                known = get_args(words)
                raise ConfigError(
                    f"{name}: {value!r} is not one of {', '.join(known)}{did_you_mean(str(value), known)}"
                )
        self.reduce, self.normalize = reduce, normalize

    def measure(
        self, model: nn.Module, axes: Sequence[SharedAxis], data: Any, loss: Loss, *, weights: bool = False
    ) -> None:
        """Look at the model at work, and leave it as it was; by default there is nothing to see.

        Args:
            model: The model.
            axes: What will be scored.
            data: Batches, or one tensor.
            loss: ``loss(outputs, target)``.
            weights: Whether single weights are scored too (:meth:`of_weight`), for whole blocks and experts.

        Raises:
            ConfigError: The data do not fit.
            DwindleError: A loss or a statistic is not finite.
        """

    def of_weight(self, name: str, weight: Tensor, dim: int) -> Tensor:
        """Return the scores of the indices of one dimension of one weight, ``[weight.shape[dim]]``.

        Args:
            name: The weight.
            weight: Its value, floating point.
            dim: The dimension.
        """
        raise NotImplementedError

    def counts(self, place: AxisPlace, weight: Tensor) -> bool:
        """Whether a parameter has a say: by default those of at least two dimensions."""
        return weight.dim() >= 2

    def of_axis(self, axis: SharedAxis, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the scores of the indices of an axis, ``[axis.size]`` in float64 on the CPU.

        Args:
            axis: The axis.
            tensors: Values of the parameters by name; those that are not in it are left out.
        """
        every = []
        for place in axis.places:
            tensor = tensors.get(place.name)
            if (
                tensor is None
                or not tensor.is_floating_point()
                or tensor.is_meta
                or not self.counts(place, tensor)
            ):
                continue  # on the meta device every index scores the same
            own = self.of_weight(place.name, tensor.detach(), place.dim)
            scores = place.onto(own, axis.size).cpu()
            every.append(over_mean(scores) if self.normalize == "weight" else scores)
        if self.normalize == "weight":
            every = [scores for scores in every if bool(scores.any())]
        total = reduced(every, self.reduce, axis.size)
        return over_mean(total) if self.normalize == "axis" else total


def reduced(scores: Sequence[Tensor], how: Reduce, size: int) -> Tensor:
    """Return one score for each index from several, ``[size]``; zeros when there are none."""
    if not scores:
        return torch.zeros(size, dtype=torch.float64)
    whole = torch.stack(list(scores))
    return whole.amax(0) if how == "max" else whole.sum(0) if how == "sum" else whole.mean(0)


def over_mean(scores: Tensor) -> Tensor:
    """Return scores divided by their mean; zeros stay zeros."""
    mean = float(scores.mean()) if scores.numel() else 0.0
    return scores / mean if mean > 0 else torch.zeros_like(scores)


class WeightImportance(AxisImportance):
    """Scores from the values of the weights alone.

    Args:
        function: Scores the indices of one dimension of one weight.
        reduce: As in :class:`AxisImportance`.
        normalize: As in :class:`AxisImportance`.
        scales: Whether parameters of one dimension that multiply (the weights of norms) have a say too; what is only
            added never has.
    """

    def __init__(
        self,
        function: Importance | Callable[[Tensor, int], Tensor],
        *,
        reduce: Reduce = "mean",
        normalize: Normalize = "weight",
        scales: bool = False,
    ) -> None:
        super().__init__(reduce=reduce, normalize=normalize)
        self.function, self.scales = function, scales

    def of_weight(self, name: str, weight: Tensor, dim: int) -> Tensor:
        """Return what the function says."""
        return self.function(weight, dim)

    def counts(self, place: AxisPlace, weight: Tensor) -> bool:
        """Whether a parameter has a say: matrices and kernels, and scales where they are wanted."""
        return weight.dim() >= 2 or (self.scales and weight.dim() == 1 and not place.shifts)


class GroupNorm(WeightImportance):
    """The norm of everything that would go with an index (Fang et al., DepGraph, arXiv:2301.12900, section 3.3).

    ``I(k) = sum over w of |w[k]|^p``: over all parameters that share the axis, weights of norms included and biases
    not, with the same weight for each element; then divided by the mean over the axis.

    Args:
        power: ``p``.
        normalize: As in :class:`AxisImportance`.
    """

    def __init__(self, *, power: float = 2.0, normalize: Normalize = "axis") -> None:
        if power <= 0:
            raise ConfigError(f"power: {power} is not positive")
        self.power = power
        super().__init__(self._powers, reduce="sum", normalize=normalize, scales=True)

    def _powers(self, weight: Tensor, dim: int | None) -> Tensor:
        powers = weight.detach().abs().double().pow(self.power)
        return powers if dim is None else rows(powers, dim).sum(1)
