"""Operations that are no modules (``x + y``, ``F.relu(x)``, ``q @ k``) as places for simulators.

An operation is named by the module whose ``forward`` calls it, by its own name, and by its number among the calls
of that name in one ``forward`` (calls inside of child modules belong to those). While a module with such places
runs, a ``TorchFunctionMode`` looks at its calls; every other module runs as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.simulate.host import refresh, table_of
from dwindle.simulate.simulators import RESERVED, SimulatorStack, SimulatorTable

_PREFIX = "_call_"


@dataclass(frozen=True, order=True)
class OperationTarget:
    """One operation in the ``forward`` of a module.

    Attributes:
        module: Path of the module whose ``forward`` calls it, ``""`` for the model itself.
        operation: Name of the function: ``add`` for ``x + y`` and ``torch.add``, ``relu`` for ``F.relu``.
        call: Number of the call among those of this name, from 0.
        input: Position of the input that is simulated; None is the output.
    """

    module: str
    operation: str
    call: int = 0
    input: int | None = None

    @property
    def name(self) -> str:
        """Name of its stack in the table of the module."""
        place = "output_0" if self.input is None else f"input_{self.input}"
        return f"{_PREFIX}{self.operation}_{self.call}_{place}"


def operation_name(function: Any) -> str:
    """Return the name of a torch function: ``x + y``, ``x += y`` and ``torch.add(x, y)`` are all ``add``."""
    name = str(getattr(function, "__name__", ""))
    bare = name.strip("_")
    if name.startswith("__") and bare[:1] in "ir" and bare[1:] in _OPERATORS:
        return bare[1:]
    return bare


_OPERATORS = {"add", "sub", "mul", "matmul", "truediv", "floordiv", "pow", "div", "and", "or", "xor"}


class _Calls(TorchFunctionMode):
    """Counts the calls of one ``forward`` and passes those that have simulators through them.

    Attributes:
        table: The simulators of the module that runs.
        depth: How many child modules are running; their calls are theirs.
        seen: How often each operation was called so far.
    """

    def __init__(self, table: SimulatorTable) -> None:
        super().__init__()
        self.table = table
        self.depth = 0
        self.seen: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operation_name(func)
        if self.depth or not name or name == "get":
            return func(*args, **kwargs)
        number = self.seen.get(name, 0)
        self.seen[name] = number + 1
        stacks = self.table._modules
        changed = list(args)
        for position, value in enumerate(args):
            stack = stacks.get(f"{_PREFIX}{name}_{number}_input_{position}")
            if stack is not None and isinstance(value, Tensor):
                changed[position] = stack(value)
        result = func(*changed, **kwargs)
        stack = stacks.get(f"{_PREFIX}{name}_{number}_output_0")
        return stack(result) if stack is not None and isinstance(result, Tensor) else result


class _Recorder(_Calls):
    """Only counts."""

    def __init__(self) -> None:
        super().__init__(SimulatorTable())


class _Watch:
    """Enters the mode before a module's ``forward`` and leaves it after; pauses it in the children.

    One object for each module, copied with it: it holds no reference to the module.
    """

    def __init__(self, recorder: bool = False) -> None:
        self.recorder = recorder
        self.running: list[_Calls | None] = []
        self.result: dict[str, int] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watch:
        copied = memo[id(self)] = _Watch(self.recorder)
        return copied

    def enter(self, module: nn.Module, args: Any) -> None:
        table = table_of(module)
        mode: _Calls | None = None
        if self.recorder:
            mode = _Recorder()
        elif table is not None and table.enabled:
            mode = _Calls(table)
        self.running.append(mode)
        if mode is not None:
            mode.__enter__()

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        mode = self.running.pop()
        if mode is not None:
            mode.__exit__(None, None, None)
            self.result = dict(mode.seen)

    def pause(self, module: nn.Module, args: Any) -> None:
        if self.running and self.running[-1] is not None:
            self.running[-1].depth += 1

    def go_on(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.running and self.running[-1] is not None:
            self.running[-1].depth -= 1

    def register(self, module: nn.Module) -> list[tuple[nn.Module, str, int]]:
        """Hook a module and its children; returns where, to undo it."""
        handles = [
            (module, "_forward_pre_hooks", module.register_forward_pre_hook(self.enter).id),
            (module, "_forward_hooks", module.register_forward_hook(self.leave, always_call=True).id),
        ]
        for name, child in module.named_children():
            if name != RESERVED:
                handles.append((child, "_forward_pre_hooks", child.register_forward_pre_hook(self.pause).id))
                after = child.register_forward_hook(self.go_on, always_call=True).id
                handles.append((child, "_forward_hooks", after))
        return handles


def operations(model: nn.Module, module: str, *args: Any, **kwargs: Any) -> dict[str, int]:
    """Run the model once and return how often each operation is called in one module's own ``forward``.

    Args:
        model: The model; not changed.
        module: Path of the module.
        *args: Inputs of the model.
        **kwargs: Inputs by name.

    Raises:
        ConfigError: There is no such module.
    """
    watch = _Watch(recorder=True)
    handles = watch.register(_module(model, module))
    try:
        model(*args, **kwargs)
    finally:
        _remove(handles)
    return watch.result


def register_operation_simulator(
    model: nn.Module, target: OperationTarget, simulator: nn.Module, stage: str = "mask"
) -> None:
    """Put a simulator on an operation. The model stays eager: such a module does not compile as one graph.

    Args:
        model: The model, changed in place.
        target: The operation.
        simulator: A module that takes the tensor and returns one of the same shape.
        stage: As in :func:`dwindle.simulate.register_simulator`.

    Raises:
        ConfigError: There is no such module, or the stage is unknown or taken.
    """
    module = _module(model, target.module)
    table = table_of(module)
    fresh = SimulatorTable() if table is None else table
    old = fresh._modules.get(target.name)
    stack = SimulatorStack() if old is None else old
    stack.insert(stage, simulator)  # type: ignore[operator]
    if fresh.calls is None:
        watch = _Watch()
        fresh.calls = [(name, kind, number) for name, kind, number in _by_name(module, watch)]
    fresh._modules[target.name] = stack
    fresh.train(module.training)
    module._modules[RESERVED] = fresh
    refresh(module)


def unwatch(module: nn.Module, table: SimulatorTable) -> None:
    """Take the hooks off again when no operation of the module has a simulator any more."""
    if table.calls is None or any(name.startswith(_PREFIX) for name in table._modules):
        return
    owners = {"": module, **dict(module.named_children())}
    _remove([(owners[name], kind, number) for name, kind, number in table.calls if name in owners])
    table.calls = None


def _by_name(module: nn.Module, watch: _Watch) -> list[tuple[str, str, int]]:
    names = {id(child): name for name, child in module.named_children()}
    return [(names.get(id(owner), ""), kind, number) for owner, kind, number in watch.register(module)]


def _remove(handles: list[tuple[nn.Module, str, int]]) -> None:
    for module, kind, number in handles:
        getattr(module, kind).pop(number, None)
        module._forward_hooks_always_called.pop(number, None)


def _module(model: nn.Module, name: str) -> nn.Module:
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        raise ConfigError(f"the model has no module {name!r}{did_you_mean(name, modules)}")
    return modules[name]
