"""Applies a plan to a live module, in place, and can take it back.

Parameters are replaced by new, smaller ones (the old objects are kept until the operation has succeeded), so that
an interrupted or refuted operation leaves the model exactly as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from dwindle.config.errors import RealizeError
from dwindle.graph.stand_ins import modules_of, user_name
from dwindle.graph.tagging import config_objects
from dwindle.realize.depth import BlockRemoval, ListCut, remove_blocks
from dwindle.realize.plan import AttributeChange, Plan
from dwindle.realize.standard_modules import standard_attributes

Undo = Callable[[], None]


def tensor_slots(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return, for each parameter, buffer and plain tensor attribute, every (module, key) that holds it.

    Keys are the names that the recording uses: the first name of a shared tensor.
    """
    slots: dict[str, list[tuple[nn.Module, str]]] = {}
    first: dict[int, str] = {}
    for path, module in modules_of(model):
        prefix = f"{path}." if path else ""
        for holder, parametrized in (
            (module._parameters, True),
            (module._buffers, False),
            (vars(module), False),
        ):
            for key, held in holder.items():
                if not isinstance(held, torch.Tensor):
                    continue
                name = user_name(prefix + key) if parametrized else prefix + key
                name = first.setdefault(id(held), name)
                slots.setdefault(name, []).append((module, key))
    return slots


