"""``dw.realize``: makes the masks of a model real, in place, with proof."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dwindle import simulate
from dwindle.config.errors import ConfigError
from dwindle.graph.analysis import Analysis, analyse_traces
from dwindle.graph.axes import Axis
from dwindle.graph.capture import capture
from dwindle.graph.counts import CountSolver
from dwindle.graph.positions import kept_positions
from dwindle.graph.trace import Trace
from dwindle.quantization.quantizers.binary import BinaryQuantizerBase
from dwindle.quantization.weight_only import PackedWeight
from dwindle.realize.activation_masks import as_parameter_masks
from dwindle.realize.carried_quantizers import carried_quantizers
from dwindle.realize.constants import ConstantPropagation, Constants
from dwindle.realize.shrink import ShrinkResult, shrink
from dwindle.realize.surgery import _held, tensor_slots

_CAN_TAKE_BIAS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def realize(
    model: nn.Module,
    example_inputs: Any = (),
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    masks: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    verify: bool = True,
    rewrite: bool | str = "auto",
) -> ShrinkResult:
    """Cut everything that masks (or zeros) made dead out of a model, in place.

    An index of an axis goes when every operator that sums over it gets zero or a constant there, or has zero
    weights there. Constants that removed channels still emitted (a bias, the shift of a norm) are folded into the
    bias of what consumes them. Masks are made permanent; what they masked but could not be cut stays as zeros.

    Args:
        model: The model, with masks attached by a pruner, or with plain zeros in its weights.
        example_inputs: A tensor, or a tuple of positional inputs.
        example_kwargs: Keyword inputs.
        masks: Masks to apply first, ``{module: {parameter: mask}}``, for models that carry none.
        optimizer: A live optimizer: its state is sliced and it goes on with the small model.
        verify: Prove in float64 that the small model equals the masked one.
        rewrite: Where sizes stand as literals in the user's code, return a rewritten graph instead of changing
            the model in place: ``"auto"`` when only that can cut what is dead, or True, or False.

    A model that is trained with quantizers (:class:`dwindle.quantization.TrainingQuantizer`) keeps them: the scales of
    channels that go are cut too.

    Raises:
        ConfigError: ``masks`` names what the model lacks, or something in it is quantized in a way that surgery
            would take off (binary, packed weights, inputs and outputs).
        CaptureError: The model fails on the inputs.
        RealizeError: The small model was not proven equal; the model is left as it was.
    """
    inputs = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
    simulate.refuse_shards(model, "dw.realize")
    _refuse_quantized(model)
    with carried_quantizers(model, optimizer) as carried:
        carried.result = _realize(
            model, inputs, dict(example_kwargs or {}), masks or {}, optimizer, verify, rewrite
        )
    return carried.result


def _realize(
    model: nn.Module,
    inputs: tuple[Any, ...],
    example_kwargs: dict[str, Any],
    masks: Mapping[str, Mapping[str, torch.Tensor]],
    optimizer: torch.optim.Optimizer | None,
    verify: bool,
    rewrite: bool | str,
) -> ShrinkResult:
    """See :func:`realize`."""
    asked = _checked_masks(model, masks)
    given = dict(asked)
    for name, mask in as_parameter_masks(model).items():
        given[name] = given[name] * mask if name in given else mask
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    with simulate.disabled(model):
        traces, args, kwargs = capture(model, inputs, example_kwargs)
    seconds["capture"] = time.perf_counter() - started
    started = time.perf_counter()
    tensors = _effective(model, given)
    choice = _choose(model, traces, args, kwargs, tensors, literals=rewrite is not True)
    seconds["analyse"] = time.perf_counter() - started
    rewritten = rewrite is True
    if rewrite == "auto" and any(
        "is a literal in the code" in (i.frozen_reason or "") for i in choice.analysis.axes
    ):
        other = _choose(model, traces, args, kwargs, tensors, literals=False)
        if other.removed() > choice.removed():
            choice, rewritten = other, True
    started = time.perf_counter()
    analysis, solver, keep = choice.analysis, choice.solver, choice.keep
    biases = _biases(choice.constants, keep, analysis)
    notes = _notes(choice.constants, keep)
    if rewritten:
        notes.append(
            "sizes stand as literals in the code: the result is a rewritten graph, the model is unchanged"
        )
    chosen = time.perf_counter() - started

    def prepare(copy: nn.Module) -> None:
        _apply(copy, given)
        simulate.detach(copy, keep_values=True)

    result = shrink(
        model,
        analysis,
        solver,
        keep,
        optimizer=optimizer,
        verify=verify,
        mask=lambda copy, plan: _apply(copy, asked),
        prepare=prepare,
        biases=biases,
        rewritten=rewritten,
    )
    result.seconds = {**seconds, **result.seconds, "shrink": result.seconds["shrink"] + chosen}
    result.notes += notes
    if not keep:
        result.notes.append("nothing was cut: no index of any axis is dead for every consumer")
    return result


@dataclass(slots=True)
class _Choice:
    """An analysis and what may go by it."""

    analysis: Analysis
    solver: CountSolver
    constants: Constants
    keep: dict[Axis, torch.Tensor]

    def removed(self) -> int:
        """How many indices go."""
        return sum(int((~chosen).sum()) for chosen in self.keep.values())


def _choose(
    model: nn.Module,
    traces: list[Trace],
    args: Any,
    kwargs: Any,
    tensors: dict[str, torch.Tensor],
    *,
    literals: bool,
) -> _Choice:
    analysis = analyse_traces(traces, args, kwargs, notes=[], literals=literals)
    constants = ConstantPropagation(analysis, tensors, lambda path: _takes_bias(model, path)).run()
    solver = _solver_for_all(analysis)
    return _Choice(analysis, solver, constants, _kept(constants, solver))


def _refuse_quantized(model: nn.Module) -> None:
    """Refuse what surgery would take off: without it, this would be another model, or no smaller one.

    Raises:
        ConfigError: Something is simulated as binary, stored in packed integers, or quantized at an input or output.
    """
    for target, simulator in simulate.simulated_targets(model, "quantize").items():
        if isinstance(simulator, BinaryQuantizerBase):
            raise ConfigError(
                f"{target} is simulated as binary: dw.pack_binary makes that real; cut the model before it is binarized"
            )
        if isinstance(simulator, PackedWeight):
            raise ConfigError(
                f"{target} is stored in packed integers, which cannot be cut: call dw.quantize_weights after dw.realize"
            )
        if not target.is_parameter:
            raise ConfigError(
                f"{target} is quantized by a {type(simulator).__name__}, which would be lost: cut the model before it "
                "is quantized, or detach the simulator"
            )


def _checked_masks(
    model: nn.Module, masks: Mapping[str, Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Masks by parameter name, after checking that each fits."""
    from dwindle.config.errors import did_you_mean

    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for module, targets in masks.items():
        for target, mask in targets.items():
            if mask is None:
                continue
            name = f"{module}.{target}" if module else target
            if name not in parameters:
                raise ConfigError(
                    f"masks: the model has no parameter {name!r}{did_you_mean(name, parameters)}"
                )
            if parameters[name].shape != mask.shape:
                raise ConfigError(
                    f"masks: {name!r} has shape {list(parameters[name].shape)}, its mask {list(mask.shape)}"
                )
            found[name] = mask
    return found


