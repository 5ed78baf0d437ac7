"""Runs the original and the small model side by side, batch by batch, and sums up what the layers of a pass lack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dwindle.realize.repairing.affine_calls import AffineCall, features_of, outputs_of
from dwindle.realize.repairing.layers import Layer
from dwindle.realize.repairing.least_squares import Moments
from dwindle.realize.repairing.recording import AffineMode, Branch, EnoughError, names_of, run
from dwindle.training.inputs import Inputs

Targets = dict[tuple[str, int], Tensor]


class _Watching(AffineMode):
    """Sees the calls of some layers and the sums of what they give, and ends the forward after the last of them."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], keys: Sequence[str]) -> None:
        super().__init__(names_of(model))
        self.layers = dict(zip(keys, layers, strict=True))
        self.missing = sum(layer.place.calls + len(layer.sums) for layer in layers)

    def follows(self, name: str) -> bool:
        """Only what a sum of this pass waits for."""
        return name in self.layers and bool(self.layers[name].sums)

    def on_affine(self, name: str, order: int, call: AffineCall, output: Tensor) -> Tensor:
        """Hand on the calls of the layers."""
        layer = self.layers.get(name)
        return output if layer is None else self._seen(self.on_layer(layer, order, call, output))

    def on_sum(self, branch: Branch, output: Tensor) -> Tensor:
        """Hand on their sums."""
        layer = self.layers.get(branch.name)
        if layer is None or branch.order not in layer.sums:
            return output
        return self._seen(self.on_layer_sum(layer, branch, output))

    def _seen(self, result: Tensor) -> Tensor:
        self.missing -= 1
        if not self.missing:
            raise EnoughError
        return result

    def on_layer(self, layer: Layer, order: int, call: AffineCall, output: Tensor) -> Tensor:
        """See one call of one layer."""
        raise NotImplementedError

    def on_layer_sum(self, layer: Layer, branch: Branch, output: Tensor) -> Tensor:
        """See the sum of what one call of a layer gave and something else."""
        raise NotImplementedError


class _Targets(_Watching):
    """Keeps what the original's layers and sums give, on the outputs that the small model still has."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        super().__init__(model, layers, [layer.source for layer in layers])
        self.outputs: Targets = {}
        self.sums: Targets = {}

    def on_layer(self, layer: Layer, order: int, call: AffineCall, output: Tensor) -> Tensor:
        """Copy the outputs."""
        kept = _kept(output, layer, call.output_dim)
        if layer.factor is not None:
            kept = kept * _along(layer.factor.to(kept), call.output_dim, kept.dim())
        self.outputs[layer.place.name, order] = kept
        return output

    def on_layer_sum(self, layer: Layer, branch: Branch, output: Tensor) -> Tensor:
        """Copy the sum."""
        channels_second = layer.place.operation.startswith("conv")
        self.sums[layer.place.name, branch.order] = _kept(
            output, layer, 1 if channels_second else output.dim() - 1
        )
        return output


def _kept(output: Tensor, layer: Layer, dim: int) -> Tensor:
    """Return a copy (later code may write into the tensor) of the outputs that are still there."""
    if layer.keep is None:
        return output.detach().clone()
    return output.detach().index_select(dim, layer.keep.to(output.device))


def _along(numbers: Tensor, dim: int, rank: int) -> Tensor:
    shape = [1] * rank
    shape[dim] = -1
    return numbers.view(shape)


@dataclass(slots=True)
class _Waiting:
    """A call whose target is only known when the sum that takes its result comes."""

    call: AffineCall
    features: Tensor
    residual: Tensor
    target: Tensor


class _Collecting(_Watching):
    """Sums up what the small model's layers lack, and gives the layers behind them what the original had."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        targets: _Targets,
        sums: dict[str, Moments],
        padding: Tensor | None,
    ) -> None:
        super().__init__(model, layers, [layer.place.name for layer in layers])
        self.targets, self.sums, self.padding = targets, sums, padding
        self.waiting: dict[tuple[str, int], _Waiting] = {}

    def on_layer(self, layer: Layer, order: int, call: AffineCall, output: Tensor) -> Tensor:
        """Note what one call lacks."""
        key = layer.place.name, order
        target = self.targets.outputs.pop(key, None)
        if target is None or target.shape != output.shape:
            return output  # experts that get other tokens
        wanted = outputs_of(call, target, self.padding)
        entry = _Waiting(
            call, self._features(layer, call, wanted), wanted - outputs_of(call, output, self.padding), wanted
        )
        if order in layer.sums:
            self.waiting[key] = entry
        else:
            self._add(layer, entry)
        return target.to(output.dtype)

    def on_layer_sum(self, layer: Layer, branch: Branch, output: Tensor) -> Tensor:
        """Ask the branch for what the sum still lacks, and go on with the original's sum."""
        key = layer.place.name, branch.order
        entry, target = self.waiting.pop(key, None), self.targets.sums.pop(key, None)
        if entry is None:
            return output
        if target is None or target.shape != output.shape:
            self._add(layer, entry)
            return output
        lacking = target - output.detach()
        if branch.scale is not None:
            scale = branch.scale
            tiny = 1e-6 * scale.abs().max()
            lacking = torch.where(scale.abs() > tiny, lacking / scale, torch.zeros_like(lacking))
        shape = entry.call.value.shape[:-1] if not entry.call.is_convolution else None
        lacking = lacking if shape is None else lacking.reshape(*shape, lacking.shape[-1])
        entry.residual = entry.residual + outputs_of(entry.call, lacking, self.padding)
        self._add(layer, entry)
        return output.copy_(target)

    def finish(self) -> None:
        """Take in the calls whose sum did not come."""
        for (name, _), entry in self.waiting.items():
            self._add(self.layers[name], entry)
        self.waiting.clear()

    def _features(self, layer: Layer, call: AffineCall, wanted: Tensor) -> Tensor:
        features = (
            features_of(call, self.padding) if layer.weight else wanted.new_zeros((*wanted.shape[:2], 0))
        )
        if layer.constant:
            features = torch.cat([features, features.new_ones((*features.shape[:2], 1))], dim=2)
        return features

    def _add(self, layer: Layer, entry: _Waiting) -> None:
        if not entry.features.shape[1]:
            return
        moments = Moments.of(entry.features, entry.residual, entry.target)
        own = self.sums.setdefault(layer.place.name, moments)
        if own is not moments:
            own.add(moments)


def collect(
    small: nn.Module,
    original: nn.Module,
    layers: Sequence[Layer],
    inputs: Inputs,
    sums: dict[str, Moments],
) -> None:
    """Add the moments of one batch for the layers of one pass.

    The layers before them run as they are, so what those still do wrong can be made up for here; among the layers
    of the pass each gets what the original's would have given it. A layer whose result is added to a residual stream
    aims at the original's sum: it also makes up for what the stream has lost (He et al., section 3.4).

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
    collecting = _Collecting(small, layers, targets, sums, padding_of(inputs))
    run(small, collecting, args, kwargs)
    collecting.finish()


def padding_of(inputs: Inputs) -> Tensor | None:
    """Return which tokens of a batch are no padding: the argument ``attention_mask`` where there is one."""
    mask = inputs[1].get("attention_mask")
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None