def sliced(tensor: torch.Tensor, dims: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Return ``tensor`` with only the given indices of the given dimensions, in its own memory format."""
    result = tensor.detach()
    for dim, index in dims.items():
        result = result.index_select(dim, index.to(result.device))
    if (
        tensor.dim() == 4
        and tensor.is_contiguous(memory_format=torch.channels_last)
        and not tensor.is_contiguous()
    ):
        return result.contiguous(memory_format=torch.channels_last)
    return result.contiguous()


def sliced_like(old: torch.Tensor, dims: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Return the small version of ``old``: a parameter with its gradient and own attributes, or a plain tensor."""
    data = sliced(old, dims)
    if not isinstance(old, nn.Parameter):
        return data
    new = (
        type(old)(data, requires_grad=old.requires_grad)
        if type(old) is nn.Parameter
        else nn.Parameter(data, old.requires_grad)
    )
    vars(new).update({key: held for key, held in vars(old).items() if key != "_dwindle_value"})
    if old.grad is not None:
        new.grad = sliced(old.grad, dims)
    return new


def cut(
    model: nn.Module, plan: Plan
) -> tuple[dict[torch.Tensor, tuple[torch.Tensor, Mapping[int, torch.Tensor]]], Undo]:
    """Apply ``plan`` to ``model`` in place.

    Args:
        model: The model to change.
        plan: What to cut.

    Returns:
        For each replaced tensor its replacement and what was kept of it, and a function that undoes everything.

    Raises:
        RealizeError: The plan names a tensor the model lacks, or sizes do not fit. Nothing is changed then.
    """
    replaced: dict[torch.Tensor, tuple[torch.Tensor, Mapping[int, torch.Tensor]]] = {}
    steps: list[Undo] = []

    def undo() -> None:
        while steps:
            steps.pop()()

    try:
        modules: dict[int, nn.Module] = {}
        own_settings(model, [*plan.attributes, *plan.lists], steps)
        _add_biases(model, plan, steps, modules)
        slots = tensor_slots(model)
        _check(model, plan, slots)
        for name, dims in plan.keep.items():
            holders = slots[name]
            old = _held(*holders[0])
            new = sliced_like(old, dims)
            replaced[old] = (new, dims)
            for module, key in holders:
                _put(module, key, new)
                steps.append(partial(_put, module, key, old))
                modules[id(module)] = module
        for change in plan.attributes:
            _set_attribute(model, change, steps)
        for module in modules.values():
            for key, number in standard_attributes(module).items():
                before = vars(module)[key]
                if before != number:
                    module.__dict__[key] = number
                    steps.append(partial(module.__dict__.__setitem__, key, before))
    except Exception:
        undo()
        raise
    return replaced, undo


def _held(module: nn.Module, key: str) -> torch.Tensor:
    for holder in (module._parameters, module._buffers, vars(module)):
        found: Any = holder[key] if key in holder else None  # noqa: SIM401 - compiled modules have no ``get``
        if isinstance(found, torch.Tensor):
            return found
    raise RealizeError(f"{type(module).__name__} holds no tensor {key!r}")


def _put(module: nn.Module, key: str, tensor: torch.Tensor) -> None:
    if key in module._parameters:
        setattr(module, key, tensor)  # recurrent modules refresh their second list of weights here
    elif key in module._buffers:
        module._buffers[key] = tensor
    else:
        vars(module)[key] = tensor


def _check(model: nn.Module, plan: Plan, slots: Mapping[str, Any]) -> None:
    for name, dims in plan.keep.items():
        if name not in slots:
            raise RealizeError(f"the plan cuts {name!r}, which {type(model).__name__} does not have")
        shape = _held(*slots[name][0]).shape
        for dim, index in dims.items():
            if dim >= len(shape) or index.numel() > shape[dim] or int(index.max()) >= shape[dim]:
                raise RealizeError(
                    f"the plan keeps index {int(index.max())} of dimension {dim} of {name!r}, whose shape is "
                    f"{list(shape)}: it was made for another model"
                )


def _add_biases(model: nn.Module, plan: Plan, steps: list[Undo], modules: dict[int, nn.Module]) -> None:
    for path, size in plan.biases.items():
        module = model.get_submodule(path)
        if module.bias is not None:
            continue
        weight: Any = module.weight
        module.register_parameter(
            "bias", nn.Parameter(torch.zeros(size, dtype=weight.dtype, device=weight.device))
        )
        steps.append(partial(module.register_parameter, "bias", None))
        modules[id(module)] = module


def _owner(model: nn.Module, path: str) -> Any:
    owner: Any = model
    for part in path.split(".") if path else []:
        try:
            owner = owner[part] if isinstance(owner, nn.ModuleDict) else getattr(owner, part)
        except (AttributeError, KeyError) as error:
            raise RealizeError(
                f"the plan changes {path!r}, which {type(model).__name__} does not have"
            ) from error
    return owner


def own_settings(model: nn.Module, changes: Iterable[AttributeChange | ListCut], steps: list[Undo]) -> None:
    """Give a model copies of its configs, if any of them is to change: the caller may build others from his."""
    if not any(not isinstance(_owner(model, change.owner), nn.Module) for change in changes):
        return
    memo: dict[int, Any] = {}
    for module in model.modules():
        fields = vars(module)
        for key, held in list(config_objects(module)):
            fields[key] = copy.deepcopy(held, memo)
            steps.append(partial(fields.__setitem__, key, held))


def apply_settings(model: nn.Module, changes: Iterable[AttributeChange]) -> Undo:
    """Change numbers of modules and configs, in place; returns a function that takes it back."""
    steps: list[Undo] = []

    def undo() -> None:
        while steps:
            steps.pop()()

    changes = list(changes)
    try:
        own_settings(model, changes, steps)
        for change in changes:
            _set_attribute(model, change, steps)
    except Exception:
        undo()
        raise
    return undo


def _set_attribute(model: nn.Module, change: AttributeChange, steps: list[Undo]) -> None:
    fields = vars(_owner(model, change.owner))
    before = fields[change.key]
    if change.index is None:
        fields[change.key] = change.new
    else:
        items = list(before)
        items[change.index] = change.new
        fields[change.key] = torch.Size(items) if isinstance(before, torch.Size) else type(before)(items)
    steps.append(lambda: fields.__setitem__(change.key, before))


def drop_blocks(model: nn.Module, plan: Plan, undo: Undo) -> None:
    """Take the residual blocks of a plan out of a model that is cut; when that fails, undo the cut as well."""
    steps: list[Undo] = []
    try:
        entries = [BlockRemoval(path, True) for path in plan.entries]
        remove_blocks(model, [*plan.blocks, *entries], plan.lists, _owner, steps)
    except Exception:
        while steps:
            steps.pop()()
        undo()
        raise


def apply_plan(model: nn.Module, plan: Plan | Mapping[str, Any]) -> nn.Module:
    """Shrink a freshly constructed model as an earlier realization did. In place; returns the model.

    The values of the parameters are those of the fresh model: load the saved ones afterwards.

    Args:
        model: The model as its constructor makes it.
        plan: A :class:`Plan` or its JSON data.

    Raises:
        RealizeError: The plan does not fit the model, which is then unchanged.
    """
    plan = plan if isinstance(plan, Plan) else Plan.from_json(plan)
    _, undo = cut(model, plan)
    drop_blocks(model, plan, undo)
    apply_settings(model, plan.settings)
    return model
