"""What sits on a target: simulators, their order on one target, and the table of them on one module.

Everything of a module's simulators stands under one reserved name in it, so that a ``state_dict`` key with
that name in its path is a simulator's and every other key is the user's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, did_you_mean

RESERVED = "_dwindle"
"""The reserved name in a ``state_dict``: ``conv1._dwindle.weight.mask.value``."""

STAGES = ("low_rank", "gate", "mask", "quantize", "observe")
"""The order in which simulators of one target act."""


class MaskSimulator(nn.Module):
    """Applies a mask to what it is called with.

    Attributes:
        value: The mask, 1 stays and 0 goes; any shape that broadcasts to the target. Follows ``.to()``.
        apply_method: ``mul`` multiplies, ``add`` adds a large negative number where the mask is 0 (for
            inputs of a softmax; finite in the dtype of the target), ``bypass`` changes nothing.
        axis: For a mask with one dimension on an input or output: the dimension it runs along.
    """

    value: Tensor

    def __init__(self, mask: Tensor, apply_method: str = "mul", axis: int | None = None) -> None:
        super().__init__()
        self.apply_method = check_apply_method(apply_method)
        self.axis = axis
        self.register_buffer("value", mask)

    def forward(self, tensor: Tensor) -> Tensor:
        """Return the masked tensor, of the same shape and dtype."""
        if self.apply_method == "bypass":
            return tensor
        mask = self.value
        if self.axis is not None:
            shape = [1] * tensor.dim()
            shape[self.axis] = mask.numel()
            mask = mask.reshape(shape)
        if self.apply_method == "add":
            # Half of the lowest number: adding a score to it cannot reach -inf (whole rows would be NaN).
            lowest = torch.finfo(tensor.dtype).min / 2
            return tensor + torch.zeros_like(mask, dtype=tensor.dtype).masked_fill(mask == 0, lowest)
        return tensor * mask.to(tensor.dtype)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of it."""
        kept = self.value.float().mean().item() if self.value.numel() else 1.0
        return f"{self.apply_method}, {tuple(self.value.shape)}, {kept:.1%} stays"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take a mask of another shape (a full one for a compact one) from a checkpoint."""
        stored = state_dict.get(prefix + "value")
        if isinstance(stored, Tensor) and stored.shape != self.value.shape:
            self.value = torch.empty(stored.shape, dtype=self.value.dtype, device=self.value.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class SimulatorStack(nn.Module):
    """The simulators of one target, applied in the order of :data:`STAGES`."""

    def insert(self, stage: str, simulator: nn.Module) -> None:
        """Add a simulator in the place of its stage.

        Raises:
            ConfigError: The stage is unknown or taken.
        """
        if stage not in STAGES:
            hint = did_you_mean(stage, STAGES)
            raise ConfigError(f"stage {stage!r} is not one of {', '.join(STAGES)}{hint}")
        if stage in self._modules:
            owner = type(self._modules[stage]).__name__
            raise ConfigError(f"the stage {stage!r} of this target is taken by a {owner}")
        self._modules[stage] = simulator
        ordered = {name: self._modules[name] for name in STAGES if name in self._modules}
        self._modules.clear()
        self._modules.update(ordered)

    def forward(self, tensor: Tensor) -> Tensor:
        """Return the simulated tensor."""
        for simulator in self._modules.values():
            tensor = simulator(tensor)  # type: ignore[misc]
        return tensor


class SimulatorTable(nn.Module):
    """All simulators of one module, by the name of the target.

    Attributes:
        enabled: Whether they act; see :func:`dwindle.simulate.disabled`.
        inputs: For each input target its position and argument name in a call.
        hooks: Ids of the forward hooks, ``(before, after)``, -1 where there is none.
        calls: Hooks that watch operations: child, kind and id; None when no operation has a simulator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.inputs: dict[str, tuple[int | None, str | None]] = {}
        self.hooks = (-1, -1)
        self.calls: list[tuple[str, str, int]] | None = None
        self._absent_prefix: str | None = None
        self.register_load_state_dict_post_hook(_forgive_plain_checkpoint)

    def stacks(self) -> Iterator[tuple[str, SimulatorStack]]:
        """Yield the target names and their stacks; parts of a whole method (:mod:`dwindle.simulate.parts`) are none."""
        for name, own in self._modules.items():
            if isinstance(own, SimulatorStack):
                yield name, own

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._absent_prefix = None if any(key.startswith(prefix) for key in state_dict) else prefix
        super()._load_from_state_dict(state_dict, prefix, *args)


def _forgive_plain_checkpoint(table: SimulatorTable, incompatible: Any) -> None:
    """A checkpoint of the plain model knows no simulators: that is no missing key."""
    if table._absent_prefix is not None:
        prefix = table._absent_prefix
        incompatible.missing_keys[:] = [
            key for key in incompatible.missing_keys if not key.startswith(prefix)
        ]


def check_apply_method(method: str) -> str:
    """Return a mask's apply method.

    Raises:
        ConfigError: It is not one.
    """
    choices = ("mul", "add", "bypass")
    if method not in choices:
        hint = did_you_mean(method, choices)
        raise ConfigError(f"apply_method {method!r} is not one of {', '.join(choices)}{hint}")
    return method
