"""What NNI 2.x had beside its pruners: sensitivity of layers, and masks applied for good."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle import pruning
from dwindle.config.errors import ConfigError, did_you_mean

_KINDS: dict[str, type[pruning.Pruner]] = {
    "l1": pruning.L1NormPruner,
    "l2": pruning.L2NormPruner,
    "fine-grained": pruning.LevelPruner,
}
_MODES = ("minimize", "maximize", "dropped", "raised")


class SensitivityAnalysis:
    """Measures a model with each of its layers masked alone, at rising ratios.

    Args:
        model: The model; as before after each measurement.
        val_func: ``f(model, *val_args, **val_kwargs)`` gives a number.
        sparsities: The ratios; None takes 0.1 to 0.9.
        prune_type: ``l1``, ``l2`` (output channels) or ``fine-grained`` (single weights).
        early_stop_mode: When a layer is measured no further: the number falls below (``minimize``) or rises above
            (``maximize``) ``early_stop_value``, or has ``dropped`` or ``raised`` by as much.
        early_stop_value: See above.

    Attributes:
        sensitivities: ``{layer: {ratio: number}}``, ratio 0 first.
    """

    def __init__(
        self,
        model: nn.Module,
        val_func: Callable[..., float],
        sparsities: Sequence[float] | None = None,
        prune_type: str = "l1",
        early_stop_mode: str | None = None,
        early_stop_value: float | None = None,
    ) -> None:
        if prune_type not in _KINDS:
            raise ConfigError(
                f"prune_type {prune_type!r} is not one of {', '.join(_KINDS)}{did_you_mean(prune_type, _KINDS)}"
            )
        if early_stop_mode is not None and early_stop_mode not in _MODES:
            hint = did_you_mean(early_stop_mode, _MODES)
            raise ConfigError(f"early_stop_mode {early_stop_mode!r} is not one of {', '.join(_MODES)}{hint}")
        if (early_stop_mode is None) != (early_stop_value is None):
            raise ConfigError("early_stop_mode and early_stop_value go together")
        self.model, self.val_func, self.kind = model, val_func, _KINDS[prune_type]
        self.sparsities = (
            sorted(sparsities) if sparsities is not None else [step / 10 for step in range(1, 10)]
        )
        if any(not 0 <= ratio <= 1 for ratio in self.sparsities):
            raise ConfigError(f"sparsities must lie between 0 and 1, got {self.sparsities}")
        self.mode, self.value = early_stop_mode, early_stop_value
        self.sensitivities: dict[str, dict[float, float]] = {}

    def analysis(
        self,
        val_args: Sequence[Any] | None = None,
        val_kwargs: Mapping[str, Any] | None = None,
        specified_layers: Sequence[str] | None = None,
    ) -> dict[str, dict[float, float]]:
        """Measure the convolutions, or the named layers.

        Args:
            val_args: Further arguments of ``val_func``.
            val_kwargs: Further keyword arguments.
            specified_layers: Names of layers; None takes all convolutions.

        Raises:
            ConfigError: A name is unknown, or there is no convolution.
        """
        modules = dict(self.model.named_modules())
        layers = specified_layers
        if layers is None:
            layers = [
                name for name, own in modules.items() if isinstance(own, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            ]
        if not layers:
            raise ConfigError("there is no layer to measure: name some with specified_layers")
        for name in layers:
            if name not in modules:
                raise ConfigError(f"specified_layers: there is no {name!r}{did_you_mean(name, modules)}")

        def measure() -> float:
            return float(self.val_func(self.model, *(val_args or ()), **(val_kwargs or {})))

        whole = measure()
        for name in layers:
            found = self.sensitivities[name] = {0.0: whole}
            for ratio in self.sparsities:
                pruner = self.kind(self.model, [{"op_names": [name], "sparse_ratio": ratio}])
                pruner.compress()
                try:
                    found[ratio] = measure()
                finally:
                    pruner.detach(keep_values=False)
                if self._stops(whole, found[ratio]):
                    break
        return self.sensitivities

    def _stops(self, whole: float, now: float) -> bool:
        if self.mode is None or self.value is None:
            return False
        return {
            "minimize": now < self.value,
            "maximize": now > self.value,
            "dropped": whole - now > self.value,
            "raised": now - whole > self.value,
        }[self.mode]

    def export(self, filepath: str | os.PathLike[str]) -> None:
        """Write a table, one row a layer and one column a ratio; empty where it was not measured."""
        ratios = [0.0, *self.sparsities]
        with open(filepath, "w", newline="") as opened:
            rows = csv.writer(opened)
            rows.writerow(["layername", *ratios])
            for name, found in self.sensitivities.items():
                rows.writerow([name, *(found.get(ratio, "") for ratio in ratios)])


def apply_compression_results(
    model: nn.Module,
    masks_file: str | os.PathLike[str] | Mapping[str, Mapping[str, Tensor | None]],
    map_location: Any = None,
) -> None:
    """Multiply masks into the parameters of a model, for good.

    Args:
        model: Changed in place.
        masks_file: ``{module: {parameter: mask}}``, or a file with it.
        map_location: Where a file's masks are loaded to.

    Raises:
        ConfigError: A parameter does not exist or has another shape; the model was not touched.
    """
    masks = masks_file
    if isinstance(masks, str | os.PathLike):
        masks = torch.load(masks, map_location=map_location, weights_only=True)
    parameters = dict(model.named_parameters())
    found: list[tuple[Tensor, Tensor]] = []
    for module, targets in masks.items():  # type: ignore[union-attr]
        for name, mask in targets.items():
            path = f"{module}.{name}" if module else name
            if mask is None:
                continue
            if path not in parameters:
                raise ConfigError(f"masks: there is no parameter {path!r}{did_you_mean(path, parameters)}")
            if parameters[path].shape != mask.shape:
                raise ConfigError(
                    f"masks: {path!r} has shape {list(parameters[path].shape)}, its mask {list(mask.shape)}"
                )
            found.append((parameters[path], mask))
    with torch.no_grad():
        for parameter, mask in found:
            parameter.mul_(mask.to(parameter))
