"""One forward that finds a model's affine calls: their order, their parameters, and where a constant can go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.quantization.calls import CallKey, CallMode, ModulePath, tensors_in, tensors_with_positions
from dwindle.realize.repairing.affine_calls import AffineCall, read_call

#: Operators that return their argument itself, unchanged, in evaluation mode.
_UNCHANGED = frozenset({"dropout", "alpha_dropout", "feature_dropout", "contiguous", "to", "float"})


class EnoughError(Exception):
    """Ends a forward early: what was looked for has been seen."""


def names_of(model: nn.Module) -> dict[int, str]:
    """Return the names of a model's parameters by identity (the first name of shared ones)."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


@dataclass(slots=True)
class Branch:
    """A tensor that is an affine call's result, up to a scale of its channels: what may be added to a residual stream.

    Attributes:
        name: Name of the call's weight.
        order: How many calls with this weight came before.
        scale: What the channels were multiplied with since; None is nothing.
        value: The tensor, kept alive so that its identity stays its own.
        before: The tensor it was made of, up to the call's own result.
    """

    name: str
    order: int
    scale: Tensor | None
    value: Tensor
    before: Branch | None = None


class AffineMode(CallMode):
    """Hands every affine call of a forward to :meth:`on_affine`, and every sum that takes its result to :meth:`on_sum`.

    Args:
        names: Names of parameters by identity.
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__(ModulePath())
        self.names = names
        self.used: Counter[str] = Counter()
        self.branches: dict[int, Branch] = {}

    def on_call(self, key: CallKey, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call."""
        operation = key.operation.split(".")[0]
        call = read_call(operation, args, kwargs, self.names)
        branch = self._latest(args)
        output = func(*args, **kwargs)
        if call is not None:
            name = self.names[id(call.weight)]
            order = self.used[name]
            self.used[name] += 1
            output = self.on_affine(name, order, call, output)
            if not call.is_norm:
                if self.follows(name):
                    self.branches[id(output)] = Branch(name, order, None, output)
                return output
        if branch is None or not isinstance(output, Tensor):
            return output
        if operation in ("add", "add_") and _adds_equals(args, kwargs):
            self.branches.pop(id(output), None)
            return self.on_sum(branch, output)
        if output is branch.value:
            if operation not in _UNCHANGED:
                del self.branches[id(output)]  # changed in place
            return output
        scale = _scale(operation, args, kwargs, call, branch, output)
        if scale is not None:
            whole = scale if branch.scale is None else branch.scale * scale
            self.branches[id(output)] = Branch(branch.name, branch.order, whole, output, branch)
        return output

    def _latest(self, args: tuple[Any, ...]) -> Branch | None:
        """Return the branch that was made last among the arguments."""
        found = [self.branches[id(item)] for item in args if id(item) in self.branches]
        places = {name: place for place, name in enumerate(self.used)}
        return max(found, key=lambda branch: places[branch.name]) if found else None

    def follows(self, name: str) -> bool:
        """Whether the results of a weight's calls are kept until they are added to something."""
        return True

    def on_affine(self, name: str, order: int, call: AffineCall, output: Tensor) -> Tensor:
        """See one affine call.

        Args:
            name: Name of its weight.
            order: How many calls with this weight came before in this forward.
            call: The call.
            output: Its result.

        Returns:
            What the model goes on with.
        """
        return output

    def on_sum(self, branch: Branch, output: Tensor) -> Tensor:
        """See a sum of a branch and something else of the same shape.

        Args:
            branch: What was added.
            output: The sum.

        Returns:
            What the model goes on with.
        """
        return output


