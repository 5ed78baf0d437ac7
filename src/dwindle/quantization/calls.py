"""Names for the calls that happen inside a model: module path, operation, and how often it came before.

A :class:`CallMode` sees every torch function that runs inside a model's forward, called by a module or by
plain code, and gives each a :class:`CallKey` that is the same in every forward. Recording, calibrating and
simulating are subclasses: all three name calls alike, because they share this code.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dwindle.config.errors import ConfigError


class CallKey(NamedTuple):
    """The name of one call inside a model's forward.

    Attributes:
        module: Path of the innermost module whose forward is running (``""`` is the model itself).
        operation: Name of the function (``conv2d``, ``add``).
        order: How many calls of this operation the module made before in this forward.
    """

    module: str
    operation: str
    order: int

    def __str__(self) -> str:
        return f"{self.module or '(model)'}/{self.operation}/{self.order}"


Position = tuple[int | str, ...]
"""Where a tensor stands among the arguments: an index or keyword, then indices inside lists."""


class ModulePath:
    """Knows which module's forward is running. Hooks on every module keep it."""

    def __init__(self) -> None:
        self.stack: list[str] = []

    @property
    def current(self) -> str:
        """Path of the innermost running module."""
        return self.stack[-1] if self.stack else ""


class EnterModule:
    """Forward pre-hook that notes that a module begins. A class, so that deepcopy and pickle carry it."""

    def __init__(self, path: ModulePath, name: str) -> None:
        self.path, self.name = path, name

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Push the module's path."""
        self.path.stack.append(self.name)


class LeaveModule:
    """Forward hook that notes that a module ended, also when it raised."""

    def __init__(self, path: ModulePath) -> None:
        self.path = path

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Pop the module's path."""
        if self.path.stack:
            self.path.stack.pop()


def track_modules(model: nn.Module, path: ModulePath) -> list[Any]:
    """Put hooks on every module below the root so that ``path`` follows the forward.

    Returns:
        The handles; call ``.remove()`` on each to take the hooks off again.
    """
    handles: list[Any] = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(EnterModule(path, name), prepend=True))
            handles.append(module.register_forward_hook(LeaveModule(path), always_call=True))
    return handles


def untrack_modules(model: nn.Module, path: ModulePath) -> None:
    """Take off the hooks that follow the forward for ``path``; a copy of a model has its own."""
    for module in model.modules():
        remove_hooks(module, lambda hook: isinstance(hook, EnterModule | LeaveModule) and hook.path is path)


def remove_hooks(module: nn.Module, unwanted: Callable[[Any], bool]) -> None:
    """Take the forward hooks and pre-hooks off a module that a function says are not wanted."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in [number for number, hook in hooks.items() if unwanted(hook)]:
            del hooks[number]
            module._forward_hooks_always_called.pop(number, None)


def _open(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a composite function whose own override check is off, so that its inside is seen."""
    assert isinstance(function, types.FunctionType)
    never = lambda *_: False  # noqa: E731
    hidden = dict.fromkeys(
        ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), never
    )
    clone = types.FunctionType(
        function.__code__,
        {**function.__globals__, **hidden},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    clone.__kwdefaults__ = function.__kwdefaults__
    return clone


_COMPOSITE: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: _open(F.multi_head_attention_forward),
}
"""Functions written in Python around others that matter here. A mode would see only their outside."""


class CallMode(TorchFunctionMode):
    """Names every call and hands it to :meth:`on_call`.

    Args:
        path: Follows the running module.
    """

    def __init__(self, path: ModulePath) -> None:
        super().__init__()
        self.path = path
        self.counts: Counter[tuple[str, str]] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Name the call, then let the subclass run it."""
        kwargs = kwargs or {}
        opened = _COMPOSITE.get(func)
        if opened is not None:
            with self:
                return opened(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "") or not self.watches(name):
            return func(*args, **kwargs)
        place = (self.path.current, name)
        key = CallKey(*place, self.counts[place])
        self.counts[place] += 1
        return self.on_call(key, func, args, kwargs)

    def watches(self, operation: str) -> bool:
        """Say whether calls of this operation are named and handed on. The same for a whole forward."""
        return True

    def on_call(self, key: CallKey, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call. Inside, the mode is off.

        Returns:
            What the call gives back to the model.
        """
        return func(*args, **kwargs)


def tensors_with_positions(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[Position, Tensor]]:
    """Yield the tensors among arguments, also inside lists and tuples, each with its position."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for first, value in places:
        if isinstance(value, Tensor):
            yield (first,), value
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                if isinstance(item, Tensor):
                    yield (first, index), item


def replace_at(
    args: tuple[Any, ...], kwargs: dict[str, Any], position: Position, change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments with the tensor at one position changed; nothing is changed in place."""
    first = position[0]
    value = args[first] if isinstance(first, int) else kwargs[first]
    if len(position) == 1:
        changed: Any = change(value)
    else:
        items = list(value)
        index = position[1]
        assert isinstance(index, int)
        items[index] = change(items[index])
        changed = type(value)(items) if type(value) in (list, tuple) else items
    if isinstance(first, int):
        return (*args[:first], changed, *args[first + 1 :]), kwargs
    return args, {**kwargs, first: changed}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield all tensors inside nested tuples, lists, dictionaries and (data) classes of outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def without_nan(inputs: tuple[tuple[Any, ...], dict[str, Any]], name: str) -> Any:
    """Return the inputs of a forward as they are.

    Args:
        inputs: Positional and keyword arguments.
        name: What the user calls them, for the message.

    Raises:
        ConfigError: They hold NaN.
    """
    for tensor in tensors_in([list(inputs[0]), inputs[1]]):
        if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
            raise ConfigError(f"{name} holds NaN")
    return inputs


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return an operation's output (a tensor, or a tuple or list of them) with floating tensors changed."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        items = [map_tensors(item, change) for item in value]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*items)
        return type(value)(items) if type(value) in (list, tuple) else tuple(items)
    return value


def run_with(model: nn.Module, mode: CallMode, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a model's forward once, in evaluation mode and without gradients, under a mode."""
    training = {module: module.training for module in model.modules()}
    handles = track_modules(model, mode.path)
    model.eval()
    try:
        with torch.no_grad(), mode:
            return model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, was in training.items():
            module.training = was
