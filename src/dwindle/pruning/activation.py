"""Pruners that rank channels by what comes out of them: how often they are zero, and how large they are."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dwindle.config import Granularity, Target
from dwindle.config.errors import ConfigError, DwindleError, did_you_mean
from dwindle.config.granularity import activation_axis
from dwindle.pruning.observation import ObservingPruner
from dwindle.pruning.places import Place, SeenChannels, channels_seen, hook_places, onto_channels

#: Activation functions by name; any function of a tensor may be given in place of a name.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "relu6": nn.functional.relu6,
    "leaky_relu": nn.functional.leaky_relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "mish": nn.functional.mish,
    "elu": nn.functional.elu,
    "hardswish": nn.functional.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": nn.functional.softplus,
    "identity": lambda tensor: tensor,
}


def share_not_positive(maps: Tensor, threshold: float = 0.0) -> tuple[Tensor, int]:
    """Count, for each channel, the values that are not above a threshold (the sum behind APoZ).

    Args:
        maps: ``[samples, channels, places]``.
        threshold: Up to this a neuron counts as silent.

    Returns:
        ``[channels]``, and the number of values each channel has.
    """
    return (maps <= threshold).sum((0, 2), dtype=torch.float64), maps.shape[0] * maps.shape[2]


def summed(maps: Tensor) -> tuple[Tensor, int]:
    """Return the sum of each channel's values (float64), and how many they are.

    Args:
        maps: ``[samples, channels, places]``.
    """
    return maps.sum((0, 2), dtype=torch.float64), maps.shape[0] * maps.shape[2]


class ActivationPruner(ObservingPruner):
    """Base of pruners that rank channels by their activations.

    A subclass writes :meth:`statistic`, a sum over samples for each channel, whose mean is the metric (or what
    :meth:`importance` makes of it).

    Args:
        model: As in :class:`Pruner`.
        config_list: As in :class:`Pruner`; the granularity is ``out_channel`` (what a module gives), or
            ``in_channel`` (what it gets).
        example_inputs: As in :class:`Pruner`.
        example_kwargs: As in :class:`Pruner`.
        activation: None watches the channels where the layers that read them get them: behind the model's own
            norms and activation functions, whatever those are (this needs ``example_inputs``). A name of
            :data:`ACTIVATIONS` or a function is applied to the module's own output instead.
        observation: ``data``, ``batches``, ``adapt`` or ``training_steps``, as in :class:`ObservingPruner`.

    Raises:
        ConfigError: An argument is not valid.
    """

    #: Dimensions that a tensor must have to be of use; 0 takes as many as the module's own output has.
    dimensions: ClassVar[int] = 0

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        example_inputs: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        activation: str | Callable[[Tensor], Tensor] | None = None,
        **observation: Any,
    ) -> None:
        if isinstance(activation, str) and activation not in ACTIVATIONS:
            hint = did_you_mean(activation, ACTIVATIONS)
            raise ConfigError(f"activation: {activation!r} is not one of {', '.join(ACTIVATIONS)}{hint}")
        super().__init__(model, config_list, example_inputs, example_kwargs, **observation)
        if activation is None and self._inputs is None:
            raise ConfigError(
                f"{type(self).__name__} needs example_inputs, to find what follows each layer in the model, or "
                "activation=, the function that follows each of them"
            )
        self.activation = ACTIVATIONS[activation] if isinstance(activation, str) else activation
        self._seen: dict[Target, list[SeenChannels]] = {}

    @abstractmethod
    def statistic(self, maps: Tensor) -> tuple[Tensor, int]:
        """Return a sum for each channel over observations, and how many observations these were.

        Args:
            maps: ``[samples, channels, places]``, or with two spatial dimensions where :attr:`dimensions` is 4.
        """

    def importance(self, mean: Tensor) -> Tensor:
        """Return the metric of each channel from the mean of its statistic: the mean itself."""
        return mean

    def check(self, target: Target, granularity: Granularity) -> None:
        """Refuse blocks that are no channels.

        Raises:
            ConfigError: Saying so.
        """
        if granularity.kind != "channel":
            raise ConfigError(
                f"{target}: {type(self).__name__} ranks channels; use granularity 'out_channel' or 'in_channel'"
            )

    def watch(self) -> Iterator[RemovableHandle]:
        """Attach hooks where the channels are seen."""
        self._seen = {target: self._where(target) for target in self.plan.goals}
        places = {place.target: None for own in self._seen.values() for seen in own for place in seen.places}
        yield from hook_places(self.model, list(places), self._see)

    def _where(self, target: Target) -> list[SeenChannels]:
        coupling = self._coupling if self.activation is None else None
        return channels_seen(self.model, self.plan.goals[target], coupling, self.dimensions)

    def _see(self, target: Target, value: Tensor) -> None:
        if not self.observing or not value.is_floating_point():
            return
        value = value.detach()
        if target.is_output and self.activation is not None:
            value = self.activation(value)
        maps = value.movedim(activation_axis(type(self.model.get_submodule(target.module))), 1)
        finite = torch.isfinite(maps).all()
        maps = torch.where(finite, maps, torch.zeros_like(maps))
        if self.dimensions and maps.dim() != self.dimensions:
            raise DwindleError(
                f"{target}: {type(self).__name__} needs feature maps with {self.dimensions - 2} spatial dimensions, "
                f"this has shape {list(value.shape)}"
            )
        if not self.dimensions:
            maps = maps.reshape(maps.shape[0], maps.shape[1], -1)
        total, count = self.statistic(maps)
        self.add(target, torch.where(finite, total, math.nan), count)

    def metric(self, target: Target, weight: Tensor, granularity: Granularity) -> Tensor:
        """Return the importance of each channel, from what was seen of it."""
        shape = granularity.block_shape(weight.shape)
        metric = torch.zeros(math.prod(shape), dtype=torch.float64, device=weight.device)
        for seen in self._seen.get(target) or self._where(target):
            size = seen.numbers(metric.numel())
            scores = torch.stack([self._scores(place, size, target) for place in seen.places]).mean(0)
            metric += seen.spread(scores, metric.numel()).to(metric.device)
        return metric.reshape(shape)

    def _scores(self, place: Place, size: int, target: Target) -> Tensor:
        scores = self.importance(onto_channels(self.mean(place.target), place.index, size))
        if scores.numel() != size:
            raise DwindleError(
                f"{target} has {size} channels, but {place.target} has {scores.numel()}: they cannot be ranked by "
                "activations"
            )
        return scores


class ActivationAPoZRankPruner(ActivationPruner):
    """Channels that are silent most often go (Hu et al., Network Trimming, arXiv:1607.03250).

    The metric is 1 - APoZ, where APoZ is the average percentage of zeros: the share of activations, over all
    samples and places, that are zero behind a ReLU. Behind any activation function a value of at most
    ``threshold`` counts, which is the same share for a ReLU and has a meaning for GELU, SiLU and the like, which
    are never exactly zero.

    Args:
        model: As in :class:`ActivationPruner`.
        config_list: As in :class:`ActivationPruner`.
        example_inputs: As in :class:`ActivationPruner`.
        example_kwargs: As in :class:`ActivationPruner`.
        threshold: Up to this value a neuron is silent.
        options: As in :class:`ActivationPruner`.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        example_inputs: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        threshold: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(model, config_list, example_inputs, example_kwargs, **options)
        self.threshold = threshold

    def statistic(self, maps: Tensor) -> tuple[Tensor, int]:
        """Count the silent values of each channel."""
        return share_not_positive(maps, self.threshold)

    def importance(self, mean: Tensor) -> Tensor:
        """Return the share of values that are not silent."""
        return 1 - mean


class ActivationMeanRankPruner(ActivationPruner):
    """Channels with the smallest mean activation go (Molchanov et al., arXiv:1611.06440, section 2.2)."""

    def statistic(self, maps: Tensor) -> tuple[Tensor, int]:
        """Sum up the values of each channel."""
        return summed(maps)
