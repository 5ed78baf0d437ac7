"""Pruners for models that were not trained yet: SNIP and SynFlow."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dwindle import simulate
from dwindle.config import Granularity, Target
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.pruning.base import Pruner
from dwindle.pruning.groups import selected, unit_sets
from dwindle.pruning.masks import Masks, follow_axes, masks_of_goals
from dwindle.pruning.observation import ObservingPruner
from dwindle.pruning.plan import PlannedTarget
from dwindle.training.progress import tracked


def connection_sensitivity(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return ``|g w|``, the change of the loss with a weight's connection (Lee et al., SNIP, equation 4 without its
    constant factor).

    Args:
        weight: The weights.
        gradient: The loss's gradient, of the same shape.
    """
    return (gradient * weight.to(gradient.dtype)).abs()


class SNIPPruner(ObservingPruner):
    """Connections to which the loss is least sensitive go, at initialization (Lee et al., SNIP, arXiv:1810.02340).

    The metric of a weight is ``|g w|`` with the mean gradient ``g`` over the batches; a block sums it. BatchNorms
    normalize with the statistics of each batch, as in training: those of an untrained model mean nothing.

    Rank all layers together, as the paper does, by giving all entries one ``global_group_id``.
    """

    works_sharded = False

    default_granularity = None
    needs_gradients = True
    batch_statistics = True

    def gradients(self) -> None:
        """Add the gradient of one batch."""
        for target in self.plan.goals:
            gradient = self.gradient_of(target)
            if gradient is not None:
                self.add(target, gradient)

    def metric(self, target: Target, weight: Tensor, granularity: Granularity) -> Tensor:
        """Return the sum over each block of the connections' sensitivity."""
        return granularity.reduce(connection_sensitivity(weight, self.mean(target)), "sum")


def synaptic_flow(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return ``|w dR/dw|`` of each parameter, where R is the sum of the outputs for inputs of ones when every
    parameter is replaced by its absolute value (Tanaka et al., SynFlow, equation 1).

    No data are involved. Running means are taken as zero, so that nothing is subtracted from the flow.

    Args:
        model: Computes in float64; it is changed (absolute values).
        args: Positional inputs; floating tensors are replaced by ones with a batch of one, others stay.
        kwargs: Keyword inputs, likewise.

    Raises:
        DwindleError: The flow is not finite, or nothing flows at all.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.zero_()
    parameters = {name: own.requires_grad_(True) for name, own in model.named_parameters()}
    ones_args, ones_kwargs = tree_map(_ones, (tuple(args), dict(kwargs)))
    with torch.enable_grad():
        outputs = [o for o in tree_leaves(_plain(model(*ones_args, **ones_kwargs))) if isinstance(o, Tensor)]
        flowing = [o.sum() for o in outputs if o.requires_grad]
        if not flowing:
            raise DwindleError("SynFlow: no output depends on a parameter")
        flow = torch.stack(flowing).sum()
        gradients = torch.autograd.grad(flow, list(parameters.values()), allow_unused=True)
    if not bool(torch.isfinite(flow)):
        raise DwindleError(
            f"SynFlow: the flow through the model is {float(flow.detach())}; are its weights finite?"
        )
    return {
        name: torch.zeros_like(own) if gradient is None else (own * gradient).detach().abs()
        for (name, own), gradient in zip(parameters.items(), gradients, strict=True)
    }


def _ones(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    first = value[:1] if value.dim() else value
    return torch.ones_like(first, dtype=torch.float64) if value.is_floating_point() else first


def _plain(outputs: Any) -> Any:
    return dict(outputs) if isinstance(outputs, Mapping) else outputs


class SynFlowPruner(Pruner):
    """Weights through which least flows go, without any data (Tanaka et al., SynFlow, arXiv:2006.05467).

    The masks are found in ``iterations`` rounds: after round k of n a share ``(1 - ratio) ** (k / n)`` of the
    blocks stays, and the flow is measured again through what stays. So no layer is emptied as long as another can
    still give something, which is proven for a global ranking: give all entries one ``global_group_id``.

    Args:
        model: As in :class:`Pruner`.
        config_list: As in :class:`Pruner`.
        example_inputs: Their shapes (and integers) are used, and what belongs together is found.
        example_kwargs: Keyword inputs.
        iterations: Number of rounds.

    Raises:
        ConfigError: An argument is not valid.
    """

    works_sharded = False

    default_granularity = None

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        example_inputs: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        iterations: int = 100,
    ) -> None:
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
            raise ConfigError(f"iterations: {iterations!r} is not a positive number")
        super().__init__(model, config_list, example_inputs, example_kwargs)
        if self._inputs is None:
            raise ConfigError(
                "SynFlowPruner needs example_inputs: it sends ones of their shapes through the model"
            )
        self.iterations = iterations
        self._share = 1.0
        self._flows: dict[Target, Tensor] = {}

    def metric(self, target: Target, weight: Tensor, granularity: Granularity) -> Tensor:
        """Return the sum of the flow through each block, with the masks of the last round but one."""
        return granularity.reduce(self._flows[target], "sum")

    def _mask(self, progress: float) -> None:
        self._share = progress
        super()._mask(progress)

    def collect(self) -> dict[Target, Tensor]:
        """Measure the flow round by round, then return the weights."""
        with simulate.disabled(self.model):
            plain = copy.deepcopy(self.model).double().eval()
        values = {name: own.detach().clone() for name, own in plain.named_parameters()}
        masks: Mapping[Target, Tensor] = {}
        rounds = self.iterations if self._share > 0 else 1
        for number in tracked(range(1, rounds + 1), "SynFlowPruner: rounds"):
            self._flows = self._flow(plain, values, masks)
            if number < rounds:
                masks = self._chosen(number / rounds)
        return super().collect()

    def _flow(
        self, plain: nn.Module, values: Mapping[str, Tensor], masks: Mapping[Target, Tensor]
    ) -> dict[Target, Tensor]:
        """Return the flow through each ranked parameter of a plain copy, behind what is masked so far."""
        modules = dict(plain.named_modules(remove_duplicate=False))
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.copy_(values[name])
            for before in (self._before, masks):
                for target, mask in before.items():
                    own = modules[target.module]._parameters.get(target.name)
                    if own is not None:
                        own.mul_(mask.to(own))
        flows = synaptic_flow(plain, self._inputs or (), self._kwargs)
        names = {id(parameter): name for name, parameter in plain.named_parameters()}
        return {
            target: flows[names[id(modules[target.module]._parameters[target.name])]]
            for target in self.plan.goals
        }

    def _chosen(self, share: float) -> Masks:
        """Return the masks behind a share of the rounds, with what follows them."""
        goals = {target: self._at(planned, share) for target, planned in self.plan.goals.items()}
        metrics = {
            target: goals[target].granularity.reduce(flow, "sum") for target, flow in self._flows.items()
        }
        sets, _ = unit_sets(goals, metrics, coupling=self._coupling)
        keep, axes = selected(sets, goals, metrics, progress=share * self._share, coupling=self._coupling)
        masks = masks_of_goals(dataclasses.replace(self.plan, goals=goals), keep)
        if self._coupling is not None:
            follow_axes(masks, self._coupling, axes)
        return masks

    def _at(self, planned: PlannedTarget, share: float) -> PlannedTarget:
        setting = planned.setting
        if setting.sparse_ratio is None:
            return planned
        ratio = 1 - (1 - setting.sparse_ratio * self._share) ** share
        return dataclasses.replace(planned, setting=setting.model_copy(update={"sparse_ratio": ratio}))
