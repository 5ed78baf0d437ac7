"""Attaching simulators to the targets of a model, and taking them off again without a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.config.targets import Target, input_position
from dwindle.simulate.functional import unwatch
from dwindle.simulate.host import after_call, before_call, refresh, table_of
from dwindle.simulate.sharding import is_shard, sharded_parameter, whole, write_whole
from dwindle.simulate.simulators import RESERVED, SimulatorStack, SimulatorTable


def module_of(model: nn.Module, target: Target) -> nn.Module:
    """Return the module of a target, after checking that the target exists.

    Raises:
        ConfigError: There is no such module or parameter, or another parametrization computes it.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if target.module not in modules:
        raise ConfigError(
            f"{target}: the model has no module {target.module!r}{did_you_mean(target.module, modules)}"
        )
    module = modules[target.module]
    if target.is_parameter and module._parameters.get(target.name) is None:
        if parametrize.is_parametrized(module, target.name):
            raise ConfigError(
                f"{target} is computed by a parametrization of torch (weight norm?); take it off first "
                f"with torch.nn.utils.parametrize.remove_parametrizations"
            )
        names = [name for name, value in module._parameters.items() if value is not None]
        raise ConfigError(
            f"{target}: the module has no parameter {target.name!r}{did_you_mean(target.name, names)}"
        )
    parameter = module._parameters.get(target.name)
    if parameter is not None and is_shard(parameter):
        sharded_parameter(module, target.name, parameter)  # refuses other ways of cutting it up
    return module


def register_simulator(model: nn.Module, target: Target, simulator: nn.Module, stage: str = "mask") -> None:
    """Put a simulator on a target.

    Args:
        model: The model, changed in place. Its parameters stay the objects they are.
        target: A parameter, an input or an output of one of its modules.
        simulator: A module that takes the tensor and returns one of the same shape.
        stage: ``low_rank``, ``gate``, ``mask``, ``quantize`` or ``observe``: simulators of one target act in this
            order.

    Raises:
        ConfigError: The target does not exist, or the stage is unknown or taken.
    """
    module = module_of(model, target)
    table = table_of(module)
    fresh = SimulatorTable() if table is None else table
    old = fresh._modules.get(target.name)
    stack = SimulatorStack() if old is None else old
    stack.train(module.training)
    simulator.train(module.training)
    stack.insert(stage, simulator)  # type: ignore[operator]
    fresh._modules[target.name] = stack
    fresh.train(module.training)
    if target.is_input:
        fresh.inputs[target.name] = input_position(module, target.name)
    module._modules[RESERVED] = fresh
    _hook(module, fresh)
    refresh(module)


def simulator_of(model: nn.Module, target: Target, stage: str) -> nn.Module | None:
    """Return the simulator on a stage of a target; None when there is none.

    Args:
        model: The model that holds the target.
        target: Where the simulator sits.
        stage: One of :data:`dwindle.simulate.STAGES`.
    """
    table = table_of(module_of(model, target))
    stack = table._modules.get(target.name) if table is not None else None
    return stack._modules.get(stage) if stack is not None else None


def _hook(module: nn.Module, table: SimulatorTable) -> None:
    """Register the hooks that the table's inputs and outputs need; they run after the user's own."""
    before, after = table.hooks
    if before < 0 and table.inputs:
        before = module.register_forward_pre_hook(before_call, with_kwargs=True).id
    if after < 0 and any(name.startswith("_output_") for name in table._modules):
        after = module.register_forward_hook(after_call).id
    table.hooks = (before, after)


def _unhook(module: nn.Module, table: SimulatorTable) -> None:
    before, after = table.hooks
    if not table.inputs:
        module._forward_pre_hooks.pop(before, None)
        module._forward_pre_hooks_with_kwargs.pop(before, None)
        before = -1
    if not any(name.startswith("_output_") for name in table._modules):
        module._forward_hooks.pop(after, None)
        after = -1
    table.hooks = (before, after)


def simulated_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, SimulatorTable]]:
    """Yield the modules that carry simulators, under their first names, in the model's order."""
    for name, module in list(model.named_modules()):
        table = table_of(module)
        if table is not None:
            yield name, module, table


