"""Opaque leaf modules: a call of one is a single node of the recording, whatever its code does.

A user registers the class with a rule for its axes. Its forward then runs outside of the recording, on real values,
so it may be anything: a kernel of one's own, numba, code that looks at values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from dwindle.graph.stand_ins import user_name

#: Writes a call down: the target, the flat inputs, the tensors of the module, the tensors of the result.
Write = Callable[["OpaqueTarget", list[Any], list[torch.Tensor], list[torch.Tensor]], None]


@dataclass(eq=False)
class OpaqueTarget:
    """What a node of an opaque module calls: the module's forward, with tensors given from outside.

    Attributes:
        kind: The registered class, or a subclass of it.
        path: Path of the module in the model.
        owner: Identity of the module, which its numbers are known by.
        module: A copy of the module that shares its tensors.
        names: Names of the parameters and buffers in the module, in the order in which they are given.
        input_spec: Tree structure of the positional and keyword arguments.
    """

    kind: type[nn.Module]
    path: str
    owner: int
    module: nn.Module
    names: list[str]
    input_spec: Any
    tags: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        """Look like an operator: nothing is mutated, and the name is that of the class."""
        self.__name__ = self.__qualname__ = f"opaque_{self.kind.__name__}"
        self._schema = SimpleNamespace(name=f"module::{self.kind.__name__}", is_mutable=False, arguments=[])

    def __call__(self, inputs: list[Any], tensors: list[torch.Tensor]) -> Any:
        """Run the forward; returns its one tensor, or all of them in a list."""
        found = tensors_of(self.result(inputs, tensors))
        return found[0] if len(found) == 1 else found

    def result(self, inputs: list[Any], tensors: list[torch.Tensor]) -> Any:
        """Run the forward; returns what it returns."""
        args, kwargs = pytree.tree_unflatten(list(inputs), self.input_spec)
        own = dict(zip(self.names, tensors, strict=True))
        return torch.func.functional_call(self.module, own, args, kwargs)

    def on(self, model: nn.Module) -> OpaqueTarget:
        """Return the same call on the module that stands at this path of another model."""
        module = model.get_submodule(self.path)
        held = dict(_tensors(module))
        names = [name if name in held else user_name(name) for name in self.names]
        return OpaqueTarget(self.kind, self.path, self.owner, structure(module), names, self.input_spec)


def tensors_of(result: Any) -> list[torch.Tensor]:
    """Return the tensors of a forward's result, in order."""
    return [item for item in pytree.tree_leaves(result) if isinstance(item, torch.Tensor)]


def structure(module: nn.Module) -> nn.Module:
    """Return a copy of a module, with numbers and containers of its own, that shares the tensors."""
    memo: dict[int, Any] = {id(tensor): tensor for _, tensor in _tensors(module)}
    return copy.deepcopy(module, memo)


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def kind_of(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module is opaque."""
    return isinstance(module, kinds) if kinds else False


def opaque_modules(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[str, nn.Module]:
    """Return the opaque modules of a model by path; those inside another one are part of it."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}." if outer else "") for outer in found)
        if not inside and kind_of(module, kinds):
            found[path] = module
    return found


@contextmanager
def recorded_as_nodes(
    copies: dict[str, nn.Module], model: nn.Module, training: bool, write: Write
) -> Iterator[None]:
    """While it lasts, calls of opaque modules are written down as one node each.

    Args:
        copies: Copies of the opaque modules (:func:`structure`) from before anything was tagged, by path.
        model: The model.
        training: The mode to run in.
        write: Writes a call down.
    """
    patched: list[nn.Module] = []
    try:
        for path, twin in copies.items():
            module = model.get_submodule(path)
            patched.append(module)
            module.__dict__["forward"] = _recording_forward(module, twin.train(training), path, write)
        yield
    finally:
        for module in patched:
            module.__dict__.pop("forward", None)


def _recording_forward(module: nn.Module, twin: nn.Module, path: str, write: Write) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        flat, spec = pytree.tree_flatten((args, kwargs))
        plain = [int(item) if isinstance(item, int) and type(item) is not bool else item for item in flat]
        held = dict(_tensors(module))
        target = OpaqueTarget(type(module), path, id(module), twin, list(held), spec)
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            result = target.result(plain, list(held.values()))
        write(target, plain, list(held.values()), tensors_of(result))
        return result

    return forward


__all__ = [
    "OpaqueTarget",
    "opaque_modules",
    "recorded_as_nodes",
    "structure",
    "tensors_of",
]
