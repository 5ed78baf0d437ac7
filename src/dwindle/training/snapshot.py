"""A model as it was, for when something fails."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dwindle import simulate

__all__ = ["ModelSnapshot"]


class ModelSnapshot:
    """Parameters, buffers, flags and simulators of a model, to be put back after an exception.

    Args:
        model: The model as it is now.
        values: Keep copies of all parameters and buffers.
    """

    def __init__(self, model: nn.Module, *, values: bool):
        self._model = model
        self._flags = [(module, module.training) for module in model.modules()]
        self._values: list[tuple[Tensor, Tensor]] = []
        self._gradients: list[tuple[nn.Parameter, bool]] = []
        if values:
            tensors = [*model.parameters(), *model.buffers()]
            self._values = [(tensor, tensor.detach().clone()) for tensor in tensors]
            self._names = {id(tensor): name for name, tensor in model.named_parameters()}
            self._gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._simulators = [
            (target, stage, simulator, {key: value.clone() for key, value in simulator.state_dict().items()})
            for target, stack in simulate.simulated_targets(model).items()
            for stage, simulator in stack.named_children()
        ]

    def restore(self) -> None:
        """Put everything back in place, so that every tensor keeps its identity."""
        simulate.detach(self._model, keep_values=False)
        present = dict(self._model.named_parameters())
        with torch.no_grad():
            for tensor, saved in self._values:
                now = present.get(self._names.get(id(tensor), ""), tensor)
                if now is not tensor and simulate.is_shard(now):
                    simulate.write_whole(now, saved)  # cut up inside the block
                elif tensor.shape == saved.shape:
                    tensor.copy_(saved)
                else:
                    tensor.data = saved
        for target, stage, simulator, state in self._simulators:
            simulator.load_state_dict(state)
            simulate.register_simulator(self._model, target, simulator, stage)
        for parameter, requires_grad in self._gradients:
            parameter.requires_grad_(requires_grad)
        for module, training in self._flags:
            module.training = training
