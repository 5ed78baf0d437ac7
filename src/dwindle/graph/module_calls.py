"""Which module ran when during a recording: what it was given, what it gave back, and the operators in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dwindle.graph.nodes import Value


@dataclass(eq=False, slots=True)
class ModuleCall:
    """One call of one module.

    Attributes:
        path: Path of the module in the model.
        kind: Its class, as ``"package.module:Class"``.
        start: Number of the first recorded operator that ran inside.
        end: Number after the last one.
        inputs: Positional arguments: a :class:`Value` for a tensor, None for anything else.
        keywords: Keyword arguments that are tensors.
        output: What it returned: tensors as values, tuples, lists and mappings kept, None kept, and anything
            else as ``...``.
    """

    path: str
    kind: str
    start: int
    end: int = 0
    inputs: list[Value | None] = field(default_factory=list)
    keywords: dict[str, Value] = field(default_factory=dict)
    output: Any = None


def values_of_output(output: Any) -> Iterator[Value]:
    """Yield the values in the output of a call, in order."""
    if isinstance(output, Value):
        yield output
    elif isinstance(output, Mapping):
        for item in output.values():
            yield from values_of_output(item)
    elif isinstance(output, list | tuple):
        for item in output:
            yield from values_of_output(item)


@contextmanager
def recorded_calls(
    model: nn.Module,
    running: list[str],
    calls: list[ModuleCall],
    position: Callable[[], int],
    known: Callable[[torch.Tensor], Value | None],
) -> Iterator[None]:
    """Keep the path of the running module on top of ``running``, and write every call to ``calls``.

    Args:
        model: The model that runs.
        running: Paths of the modules that run now, innermost last.
        calls: Where calls are written, in the order in which they begin.
        position: Number of operators recorded so far.
        known: The value that stands for a tensor now; None for a tensor never seen.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    opened: list[ModuleCall | None] = []

    def plain(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return known(item)
        if isinstance(item, Mapping):
            return {key: plain(held) for key, held in item.items()}
        if isinstance(item, list | tuple):
            return type(item)(map(plain, item)) if type(item) in (list, tuple) else tuple(map(plain, item))
        return None if item is None else ...

    def enter(module: nn.Module, args: Any) -> None:
        path = paths.get(id(module))
        running.append(running[-1] if path is None else path)
        call = None
        if path is not None:
            kind = type(module)
            call = ModuleCall(path, f"{kind.__module__}:{kind.__qualname__}", position())
            call.inputs = [known(item) if isinstance(item, torch.Tensor) else None for item in args]
            calls.append(call)
        opened.append(call)

    def leave(_module: nn.Module, _args: Any, *rest: Any) -> None:
        running.pop()
        call = opened.pop()
        if (
            call is not None and len(rest) == 2
        ):  # after an exception there is no output, and nobody asks for the call
            kwargs, output = rest
            call.end = position()
            values = {key: known(item) for key, item in kwargs.items() if isinstance(item, torch.Tensor)}
            call.keywords = {key: value for key, value in values.items() if value is not None}
            call.output = plain(output)

    first = torch.nn.modules.module.register_module_forward_pre_hook(enter)
    second = torch.nn.modules.module.register_module_forward_hook(leave, with_kwargs=True, always_call=True)
    try:
        yield
    finally:
        first.remove()
        second.remove()
        # torch forgets the hook but not that it took keywords, and then warns everybody who compiles
        getattr(torch.nn.modules.module, "_global_forward_hooks_with_kwargs", {}).pop(second.id, None)
