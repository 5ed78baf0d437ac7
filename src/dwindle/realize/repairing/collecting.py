"""Runs the original and the small model side by side, batch by batch, and sums up what the layers of a pass lack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.realize.repairing.affine_calls import AffineCall, features_of, outputs_of
from dwindle.realize.repairing.layers import Layer
from dwindle.realize.repairing.least_squares import Moments
from dwindle.realize.repairing.recording import AffineMode, EnoughError, names_of, run
from dwindle.training.inputs import Inputs

Targets = dict[tuple[str, int], Tensor]


class _Watching(AffineMode):
    """Sees the calls of some layers, and ends the forward after the last of them."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], keys: Sequence[str]) -> None:
        super().__init__(names_of(model))
        self.layers = dict(zip(keys, layers, strict=True))
        self.missing = sum(layer.place.calls for layer in layers)

    def on_affine(self, name: str, order: int, call: AffineCall, output: Tensor) -> Any:
        """Hand on the calls of the layers."""
        layer = self.layers.get(name)
        if layer is None:
            return output
        result = self.on_layer(layer, order, call, output)
        self.missing -= 1
        if not self.missing:
            raise EnoughError
        return result

    def on_layer(self, layer: Layer, order: int, call: AffineCall, output: Tensor) -> Any:
        """See one call of one layer."""
        raise NotImplementedError


class _Targets(_Watching):
    """Keeps what the original's layers give, on the outputs that the small model still has."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        super().__init__(model, layers, [layer.source for layer in layers])
        self.found: Targets = {}

    def on_layer(self, layer: Layer, order: int, call: AffineCall, output: Tensor) -> Any:
        """Copy the outputs."""
        kept = output.detach()
        if layer.keep is not None:
            kept = kept.index_select(call.output_dim, layer.keep.to(kept.device))
        else:
            kept = kept.clone()  # later code may write into it
        if layer.factor is not None:
            shape = [1] * kept.dim()
            shape[call.output_dim] = -1
            kept = kept * layer.factor.to(kept).view(shape)
        self.found[layer.place.name, order] = kept
        return output


class _Collecting(_Watching):
    """Sums up what the small model's layers lack, and gives the layers behind them what the original had."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        targets: Targets,
        sums: dict[str, Moments],
        padding: Tensor | None,
    ) -> None:
        super().__init__(model, layers, [layer.place.name for layer in layers])
        self.targets, self.sums, self.padding = targets, sums, padding

    def on_layer(self, layer: Layer, order: int, call: AffineCall, output: Tensor) -> Any:
        """Add the moments of one call."""
        target = self.targets.pop((layer.place.name, order), None)
        if target is None or target.shape != output.shape:
            return output  # experts that get other tokens
        moments = _moments(layer, call, output, target, self.padding)
        if moments.count:
            own = self.sums.setdefault(layer.place.name, moments)
            if own is not moments:
                own.add(moments)
        return target.to(output.dtype)


def _moments(
    layer: Layer, call: AffineCall, output: Tensor, target: Tensor, padding: Tensor | None
) -> Moments:
    wanted = outputs_of(call, target, padding)
    if layer.weight:
        features = features_of(call, padding)
    else:
        features = wanted.new_zeros((*wanted.shape[:2], 0))
    if layer.constant:
        features = torch.cat([features, features.new_ones((*features.shape[:2], 1))], dim=2)
    return Moments.of(features, wanted - outputs_of(call, output, padding), wanted)


def collect(
    small: nn.Module,
    original: nn.Module,
    layers: Sequence[Layer],
    inputs: Inputs,
    sums: dict[str, Moments],
) -> None:
    """Add the moments of one batch for the layers of one pass.

    The layers before them run as they are, so what those still do wrong can be made up for here; among the layers
    of the pass each gets what the original's would have given it.

    Args:
        small: The small model, in evaluation mode.
        original: The original, likewise.
        layers: Of this pass.
        inputs: Arguments of the forward.
        sums: Moments by name of the weight; added to.
    """
    args, kwargs = inputs
    targets = _Targets(original, layers)
    run(original, targets, args, kwargs)
    run(small, _Collecting(small, layers, targets.found, sums, padding_of(inputs)), args, kwargs)


def padding_of(inputs: Inputs) -> Tensor | None:
    """Return which tokens of a batch are no padding: the argument ``attention_mask`` where there is one."""
    mask = inputs[1].get("attention_mask")
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None