def _apply(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].data = parameters[name].data * mask.to(parameters[name])


def _effective(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters and buffers as the masked model uses them, by the names of the recording."""
    tensors = {name: _held(*holders[0]) for name, holders in tensor_slots(model).items()}
    for stage in ("low_rank", "gate"):
        for target, simulator in simulate.simulated_targets(model, stage).items():
            if target.is_parameter and target.path in tensors:
                tensors[target.path] = simulator(tensors[target.path].detach()).detach()
    attached = {
        target.path: mask for target, mask in simulate.get_masks(model).items() if target.is_parameter
    }
    for name, mask in {**attached, **masks}.items():
        if name in tensors:
            tensors[name] = tensors[name].detach() * mask.to(tensors[name])
    return tensors


def _takes_bias(model: nn.Module, path: str) -> bool:
    try:
        return isinstance(model.get_submodule(path), _CAN_TAKE_BIAS)
    except AttributeError:
        return False


def _solver_for_all(analysis: Analysis) -> CountSolver:
    """Constraints with every free axis as a variable: masks may fall on any."""
    free = [info.axis for info in analysis.axes if info.axis.frozen is None and info.size > 1]
    equalities = [pair for trace in analysis.traces for pair in trace.equalities]
    return CountSolver(analysis.scope, equalities, free)


def _kept(constants: Constants, solver: CountSolver) -> dict[Axis, torch.Tensor]:
    """Indices that stay, after giving back what sizes that must agree require."""
    keep = {leaf: ~gone for leaf, gone in constants.removable.items() if bool(gone.any())}
    for leaf in keep:
        if not bool(keep[leaf].any()):
            keep[leaf][0] = True  # a layer without outputs is no layer
    counts = solver.solve(
        {leaf: int(keep[leaf].sum()) if leaf in keep else leaf.size for leaf in constants.removable}
    )
    for leaf, chosen in keep.items():
        missing = counts[leaf] - int(chosen.sum())
        if missing > 0:
            chosen[(~chosen).nonzero().flatten()[:missing]] = True
    return {leaf: chosen for leaf, chosen in keep.items() if not bool(chosen.all())}


def _biases(
    constants: Constants, keep: dict[Axis, torch.Tensor], analysis: Analysis
) -> dict[str, torch.Tensor]:
    """What folding adds to the bias of each consumer, at full size."""
    biases: dict[str, torch.Tensor] = {}
    for entry in constants.sums:
        stay = kept_positions(entry.axis, keep, analysis.memory)
        if stay is None:
            continue
        gone = torch.ones(entry.contribution.shape[1], dtype=torch.bool)
        gone[stay] = False
        delta = entry.contribution[:, gone].sum(1)
        if bool((delta != 0).any()):
            biases[entry.module] = biases.get(entry.module, torch.zeros_like(delta)) + delta
    return biases


def _notes(constants: Constants, keep: dict[Axis, torch.Tensor]) -> list[str]:
    given_back = sum(
        int(gone.sum()) - int((~keep[leaf]).sum() if leaf in keep else 0)
        for leaf, gone in constants.removable.items()
    )
    notes = []
    if given_back:
        notes.append(
            f"{given_back} dead indices stay, because sizes must agree with axes that are not dead there"
        )
    if constants.padded:
        notes.append(
            f"masked channels still emit a constant into the zero-padded convolution {constants.padded[0]!r}, where it "
            "cannot be folded into a bias: they stay. Mask the norm and bias behind the masked weight as well "
            "(pruners do so when they are given example_inputs)"
        )
    return notes
