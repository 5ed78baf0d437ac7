"""The pruner that estimates by a Taylor expansion what the loss would lose: of weights, of gates, of outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dwindle.config import Granularity, Target
from dwindle.config.errors import ConfigError, DwindleError, did_you_mean
from dwindle.config.granularity import activation_axis
from dwindle.pruning.observation import ObservingPruner
from dwindle.pruning.places import SeenChannels, channels_seen, hook_places
from dwindle.training.processes import mean_over_processes

#: What the expansion is made for.
PLACES = ("weights", "gates", "outputs")


def taylor_of_weights(
    weight: Tensor, gradient: Tensor, granularity: Granularity, *, joint: bool = False
) -> Tensor:
    """Return the first-order importance of each block (Molchanov et al., arXiv:1906.10771).

    Args:
        weight: The weights.
        gradient: The loss's gradient, of the same shape.
        granularity: The blocks.
        joint: False sums the importance of single weights, ``sum (g w)^2``; True takes the block as one,
            ``(sum g w)^2``.

    Returns:
        ``granularity.block_shape(weight.shape)``.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    product = weight.to(wide) * gradient.to(wide)
    if joint:
        return granularity.reduce(product, "sum").square()
    return granularity.reduce(product.square(), "sum")


class Gates:
    """Gates of value one on inputs or outputs; the loss's gradient at a gate is ``sum g a`` over what it scales.

    Multiplying by one changes nothing. Only the gates' gradients are kept, ``[samples, channels]`` for each call,
    until :meth:`take`.

    Args:
        averaged: Divide by the number of places that a gate scales (the mean over a feature map).
        forgiving: Leave out calls whose gradient is not finite (scaled losses overflow, and their step is skipped).
    """

    def __init__(self, *, averaged: bool = False, forgiving: bool = False) -> None:
        self.averaged, self.forgiving = averaged, forgiving
        self._kept: dict[Target, list[Tensor]] = {}

    def on(self, target: Target, value: Tensor, axis: int) -> Tensor:
        """Return the gated value.

        Args:
            target: What it is.
            value: Samples first.
            axis: Its channel dimension.
        """
        axis %= value.dim()
        shape = [size if dim in (0, axis) else 1 for dim, size in enumerate(value.shape)]
        wide = torch.promote_types(value.dtype, torch.float32)
        gate = torch.ones(shape, dtype=wide, device=value.device, requires_grad=True)
        places = value.numel() / math.prod(shape) if self.averaged else 1.0

        def keep(gradient: Tensor) -> None:
            if not self.forgiving or bool(torch.isfinite(gradient).all()):
                own = gradient.detach().movedim(axis, 1).reshape(value.shape[0], value.shape[axis])
                self._kept.setdefault(target, []).append(own.double() / places)

        gate.register_hook(keep)
        return value * gate.to(value.dtype)

    def take(self) -> dict[Target, list[Tensor]]:
        """Return the gradients since the last time, oldest first, and forget them."""
        taken, self._kept = self._kept, {}
        return taken


