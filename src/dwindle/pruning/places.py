"""Where the channels of a layer can be seen while the model runs: at its output, or where other layers read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config import Target
from dwindle.config.granularity import activation_axis, weight_axes
from dwindle.graph.nodes import Value
from dwindle.graph.positions import positions
from dwindle.pruning.coupling import Coupling
from dwindle.pruning.plan import PlannedTarget


@dataclass(frozen=True)
class Place:
    """An input or output of a module where channels can be seen.

    Attributes:
        target: ``_input_0`` or ``_output_0`` of a module.
        index: Which channel stands at each position of its channel dimension (-1 is none); None when they are
            the same.
    """

    target: Target
    index: Tensor | None = None


@dataclass(frozen=True)
class SeenChannels:
    """Channels of one target that are seen at the same places.

    Attributes:
        places: Where.
        index: For each channel of the target its number at the places (-1: it is not among them); None when they
            are the same.
    """

    places: tuple[Place, ...]
    index: Tensor | None = None

    def numbers(self, count: int) -> int:
        """Return how many channels the places tell apart, for a target of ``count`` channels."""
        return count if self.index is None else int(self.index.max()) + 1

    def spread(self, scores: Tensor, count: int) -> Tensor:
        """Return the scores of the target's ``count`` channels from those of the places' channels."""
        if self.index is None:
            return scores
        index = self.index.to(scores.device)
        return torch.where(index >= 0, scores[index.clamp(min=0)], torch.zeros((), dtype=scores.dtype))


def channels_seen(
    model: nn.Module, planned: PlannedTarget, coupling: Coupling | None, dimensions: int = 0
) -> list[SeenChannels]:
    """Return where the channels of a target are seen.

    Args:
        model: The model.
        planned: A target whose granularity is channels. Input channels are seen where the module gets them.
        coupling: What an analysis found: output channels are seen where other layers read them. With None, or
            where the analysis knows nothing of the target, they are seen at the module's own output.
        dimensions: As for :func:`reading_places`.
    """
    target, blocks = planned.target, planned.granularity
    out_axis, in_axis = weight_axes(type(model.get_submodule(target.module)), len(planned.shape))
    axis = blocks.axis % len(planned.shape)
    if axis == in_axis != out_axis:
        return [SeenChannels((Place(Target(target.module, "_input_0")),))]
    found = []
    if coupling is not None and blocks.groups == 1 and coupling.knows(target):
        for info, index in coupling.axes_of(target, axis)[0]:
            places = reading_places(coupling, info, target.module, dimensions)
            found.append(SeenChannels(tuple(places), index))
    if found and all(seen.places for seen in found):
        return found
    return [SeenChannels((Place(Target(target.module, "_output_0")),))]


def reading_places(coupling: Coupling, info: Any, own: str, dimensions: int = 0) -> list[Place]:
    """Return where the channels of an axis are seen as the layers that read them get them.

    That is behind norms, activation functions and additions, whatever they are. Where a reader only gets averages
    over places (behind a pooling), the last output of a module that still has the places is taken.

    Args:
        coupling: The analysis.
        info: The axis.
        own: Path of the module that makes the channels.
        dimensions: At least so many dimensions must be there; 0 takes as many as the module's own output has.
    """
    calls = coupling.analysis.trace.calls
    made = next((call.output for call in calls if call.path == own and isinstance(call.output, Value)), None)
    wanted = dimensions or (len(made.shape) if made is not None else 2)
    found = inputs_of_readers(coupling, info, wanted, flattened=not dimensions)
    if found:
        return found
    for call in reversed(calls):
        value = call.output
        if isinstance(value, Value) and len(value.shape) >= wanted and _called(coupling.modules[call.path]):
            index = _index(coupling, info, call.path, value)
            if index is not None:
                return [Place(Target(call.path, "_output_0"), index)]
    return []


def inputs_of_readers(
    coupling: Coupling, info: Any, dimensions: int = 1, *, flattened: bool = True
) -> list[Place]:
    """Return the inputs of the modules whose weights read the channels of an axis.

    Args:
        coupling: The analysis.
        info: The axis.
        dimensions: Inputs with fewer dimensions are left out.
        flattened: But not those whose places are flattened into the channels.
    """
    readers = {path.rpartition(".")[0] for path, dim in info.parameter_dims if coupling.is_reader(path, dim)}
    found: dict[Target, Place] = {}
    for call in coupling.analysis.trace.calls:
        value = call.inputs[0] if call.inputs else next(iter(call.keywords.values()), None)
        if call.path not in readers or value is None or not _called(coupling.modules[call.path]):
            continue
        index = _index(coupling, info, call.path, value)
        if index is None:
            continue
        wide = flattened and int((index >= 0).sum()) > info.size
        if len(value.shape) >= dimensions or wide:
            found[Target(call.path, "_input_0")] = Place(Target(call.path, "_input_0"), index)
    return list(found.values())


def _called(module: nn.Module) -> bool:
    """Whether a module is small enough to say where its channels stand: not a whole block of others."""
    return not any(True for _ in module.children())


def _index(coupling: Coupling, info: Any, path: str, value: Value) -> Tensor | None:
    """Return the index on an axis at each channel of a value; None where the value does not have the axis."""
    axis = activation_axis(type(coupling.modules[path]))
    if len(value.axes) != len(value.shape) or not -len(value.axes) <= axis < len(value.axes):
        return None
    return positions(value.axes[axis], coupling.analysis.memory).get(info.axis)


def onto_channels(values: Tensor, index: Tensor | None, size: int) -> Tensor:
    """Return the mean of the values of each channel.

    Args:
        values: ``[positions]``.
        index: The channel at each position (-1 is none); None when they are the same.
        size: Number of channels.

    Returns:
        ``[size]``, 0 for a channel that stands nowhere.
    """
    if index is None:
        return values
    index = index.to(values.device)
    here = index >= 0
    total = torch.zeros(size, dtype=values.dtype, device=values.device).index_add_(
        0, index[here], values[here]
    )
    return total / torch.bincount(index[here], minlength=size).clamp(min=1)


def hook_places(model: nn.Module, targets: list[Target], see: Any) -> Iterator[Any]:
    """Attach hooks that call ``see(target, tensor)`` with each input or output; they see what the module sees.

    Args:
        model: The model.
        targets: ``_input_0`` and ``_output_0`` targets.
        see: Called with the target and the tensor; returns None, or a tensor that takes its place.
    """
    for target in targets:
        module = model.get_submodule(target.module)
        if target.is_input:
            yield module.register_forward_pre_hook(_before(target, see), with_kwargs=True)
        else:
            yield module.register_forward_hook(_after(target, see))


def _before(target: Target, see: Any) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and isinstance(args[0], Tensor):
            changed = see(target, args[0])
            return None if changed is None else ((changed, *args[1:]), kwargs)
        name = next((key for key, value in kwargs.items() if isinstance(value, Tensor)), None)
        if name is None:
            return None
        changed = see(target, kwargs[name])
        return None if changed is None else (args, {**kwargs, name: changed})

    return hook


def _after(target: Target, see: Any) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return see(target, output)
        if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
            changed = see(target, output[0])
            return None if changed is None else type(output)([changed, *output[1:]])
        return None

    return hook
