"""Modules that carry simulators: how a parameter is read through them, and how a call passes them.

A module with simulated parameters gets a subclass of its own class, with a property for each such
parameter that gives the simulated value. The parameter itself stays where it was, under its own name in
the module: optimizers, ``named_parameters``, ``state_dict``, ``functional_call`` and
``DistributedDataParallel`` see what they saw before. (``torch.nn.utils.parametrize`` would move it to
another name and another place in the order.)
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.simulate.sharding import is_shard, sharded_parameter
from dwindle.simulate.simulators import RESERVED, SimulatorTable

_MARK = "_dwindle_base"


def table_of(module: nn.Module) -> SimulatorTable | None:
    """Return the simulators of a module; None when it has none."""
    return module._modules.get(RESERVED)  # type: ignore[return-value]


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that the user gave the module."""
    return getattr(type(module), _MARK, (type(module),))[0]


def refresh(module: nn.Module) -> None:
    """Give a module the class that its simulators need: its own when there are none."""
    current = type(module)
    # ``fully_shard`` may have put a class of its own upon the one made here, or below it.
    made = next((own for own in current.__mro__ if _MARK in vars(own)), None)
    base = current if made is None else vars(made)[_MARK][0]
    table = table_of(module)
    wanted = base
    if table is not None:
        names = tuple(name for name, _ in table.stacks() if name in module._parameters)
        wanted = _simulated_class(base, names)  # type: ignore[arg-type]
    if made is not None:
        wanted = _upon(current, made, wanted)  # type: ignore[arg-type]
    module.__class__ = wanted


@functools.cache
def _upon(wrapper: type[nn.Module], old: type[nn.Module], new: type[nn.Module]) -> type[nn.Module]:
    """Return a class like ``wrapper``, which stands upon ``old``, but upon ``new``."""
    if wrapper is old:
        return new
    bases = [_upon(own, old, new) if issubclass(own, old) else own for own in wrapper.__bases__]  # type: ignore[arg-type]
    members = {name: own for name, own in vars(wrapper).items() if name not in ("__dict__", "__weakref__")}
    return type(wrapper.__name__, tuple(bases), members)


def without_wrapper(current: type[nn.Module], wrapper: type) -> type[nn.Module]:
    """Return a module's class without that which mixed ``wrapper`` in: ``fully_shard`` makes ``(FSDPModule, own)``."""
    if not issubclass(current, wrapper):
        return current
    if _MARK in vars(current):
        base, names = vars(current)[_MARK]
        return _simulated_class(without_wrapper(base, wrapper), names)  # type: ignore[arg-type]
    others = [own for own in current.__bases__ if own is not wrapper]
    return without_wrapper(others[0], wrapper) if wrapper in current.__bases__ and others else current