class TaylorPruner(ObservingPruner):
    """Blocks whose removal would change the loss least, to first order, go.

    ``on`` names the metric, a mean over batches (or optimizer steps, when a training run is watched):

    - ``weights``: ``sum (g w)^2`` over a block; with ``joint`` ``(sum g w)^2`` (Molchanov et al. 2019)
    - ``gates``: ``(dL/dz)^2`` of a gate ``z = 1`` on each channel (Molchanov et al. 2019, section 3.2)
    - ``outputs``: ``|mean over places of g a|``, a mean over samples (Molchanov et al. 2016, arXiv:1611.06440)

    ``g`` is the loss's gradient, complete: batches whose gradients are accumulated for one optimizer step count as
    one. With example inputs gates and outputs are those that the next layers read, behind norms and activation
    functions, and channels that several layers read have one gate; without them they are the module's own output.

    Args:
        model: As in :class:`Pruner`.
        config_list: As in :class:`Pruner`.
        example_inputs: As in :class:`Pruner`.
        example_kwargs: As in :class:`Pruner`.
        on: ``weights``, ``gates`` or ``outputs``.
        joint: For weights, see the table.
        normalize: Divide the metric of each target by its Euclidean norm, for global rankings (2016).
        observation: ``data``, ``loss``, ``batches``, ``adapt`` or ``training_steps``, as in
            :class:`ObservingPruner`.

    Raises:
        ConfigError: An argument is not valid.
    """

    needs_gradients = True

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        example_inputs: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        on: Literal["weights", "gates", "outputs"] = "weights",
        joint: bool = False,
        normalize: bool = False,
        **observation: Any,
    ) -> None:
        if on not in PLACES:
            raise ConfigError(f"on: {on!r} is not one of {', '.join(PLACES)}{did_you_mean(str(on), PLACES)}")
        if joint and on != "weights":
            raise ConfigError(
                "joint takes the weights of a block together; gates and outputs are joint already"
            )
        self.on, self.joint, self.normalize = on, joint, normalize
        super().__init__(model, config_list, example_inputs, example_kwargs, **observation)
        self._seen: dict[Target, list[SeenChannels]] = {}
        self._gates = Gates()

    def check(self, target: Target, granularity: Granularity) -> None:
        """Refuse blocks that are no channels, when gates or outputs are looked at.

        Raises:
            ConfigError: Saying so.
        """
        if self.on != "weights" and granularity.kind != "channel":
            raise ConfigError(
                f"{target}: {self.on} belong to channels; use granularity 'out_channel' or 'in_channel'"
            )

    def watch(self) -> Iterator[RemovableHandle]:
        """Put gates where channels are read; weights need none."""
        if self.on == "weights":
            return
        self._gates = Gates(averaged=self.on == "outputs", forgiving=not self._own_pass)
        goals = self.plan.goals
        self._seen = {t: channels_seen(self.model, goals[t], self._coupling, dimensions=1) for t in goals}
        places = {place.target: None for own in self._seen.values() for seen in own for place in seen.places}
        yield from hook_places(self.model, list(places), self._gate)

    def _gate(self, target: Target, value: Tensor) -> Tensor | None:
        if not (self.observing and torch.is_grad_enabled() and value.is_floating_point()):
            return None
        module = self.model.get_submodule(target.module)
        return self._gates.on(target, value, activation_axis(type(module)))

    def gradients(self) -> None:
        """Add the importance of one batch, or of one optimizer step."""
        if self.on != "weights":
            self._add_gates()
            return
        for target, weight in self.collect().items():
            gradient = self.gradient_of(target)
            if gradient is not None:
                blocks = self.plan.goals[target].granularity
                self.add(target, taylor_of_weights(weight, gradient, blocks, joint=self.joint))

    def _add_gates(self) -> None:
        taken = self._gates.take()
        at_gates: dict[Target, Tensor | None] = {}
        for target, planned in self.plan.goals.items():
            count = planned.granularity.block_count(planned.shape)
            total: Tensor | None = None
            for seen in self._seen[target]:
                own = self._of_samples(seen, taken, count)
                if own is not None:
                    total = own if total is None else total + own
            if total is not None and total.shape[1] != count:
                raise DwindleError(f"{target} has {count} channels, but {total.shape[1]} are seen behind it")
            at_gates[target] = None if total is None else total.sum(0)
            if total is not None and self.on == "outputs":
                # the loss is a mean over samples, so the gradient of one sample's own loss is that many times
                self.add(target, total.abs().sum(0) * total.shape[0], total.shape[0])
        if self.on == "gates":
            self._add_squares(at_gates)

    def _add_squares(self, at_gates: Mapping[Target, Tensor | None]) -> None:
        """Add the squared gradients at the gates of one batch, or of one step's batches in all processes."""
        if not self._own_pass:
            goals = (self.plan.goals[target] for target in at_gates)
            like = [self._no_gradient(own.granularity.block_count(own.shape)) for own in goals]
            at_gates = dict(zip(at_gates, mean_over_processes(list(at_gates.values()), like), strict=True))
        for target, gradient in at_gates.items():
            if gradient is not None:
                self.add(target, gradient.square())

    def _no_gradient(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64, device=self._device)

    def _of_samples(
        self, seen: SeenChannels, taken: Mapping[Target, list[Tensor]], count: int
    ) -> Tensor | None:
        """Return the gradients at the gates of a target's channels, ``[samples, channels]``; None when there are none.

        Places that saw the same samples are one gate; otherwise (a module that is called twice) each call is a
        sample of its own.
        """
        size = seen.numbers(count)
        found = []
        for place in seen.places:
            calls = taken.get(place.target)
            if calls:
                own = torch.cat(calls)
                if place.index is not None:
                    index = place.index.to(own.device)
                    here = index >= 0
                    narrow = torch.zeros(own.shape[0], size, dtype=own.dtype, device=own.device)
                    own = narrow.index_add_(1, index[here], own[:, here])
                    if self.on == "outputs":  # places that are flattened into the channels
                        own = own / torch.bincount(index[here], minlength=size).clamp(min=1)
                found.append(own)
        if not found:
            return None
        if len({own.shape[0] for own in found}) == 1:
            whole = torch.stack(found).sum(0)
        else:
            whole = torch.cat(found)
        if seen.index is None:
            return whole
        index = seen.index.to(whole.device)
        return whole[:, index.clamp(min=0)] * (index >= 0)

    def metric(self, target: Target, weight: Tensor, granularity: Granularity) -> Tensor:
        """Return the mean importance of each block."""
        metric = self.mean(target).reshape(granularity.block_shape(weight.shape))
        if self.normalize:
            metric = metric / torch.linalg.vector_norm(metric).clamp(min=1e-30)
        return metric
