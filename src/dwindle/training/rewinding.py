"""Rewinding: the state of a training at one step, kept and put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.simulate.simulators import RESERVED
from dwindle.training.checkpoint import copy_of_state

__all__ = ["Rewinding"]

Dims = Mapping[str, Mapping[int, Tensor]]


class Rewinding:
    """Keeps weights, buffers, optimizer and learning rate schedule as they are at step ``step``, and restores them.

    It is a compressor that changes nothing: give it to :func:`dwindle.training.compress` or ``fit`` in the first
    training run, so that it is told of the steps. Values are put back in place, so every parameter keeps its identity;
    masks that lie on the model stay.

    Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis" (https://arxiv.org/abs/1912.05671);
    step 0 is the original lottery ticket (https://arxiv.org/abs/1803.03635).

    Args:
        model: The model.
        optimizer: Its optimizer; None keeps the weights only.
        schedule: A learning rate scheduler, or anything else with ``state_dict`` and ``load_state_dict``.
        step: After how many optimizer steps; 0 is the state when this object is made.

    Raises:
        ConfigError: The step is negative.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        schedule: Any | None = None,
        *,
        step: int = 0,
    ) -> None:
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ConfigError(f"step must be a number of steps, at least 0, got {step!r}")
        self.model, self.optimizer, self.schedule, self.at = model, optimizer, schedule, step
        self.steps = 0
        self._kept: dict[str, Any] | None = None
        if step == 0:
            self.keep()

    @property
    def ready(self) -> bool:
        """Whether the step has come."""
        return self._kept is not None

    def attach(self) -> None:
        """Nothing is put on the model."""

    def detach(self) -> None:
        """Nothing is taken off."""

    def step(self) -> None:
        """The optimizer has made one step; at the chosen one the state is kept."""
        self.steps += 1
        if self._kept is None and self.steps == self.at:
            self.keep()

    def loss(self) -> float:
        """What to add to the loss: nothing."""
        return 0.0

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters: none."""
        yield from ()

    def keep(self) -> None:
        """Keep the state as it is now, in place of what was kept before."""
        state: dict[str, Any] = {"tensors": {}, "optimizer": None, "groups": None, "schedule": None}
        copies: dict[int, Tensor] = {}
        for name, tensor in _tensors(self.model):
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.detach().clone()
            state["tensors"][name] = copies[id(tensor)]
        if self.optimizer is not None:
            names = self._names()
            state["optimizer"] = {
                names[id(parameter)]: copy_of_state(entries)
                for parameter, entries in self.optimizer.state.items()
                if id(parameter) in names
            }
            state["groups"] = [
                {key: copy_of_state(value) for key, value in group.items() if key != "params"}
                for group in self.optimizer.param_groups
            ]
        if self.schedule is not None:
            state["schedule"] = copy_of_state(self.schedule.state_dict())
        self._kept = state

    def restore(self) -> int:
        """Put the kept state back, in place.

        Returns:
            The step that the training stands at now.

        Raises:
            DwindleError: The step has not come yet, or the model has other tensors or shapes now.
        """
        kept = self._state()
        present = dict(_tensors(self.model))
        for name, tensor in present.items():
            saved = kept["tensors"].get(name)
            if saved is None or saved.shape != tensor.shape:
                shown = "was not there" if saved is None else f"had shape {list(saved.shape)}"
                raise DwindleError(
                    f"{name} has shape {list(tensor.shape)} and {shown} at step {self.at}; after a cut call "
                    "follow(result.plan.keep) first"
                )
        with torch.no_grad():
            for name, tensor in present.items():
                tensor.copy_(kept["tensors"][name])
        if self.optimizer is not None:
            self._restore_optimizer(kept)
        if self.schedule is not None:
            self.schedule.load_state_dict(copy_of_state(kept["schedule"]))
        self.steps = self.at
        return self.at

    def _restore_optimizer(self, kept: Mapping[str, Any]) -> None:
        optimizer = self.optimizer
        assert optimizer is not None
        names = self._names()
        for parameter in [own for own in optimizer.state if id(own) in names]:
            del optimizer.state[parameter]
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                entries = kept["optimizer"].get(names.get(id(parameter), ""))
                if entries is not None:
                    optimizer.state[parameter] = copy_of_state(entries)
        for group, saved in zip(optimizer.param_groups, kept["groups"], strict=False):
            group.update(copy_of_state(saved))

    def follow(self, kept_indices: Dims) -> None:
        """Cut what is kept as the model was cut.

        Args:
            kept_indices: For each parameter or buffer, for each dimension, which indices stay: the ``plan.keep`` of
                a :class:`dwindle.realize.ShrinkResult`.
        """
        state = self._state()
        shapes = {name: tensor.shape for name, tensor in state["tensors"].items()}
        for name, dims in kept_indices.items():
            if name not in shapes:
                continue
            state["tensors"][name] = _cut(state["tensors"][name], dims)
            for key, held in (state["optimizer"] or {}).get(name, {}).items():
                if isinstance(held, Tensor) and held.shape == shapes[name]:
                    state["optimizer"][name][key] = _cut(held, dims)

    def _state(self) -> dict[str, Any]:
        if self._kept is None:
            raise DwindleError(
                f"the state at step {self.at} was never seen: the training told this object of {self.steps} steps. "
                "Give it to the run as a compressor"
            )
        return self._kept

    def _names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self.model.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on, what is kept included."""
        return {"steps": self.steps, "kept": copy_of_state(self._kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ConfigError: A key is missing.
        """
        missing = {"steps", "kept"} - set(state)
        if missing:
            raise ConfigError(f"the state of a rewinding needs {', '.join(sorted(missing))}")
        self.steps, self._kept = int(state["steps"]), copy_of_state(state["kept"])


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's own parameters and buffers, shared ones under each of their names."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if RESERVED not in name.split("."):
            yield name, parameter
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if RESERVED not in name.split("."):
            yield name, buffer


def _cut(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    for dim, index in dims.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor
