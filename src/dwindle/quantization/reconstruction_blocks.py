"""Which modules are reconstructed as one block, and what goes in and out of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.quantization.calls import CallKey, run_with, tensors_in
from dwindle.quantization.simulation import PlacedMode, Simulation
from dwindle.training.inputs import Inputs

LARGEST_BLOCK = 8
"""Quantized layers in one block, at most: a transformer's layer has six or seven, a residual block two to four."""


@dataclass(frozen=True)
class ReconstructionBlock:
    """A module whose roundings are learned together.

    Attributes:
        path: Path of the module.
        keys: Calls inside whose weights are rounded.
    """

    path: str
    keys: tuple[CallKey, ...]


@dataclass(frozen=True)
class Sample:
    """One call of a block: what goes in when all before is quantized, and what it should give.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        target: First floating output of the float model.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor


class _Reached(BaseException):
    """The block has been run; the rest of the forward is not needed. No model catches it by accident."""


def own_weights(model: nn.Module, simulation: Simulation) -> dict[CallKey, str]:
    """Return the names of the weights that are parameters and are read by one call alone, by call."""
    names = {key: slot.place.name for key, slot in simulation.slots.items()}
    owned = {name for name, _ in model.named_parameters()}
    readers = Counter(names.values())
    return {key: name for key, name in names.items() if name in owned and readers[name] == 1}


def find_blocks(
    model: nn.Module, simulation: Simulation, example: Inputs, *, single_layers: bool
) -> list[ReconstructionBlock]:
    """Return the blocks of a model, in the order in which they run.

    A block is the outermost module that holds at most :data:`LARGEST_BLOCK` quantized layers, runs once in a forward,
    and is no mere row of modules of one class with several layers each.

    Args:
        model: The model.
        simulation: Where its quantizers stand.
        example: Inputs to see which modules run.
        single_layers: Make each layer a block of its own (AdaRound) where a module holds it alone.
    """
    keys = list(own_weights(model, simulation))
    calls = _module_calls(model, simulation, example)
    chosen: dict[str, list[CallKey]] = {}
    for key in keys:
        path = key.module
        if not single_layers:
            parts = key.module.split(".")
            outer = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
            path = next((own for own in outer if _is_block(model, own, keys, calls)), key.module)
        if path == "" or calls[path] == 1:
            chosen.setdefault(path, []).append(key)
    return [ReconstructionBlock(path, tuple(found)) for path, found in chosen.items()]


def _inside(path: str, keys: Iterable[CallKey]) -> list[CallKey]:
    return [key for key in keys if key.module == path or key.module.startswith(f"{path}.")]


def _is_block(model: nn.Module, path: str, keys: list[CallKey], calls: Counter[str]) -> bool:
    own = _inside(path, keys)
    return (
        calls[path] == 1 and len(own) <= LARGEST_BLOCK and not _repeats(model.get_submodule(path), path, own)
    )


def _repeats(module: nn.Module, path: str, keys: list[CallKey]) -> bool:
    """Whether a module is a mere row of several modules of one class with several quantized layers each."""
    inside = {f"{path}.{name}": child for name, child in module.named_children()}
    several = {own: child for own, child in inside.items() if len(_inside(own, keys)) > 1}
    if len(several) == 1:
        own, child = next(iter(several.items()))
        return len(_inside(own, keys)) == len(keys) and _repeats(child, own, keys)
    return max(Counter(map(type, several.values())).values(), default=0) > 1


def _module_calls(model: nn.Module, simulation: Simulation, example: Inputs) -> Counter[str]:
    calls: Counter[str] = Counter()

    def counter(name: str) -> Any:
        def count(*_: Any) -> None:
            calls[name] += 1

        return count

    handles = [
        module.register_forward_pre_hook(counter(name)) for name, module in model.named_modules() if name
    ]
    try:
        run_with(model, PlacedMode(simulation), *example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def split_inputs(batches: Iterable[Inputs], size: int) -> list[Inputs]:
    """Return batches of at most ``size`` samples each; a batch whose tensors share no first dimension stays whole."""
    found: list[Inputs] = []
    for args, kwargs in batches:
        tensors = list(tensors_in([list(args), kwargs]))
        sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors}
        if len(sizes) != 1 or next(iter(sizes)) <= size:
            found.append((args, kwargs))
            continue
        for start in range(0, sizes.pop(), size):
            part = slice(start, start + size)
            found.append(
                (
                    tuple(_part(value, part) for value in args),
                    {name: _part(value, part) for name, value in kwargs.items()},
                )
            )
    return found


def _part(value: Any, part: slice) -> Any:
    if isinstance(value, Tensor):
        return value[part]
    if type(value) in (tuple, list):
        return type(value)([_part(item, part) for item in value])
    return value


def first_output(output: Any) -> Tensor:
    """Return the first floating tensor of a block's output."""
    return next(tensor for tensor in tensors_in(output) if tensor.is_floating_point())


def samples_of(
    model: nn.Module, path: str, inputs: Iterable[Inputs], simulated: PlacedMode, plain: PlacedMode
) -> list[Sample]:
    """Run a model on data and return what goes into a block and what should come out.

    Args:
        model: The model.
        path: The block.
        inputs: Data.
        simulated: Gives the arguments: everything before the block is quantized.
        plain: Gives the targets: nothing is.
    """
    found = []
    for args, kwargs in inputs:
        own_args, own_kwargs, _ = _run_to(model, path, simulated, args, kwargs)
        _, _, target = _run_to(model, path, plain, args, kwargs)
        found.append(Sample(own_args, own_kwargs, first_output(target).detach()))
    return found


def _run_to(model: nn.Module, path: str, mode: PlacedMode, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """Run a model until a block has run; return the block's arguments and its output."""
    if path == "":
        return args, kwargs, _restarted(model, mode, args, kwargs)
    seen: dict[str, Any] = {}

    def before(module: nn.Module, own_args: Any, own_kwargs: Any) -> None:
        seen["args"], seen["kwargs"] = _copied((own_args, own_kwargs), {})

    def after(module: nn.Module, own_args: Any, output: Any) -> None:
        seen["output"] = output
        raise _Reached

    block = model.get_submodule(path)
    handles = [
        block.register_forward_pre_hook(before, with_kwargs=True),
        block.register_forward_hook(after),
    ]
    try:
        _restarted(model, mode, args, kwargs)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
        mode.path.stack.clear()  # hooks that leave a module are passed over when the forward ends early
    return seen["args"], seen["kwargs"], seen["output"]


def _copied(value: Any, known: dict[int, Tensor]) -> Any:
    """Arguments as they are now, for a block may change them in place. What was one tensor stays one."""
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = value.detach().clone()
        return known[id(value)]
    if isinstance(value, dict):
        return {name: _copied(item, known) for name, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)([_copied(item, known) for item in value])
    return value


def _restarted(model: nn.Module, mode: PlacedMode, args: Any, kwargs: Any) -> Any:
    mode.counts.clear()
    return run_with(model, mode, args, kwargs)


def run_block(block: nn.Module, mode: PlacedMode, sample: Sample) -> Tensor:
    """Run a block alone, with gradients, under a mode whose path already follows its modules."""
    mode.counts.clear()
    mode.path.stack.clear()
    args, kwargs = _copied((sample.args, sample.kwargs), {})
    with torch.enable_grad(), mode:
        return first_output(block(*args, **kwargs))