@functools.cache
def _simulated_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Return the subclass of ``base`` whose parameters ``names`` are read through their simulators."""
    namespace: dict[str, Any] = {name: _simulated_parameter(name) for name in names}
    namespace |= {_MARK: (base, names), "__reduce_ex__": _reduce, "__module__": base.__module__}
    namespace |= {"__qualname__": base.__qualname__, "__doc__": base.__doc__}
    if issubclass(base, nn.RNNBase) and names:
        namespace["_flat_weights"] = property(_flat_weights, _set_flat_weights)
    namespace |= _hidden_table(base)
    below = getattr(base, "_orig_cls_mro_index", None)
    if below is not None:  # ``fully_shard`` counts how far below its own class the user's stands
        namespace["_orig_cls_mro_index"] = below + 1
    return type(base.__name__, (base,), namespace)


def _simulated_parameter(name: str) -> property:
    def read(self: nn.Module) -> Any:
        parameter = self._parameters[name]
        table = self._modules[RESERVED]
        if parameter is None or not table.enabled:  # type: ignore[union-attr]
            return parameter
        if type(parameter) is not nn.Parameter and is_shard(parameter):
            return sharded_parameter(self, name, parameter)  # nobody computes with a part of it
        try:
            return table._modules[name](parameter)  # type: ignore[union-attr, misc]
        except AttributeError as error:
            # Python would go on with Module.__getattr__, which finds the parameter without its simulators.
            raise RuntimeError(f"a simulator of {name!r} failed: {error}") from error

    def write(self: nn.Module, value: Any) -> None:
        self._parameters[name] = value

    def remove(self: nn.Module) -> None:
        del self._parameters[name]

    return property(read, write, remove)


def _flat_weights(self: nn.RNNBase) -> list[Tensor | None]:
    """Recurrent layers keep a second list of their weights, which must be read through the simulators too."""
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _set_flat_weights(self: nn.RNNBase, value: list[Tensor]) -> None:
    """Keep the parameters themselves in the list that stands behind the property, never simulated values."""
    self.__dict__["_flat_weights"] = [self._parameters.get(name) for name in self._flat_weights_names]


def _hidden_table(base: type[nn.Module]) -> dict[str, Any]:
    """Return methods that hide the table from a module's children, but not from moves and modes."""

    def members(self: nn.Module) -> dict[str, nn.Module]:
        return {
            name: child for name, child in self._modules.items() if name != RESERVED and child is not None
        }

    def named_children(self: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        yield from members(self).items()

    def apply_to_all(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        if recurse:
            self._modules[RESERVED]._apply(fn)  # type: ignore[union-attr]
        return base._apply(self, fn, recurse)

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        self._modules[RESERVED].train(mode)  # type: ignore[union-attr]
        return base.train(self, mode)

    methods: dict[str, Any] = {"named_children": named_children, "_apply": apply_to_all, "train": train}
    if issubclass(base, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        methods["__len__"] = lambda self: len(members(self))
    if issubclass(base, nn.Sequential | nn.ModuleList):
        methods["__iter__"] = lambda self: iter(members(self).values())
        methods["__getitem__"] = _member_at
    if issubclass(base, nn.ModuleDict):
        methods["__iter__"] = lambda self: iter(members(self))
        methods["keys"] = lambda self: members(self).keys()
        methods["values"] = lambda self: members(self).values()
        methods["items"] = lambda self: members(self).items()
    return methods


def _member_at(self: nn.Module, index: Any) -> Any:
    values = [child for name, child in self._modules.items() if name != RESERVED]
    if isinstance(index, slice):
        chosen = values[index]
        return nn.Sequential(*chosen) if isinstance(self, nn.Sequential) else nn.ModuleList(chosen)  # type: ignore
    return values[index]


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """Copy and pickle: the made-up class is made again from the user's class."""
    reduced = super(type(self), self).__reduce_ex__(protocol)
    if reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
        return (_remake, getattr(type(self), _MARK), *reduced[2:])
    return reduced


def _remake(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls = _simulated_class(base, names)  # type: ignore[arg-type]
    return cls.__new__(cls)


def before_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pass the inputs of a call through their simulators (a forward hook)."""
    table = module._modules.get(RESERVED)
    if table is None or not table.enabled:
        return None
    changed = list(args)
    named = dict(kwargs)
    for name, (position, argument) in table.inputs.items():  # type: ignore[union-attr, operator]
        stack = table._modules[name]
        if position is not None and position < len(changed):
            changed[position] = _simulated(stack, changed[position])
        elif argument is not None and argument in named:
            named[argument] = _simulated(stack, named[argument])
    return tuple(changed), named


def after_call(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Pass the outputs of a call through their simulators (a forward hook)."""
    table = module._modules.get(RESERVED)
    if table is None or not table.enabled:
        return output
    for name, stack in table._modules.items():
        if name.startswith("_output_"):
            output = _with_output(output, int(name.removeprefix("_output_")), stack)
    return output


def _simulated(stack: Any, value: Any) -> Any:
    return stack(value) if isinstance(value, torch.Tensor) else value


def _with_output(output: Any, index: int, stack: Any) -> Any:
    """Return the output with its ``index``-th tensor simulated; tuples, lists and dicts count in order."""
    if isinstance(output, torch.Tensor):
        return stack(output) if index == 0 else output
    if isinstance(output, dict):
        keys = list(output)
        if index < len(keys):
            output[keys[index]] = _simulated(stack, output[keys[index]])
        return output
    if isinstance(output, list | tuple) and index < len(output):
        values = [*output[:index], _simulated(stack, output[index]), *output[index + 1 :]]
        if isinstance(output, list):
            return values
        return type(output)(*values) if hasattr(output, "_fields") else tuple(values)
    return output