def simulated_targets(model: nn.Module, stage: str | None = None) -> dict[Target, nn.Module]:
    """Return what sits on the targets of a model: the simulators of one stage, or whole stacks with None."""
    found: dict[Target, nn.Module] = {}
    for name, _, table in simulated_modules(model):
        for target_name, stack in table.stacks():
            simulator = stack if stage is None else stack._modules.get(stage)
            if simulator is not None:
                found[Target(name, target_name)] = simulator
    return found


def detach(
    model: nn.Module,
    *,
    keep_values: bool = True,
    targets: list[Target] | None = None,
    stage: str | None = None,
) -> nn.Module:
    """Take simulators off: the exact inverse of attaching them.

    Args:
        model: The model, changed in place.
        keep_values: Leave what was simulated in the parameters (masked weights stay zero). With False the
            parameters stay as the optimizer has them. Inputs and outputs have no value to keep.
        targets: Only these targets; None is all.
        stage: Only this stage; None is all.

    Returns:
        The model.
    """
    for name, module, table in list(simulated_modules(model)):
        for target_name, stack in list(table.stacks()):
            if targets is not None and Target(name, target_name) not in targets:
                continue
            parameter = module._parameters.get(target_name)
            gone = [own for own in stack._modules if stage is None or own == stage]
            for own in gone:
                simulator = stack._modules.pop(own)
                if keep_values and parameter is not None and table.enabled:
                    _bake(parameter, simulator)  # type: ignore[arg-type]
            if not stack._modules:
                del table._modules[target_name]
                table.inputs.pop(target_name, None)
        _unhook(module, table)
        unwatch(module, table)
        if not table._modules:
            del module._modules[RESERVED]
        refresh(module)
    return model


def _bake(parameter: Tensor, simulator: nn.Module) -> None:
    with torch.no_grad():
        write_whole(parameter, simulator(whole(parameter)))


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """While inside, the model is as it was without simulators.

    Its modules have their own classes, its parameters are the original objects, and nothing of the simulators
    shows in ``named_modules``, ``named_buffers`` or ``state_dict``; so recordings and copies made inside are
    those of the plain model. Afterwards the simulators are back where they were, beside what was attached
    inside, and in the mode that the model has then.
    """
    carried = [(module, table) for _, module, table in simulated_modules(model)]
    for module, _ in carried:
        del module._modules[RESERVED]
        refresh(module)
    try:
        yield model
    finally:
        for module, table in carried:
            _put_back(module, table)


def _put_back(module: nn.Module, table: SimulatorTable) -> None:
    """Give a module its table again, together with the simulators that it got in the meantime."""
    newer = table_of(module)
    if newer is not None:
        kept = dict(newer.stacks())
        inputs = dict(newer.inputs)
        newer._modules.clear()
        newer.inputs.clear()
        _unhook(module, newer)  # one hook of each kind serves the whole table
        for name, stack in kept.items():
            own = table._modules.setdefault(name, SimulatorStack())
            for stage, simulator in stack._modules.items():
                own._modules.pop(stage, None)  # type: ignore[union-attr]
                own.insert(stage, simulator)  # type: ignore[union-attr, operator]
        table.inputs.update(inputs)
    module._modules[RESERVED] = table
    _hook(module, table)
    table.train(module.training)
    refresh(module)


def plain_state_dict(model: nn.Module, *, keep_values: bool = True) -> dict[str, Tensor]:
    """Return a ``state_dict`` that the plain model loads strictly: the user's own keys only.

    Args:
        model: A model with simulators; not changed.
        keep_values: Give the parameters as the model computes with them (masked weights are zero); with
            False as the optimizer has them.

    Of a model that ``fully_shard`` has cut up it has whole tensors; all processes call it together.
    """
    state = {key: value for key, value in model.state_dict().items() if RESERVED not in key.split(".")}
    state = {key: whole(value) if is_shard(value) else value for key, value in state.items()}
    if keep_values:
        with torch.no_grad():
            for name, module in model.named_modules(remove_duplicate=False):
                table = table_of(module)
                for target_name, stack in table.stacks() if table is not None and table.enabled else ():
                    key = f"{name}.{target_name}" if name else target_name
                    if key in state:
                        state[key] = stack(state[key]).detach()
    return state
