"""What the pruners of NNI 2.x have beside those of 3.0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.compat.nni import compressor
from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.config.granularity import weight_axes

ConfigList = Sequence[Mapping[str, Any]]
MODES = ("normal", "global", "dependency_aware")


class Pruner(compressor.Pruner):
    """A pruner with the calls of NNI 2.x."""

    def compress(  # type: ignore[override]
        self, max_steps: int | None = None, max_epochs: int | None = None
    ) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
        """Make the masks."""
        return super().compress(max_steps, max_epochs)

    def _wrap_model(self) -> None:
        self.wrap_model()

    def _unwrap_model(self) -> None:
        self.unwrap_model()

    def show_pruned_weights(self, dim: int = 0) -> dict[str, list[int]]:
        """Print and return which indices of each masked weight still hold anything.

        Args:
            dim: The dimension; 0 is the output dimension of a layer.
        """
        modules = dict(self.bound_model.named_modules())
        found = {}
        for name, targets in self.get_masks().items():
            mask = targets.get("weight")
            if mask is None:
                continue
            axes = weight_axes(type(modules[name]), mask.dim()) if mask.dim() > 1 else (0,)
            rows = (mask != 0).movedim(axes[dim], 0).reshape(mask.shape[axes[dim]], -1).any(1)
            found[name] = rows.nonzero().flatten().tolist()
            print(f"{name}: {len(found[name])} of {rows.numel()} stay")
        return found

    def export_model(self, model_path: str, mask_path: str | None = None) -> None:
        """Save the masked weights, and the masks.

        Args:
            model_path: Gets the ``state_dict`` of the plain model, masked weights zero.
            mask_path: Gets ``{module: {target: mask}}``.
        """
        from dwindle import simulate

        torch.save(simulate.plain_state_dict(self.bound_model), model_path)
        if mask_path is not None:
            masks = {
                name: {key: mask.clone() for key, mask in own.items()}
                for name, own in self.get_masks().items()
            }
            torch.save(masks, mask_path)


def with_mode(
    config_list: ConfigList, mode: str, dummy_input: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the config and the further arguments that a mode of 2.x means.

    Args:
        config_list: The config.
        mode: ``normal``, ``global`` (one ranking for all layers of an entry) or ``dependency_aware`` (what belongs
            together in the model is masked together; needs ``dummy_input``).
        dummy_input: Example inputs.

    Raises:
        ConfigError: The mode is unknown, or has no input.
    """
    if mode not in MODES:
        raise ConfigError(f"mode {mode!r} is not one of {', '.join(MODES)}{did_you_mean(mode, MODES)}")
    entries = [dict(entry) for entry in config_list]
    if mode == "dependency_aware":
        if dummy_input is None:
            raise ConfigError("mode 'dependency_aware' needs dummy_input")
        inputs = tuple(dummy_input) if isinstance(dummy_input, tuple | list) else (dummy_input,)
        return entries, {"example_inputs": inputs}
    if mode == "global":
        for entry in entries:
            for key in ("sparsity", "sparsity_per_layer"):
                if key in entry:
                    entry["total_sparsity"] = entry.pop(key)
    return entries, {}