def _adds_equals(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return (
        len(args) == 2
        and not kwargs
        and all(isinstance(item, Tensor) for item in args)
        and args[0].shape == args[1].shape
    )


def _scale(
    operation: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    call: AffineCall | None,
    branch: Branch,
    output: Tensor,
) -> Tensor | None:
    """Return what a call multiplies the channels of a branch with, in the shape of its result; None if it does more."""
    first = bool(args) and args[0] is branch.value
    if (
        operation in ("view", "reshape", "contiguous")
        and first
        and output.shape[-1] == branch.value.shape[-1]
    ):
        return None if branch.scale is not None else output.new_ones(())
    if call is not None and call.operation == "mul" and call.value is branch.value:
        return call.weight.detach()
    if call is not None and call.operation == "batch_norm" and call.value is branch.value:
        spread = (call.options["variance"] + call.options.get("eps", 1e-5)).sqrt()
        return (call.weight.detach() / spread).view(-1, *[1] * (output.dim() - 2))
    return None


@dataclass(slots=True)
class Place:
    """One weight and how a forward used it.

    Attributes:
        name: Name of the weight.
        bias: Name of the bias; None where there is none.
        shift: Name of the running mean that a constant can go into, for a convolution without bias before a norm.
        calls: How often it was used.
        operation: Name of the function.
        groups: Problems side by side.
        features: Of one problem, without the one that is always one.
        outputs: Of one problem.
        transposed: Whether the weight stands as ``[in, out]``.
        is_norm: Whether it scales channels one by one.
        sums: Which of the calls give a branch that is added to something and used nowhere else.
    """

    name: str
    bias: str | None
    shift: str | None
    calls: int
    operation: str
    groups: int
    features: int
    outputs: int
    transposed: bool
    is_norm: bool
    sums: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Recording:
    """The affine places of a model.

    Attributes:
        places: In the order of their first call.
        elsewhere: Names of parameters that something else uses too, so that they cannot be changed for one alone.
    """

    places: dict[str, Place] = field(default_factory=dict)
    elsewhere: set[str] = field(default_factory=set)


class _Recorder(AffineMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(names_of(model))
        self.buffers = {id(buffer): name for name, buffer in model.named_buffers()}
        self.found = Recording()
        self.roles: dict[str, set[str]] = {}
        self.made: dict[int, str] = {}
        self.uses: Counter[str] = Counter()
        self.alive: list[Tensor] = []  # identities stay unique only while the tensors live
        self.takers: Counter[int] = Counter()
        self.added: list[Branch] = []

    def on_call(self, key: CallKey, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call and note which parameters and results of affine calls it takes."""
        operation = key.operation.split(".")[0]
        call = read_call(operation, args, kwargs, self.names)
        output = super().on_call(key, func, args, kwargs)
        if not any(True for _ in tensors_in(output)):
            return output  # sizes and the like
        given = [tensor for _, tensor in tensors_with_positions(args, kwargs)]
        if id(output) in self.branches and all(tensor is not output for tensor in given):
            self.takers[id(output)] = 0  # it may have the place of one that is gone
        roles = set() if call is None else {id(call.weight), id(call.bias)}
        self.found.elsewhere |= {
            self.names[id(tensor)] for tensor in given if id(tensor) in self.names and id(tensor) not in roles
        }
        for tensor in given:
            if tensor is output and operation in _UNCHANGED:
                continue
            self.takers[id(tensor)] += 1
            if id(tensor) in self.made:
                self.uses[self.made[id(tensor)]] += 1
        if operation == "batch_norm" and args and id(args[0]) in self.made:
            mean = next((self.buffers[id(tensor)] for tensor in given if id(tensor) in self.buffers), None)
            place = self.found.places[self.made[id(args[0])]]
            if place.bias is None:
                place.shift = mean
        return output

    def on_sum(self, branch: Branch, output: Tensor) -> Tensor:
        """Note a sum."""
        self.added.append(branch)
        return output

    def on_affine(self, name: str, order: int, call: AffineCall, output: Tensor) -> Tensor:
        """Note one place."""
        bias = self.names.get(id(call.bias)) if call.bias is not None else None
        if name not in self.found.places:
            self.found.places[name] = Place(
                name, bias, None, 0, call.operation, call.groups, call.feature_count, call.output_count,
                call.is_transposed, call.is_norm,
            )  # fmt: skip
        self.found.places[name].calls += 1
        self.roles.setdefault(name, set()).add("weight")
        if bias is not None:
            self.roles.setdefault(bias, set()).add(f"bias of {name}")
        self.made[id(output)] = name
        self.alive.append(output)
        return output


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording:
    """Run a model once and note its affine places.

    Args:
        model: In evaluation mode.
        args: Positional inputs.
        kwargs: Keyword inputs.
    """
    recorder = _Recorder(model)
    with torch.no_grad(), recorder:
        model(*args, **kwargs)
    found = recorder.found
    found.elsewhere |= {name for name, roles in recorder.roles.items() if len(roles) > 1}
    for branch in recorder.added:
        if all(recorder.takers[id(value)] == 1 for value in _chain(branch)):
            found.places[branch.name].sums.add(branch.order)
    shifts = Counter(place.shift for place in found.places.values() if place.shift)
    for place in found.places.values():
        if place.bias is not None and place.bias in found.elsewhere:
            place.bias = None
        if place.shift and (shifts[place.shift] > 1 or recorder.uses[place.name] > 1 or place.calls > 1):
            place.shift = None
    return found


def _chain(branch: Branch | None) -> Iterator[Tensor]:
    while branch is not None:
        yield branch.value
        branch = branch.before


def run(model: nn.Module, mode: CallMode, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run a forward under a mode, until the mode has seen enough."""
    try:
        with torch.no_grad(), mode:
            model(*args, **kwargs)
    except EnoughError:
        return
