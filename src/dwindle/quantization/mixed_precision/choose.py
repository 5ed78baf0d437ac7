"""Mixed precision in one call: sensitivities by HAWQ-v2, and the best bits under a compression ratio."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.quantization.mixed_precision import integer_program
from dwindle.quantization.mixed_precision.allocation import Assignment
from dwindle.quantization.mixed_precision.layer_bits import LayerBits
from dwindle.quantization.mixed_precision.layers import Address, Layer, Structure, examine, with_bits
from dwindle.quantization.mixed_precision.pareto import Frontier, assignment_of, groups_of, supported
from dwindle.quantization.mixed_precision.perturbation import Errors, activation_errors, weight_errors
from dwindle.quantization.mixed_precision.policies import Posed, check_policy, pose, pose_without_harm
from dwindle.quantization.mixed_precision.result import MixedPrecision
from dwindle.quantization.mixed_precision.sensitivity import Loss, Options, Traces, kept_batches, traces
from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.observers import Observer, make_observer
from dwindle.quantization.quantize import PRESETS
from dwindle.quantization.weights import check_weight_range
from dwindle.training.inputs import Inputs, forward_inputs

SOLVERS = ("pareto", "integer")


def choose_bits(
    model: nn.Module,
    data: Any,
    *,
    ratio: float = 1.5,
    cost: str = "bit_operations",
    bits: Sequence[int] = (2, 4, 8),
    activations: str | int = "sensitive",
    solver: str = "pareto",
    loss: Loss | str = nn.functional.cross_entropy,
    probes: int = 200,
    tolerance: float = 0.1,
    seed: int = 0,
    config_list: list[dict[str, Any]] | None = None,
    example_inputs: Any = None,
    backend: str = "layers",
    weight_range: str = "minmax",
    observer: str | Callable[[], Observer] = "histogram",
    adapt: Callable[[Any], Any] | None = None,
    max_batches: int | None = None,
) -> MixedPrecision:
    """Choose the bits of every layer by HAWQ-v2 (Dong et al. 2020, arXiv:1911.03852).

    The harm of a layer at ``b`` bits is the mean curvature of the loss at its weight times the squared error of
    rounding it. Of all choices that reach the compression ratio, the one of least harm is taken, exactly.

    Args:
        model: A trained float model; it is not changed.
        data: Batches, ``(inputs, target)`` or mappings with ``labels``; a few hundred samples, which are kept in
            memory. Losses by name need no labels.
        ratio: What everything in 8 bits costs, as a multiple of what the choice costs. 1.5 is NNCF's default.
        cost: ``"bit_operations"``: multiplications times the larger of the bits of weight and input, as NNCF counts
            complexity; or ``"size"``: bits of the weights.
        bits: The numbers of bits that may be chosen, 2 to 8.
        activations: How what layers read gets its bits: ``"sensitive"`` (by its own curvature and rounding error, as
            in HAWQ-v2; by far the best without training afterwards), ``"liberal"`` (the fewest of the weights that
            read it, NNCF's default), ``"strict"`` (weights that read the same, and what they read, have the same
            bits), or a number of bits for all.
        solver: ``"pareto"`` (the exact frontier, by dynamic programming) or ``"integer"`` (integer programming, needs
            scipy). Both find a best choice.
        loss: ``loss(outputs, target)``; ``"own_distribution"`` (the distance to the model's own distribution, whose
            curvature is never negative) or ``"own_outputs"`` (for outputs that are no logits) need no labels.
        probes: At most so many random directions for the traces.
        tolerance: They have settled when each standard error is at most this share of its trace.
        seed: Of the directions.
        config_list: Settings for single targets, which stay as they are: bits given by hand, or ``quant_dtype: None``.
        example_inputs: Arguments to record the model with; those of the first batch when not given.
        backend: Whose places: ``"layers"`` (inputs and weights of layers), ``"onnxruntime"`` or ``"openvino"``. Give
            ``dw.quantize`` the same.
        weight_range: As in ``dw.quantize``: ``"mse"`` clips weights where that loses least.
        observer: How ranges of activations are found, for ``"sensitive"``.
        adapt: Function from a batch to one of the forms above.
        max_batches: Take so many batches.

    Returns:
        The choice; its ``config_list`` is for ``dw.quantize`` and for training.

    Raises:
        ConfigError: An argument or the data do not fit, or the ratio cannot be reached.
        DwindleError: The loss or its curvature is not finite.
        MissingDependencyError: ``solver="integer"`` without scipy.
    """
    if solver not in SOLVERS:
        raise ConfigError(
            f"solver {solver!r} is not one of {', '.join(SOLVERS)}{did_you_mean(solver, SOLVERS)}"
        )
    numbers = checked_bits(bits)
    check_policy(activations)
    check_weight_range(weight_range)
    make = partial(make_observer, observer)
    make()
    options = Options(loss, probes, tolerance, seed)
    batches = kept_batches(model, data, options, max_batches, adapt)
    structure = examine(
        model, _example(model, example_inputs, batches), config_list, backend, default_levels(activations)
    )
    # What cannot be reached shows before the work is done.
    pose_without_harm(structure, numbers, activations, cost).problem.limit(ratio)

    found = traces(structure, batches, options, activations == "sensitive")
    rounding = weight_errors(structure, batches[0], numbers, weight_range == "mse")
    harms = _harms(found.layers.tolist(), rounding)
    read_harms = None
    if activations == "sensitive":
        read_harms = _harms(found.activations.tolist(), activation_errors(structure, batches, numbers, make))
    posed = pose(structure, numbers, activations, cost, harms, read_harms)
    assignment = best_assignment(posed, posed.problem.limit(ratio), solver)
    return result_of(posed, assignment, config_list, found, rounding)


def manual_bits(
    model: nn.Module,
    example_inputs: Any,
    bits: Mapping[str, int | tuple[int, int]] | None = None,
    *,
    config_list: list[dict[str, Any]] | None = None,
    backend: str = "layers",
) -> MixedPrecision:
    """Describe bits that were given by hand: what they compress, and the config_list that says them.

    Args:
        model: A float model; it is not changed.
        example_inputs: Arguments to record it with: a tensor, a tuple, or a mapping.
        bits: By name or pattern (``"stages.*"``) of layers: bits of weight and input, or of both. Of several that fit,
            the first holds; layers that none fits have 8.
        config_list: Settings besides.
        backend: Whose places, as in :func:`choose_bits`.

    Raises:
        ConfigError: A name fits no layer, or a number of bits is not possible.
    """
    example = forward_inputs(model, example_inputs, lambda batch: batch)
    structure = examine(model, example, config_list, backend, PRESETS["int8"].activation)
    entries = [*(config_list or []), *_entries(*_by_hand(structure, bits or {}))]
    own = examine(model, example, entries, backend, PRESETS["int8"].activation)
    layers = _layers_of(
        own, [layer.bits for layer in own.layers], [read.form.bits for read in own.activations]
    )
    return MixedPrecision(layers, entries)


def checked_bits(bits: Sequence[int]) -> tuple[int, ...]:
    """Return the numbers of bits that may be chosen, in order.

    Raises:
        ConfigError: There are none, or one is not from 2 to 8.
    """
    numbers = tuple(sorted(set(bits)))
    if not numbers:
        raise ConfigError("bits: there is nothing to choose from")
    for own in numbers:
        if isinstance(own, bool) or not isinstance(own, int) or not 2 <= own <= 8:
            raise ConfigError(f"bits: {own!r} is not a number from 2 to 8")
    return numbers


def default_levels(activations: str | int) -> NumberFormat:
    """Return the levels of activations that nothing else decides about."""
    form = PRESETS["int8"].activation
    return with_bits(form, activations) if isinstance(activations, int) else form


def _example(model: nn.Module, example_inputs: Any, batches: list[Any]) -> Inputs:
    if example_inputs is None:
        return batches[0][0], batches[0][1]
    return forward_inputs(model, example_inputs, lambda batch: batch)


def _harms(curvature: list[float], errors: Errors) -> Errors:
    """Return trace times mean squared error. A negative estimate counts by its size, as in Optimal Brain Damage."""
    return [
        {bits: abs(trace) * error for bits, error in own.items()}
        for trace, own in zip(curvature, errors, strict=True)
    ]


def best_assignment(posed: Posed, limit: int, solver: str = "pareto") -> Assignment:
    """Return the bits of least harm that cost at most ``limit``, exactly.

    Args:
        posed: The problem of a model.
        limit: A cost that can be reached.
        solver: ``"pareto"`` or ``"integer"``.
    """
    if solver == "integer":
        return integer_program.solve(posed.problem, limit)
    best = Frontier(groups_of(posed.problem), limit)
    return assignment_of(posed.problem, best.bits(best.best_within(limit)))


def result_of(
    posed: Posed,
    assignment: Assignment,
    config_list: list[dict[str, Any]] | None,
    found: Traces | None = None,
    rounding: Errors | None = None,
) -> MixedPrecision:
    """Return what an assignment means for a model.

    Args:
        posed: The problem of the model.
        assignment: The bits.
        config_list: What the user said besides.
        found: The traces, where they were estimated.
        rounding: Errors of weights, where they are known.
    """
    structure, problem = posed.structure, posed.problem
    weights, reads = posed.layer_bits(assignment), posed.activation_bits(assignment)
    corners = supported(groups_of(problem)) if found is not None else []
    return MixedPrecision(
        _layers_of(structure, weights, reads, found, rounding),
        [*(config_list or []), *_entries(*_chosen(structure, weights, reads))],
        problem.cost,
        problem.harm_of(assignment),
        tuple((problem.reference / own, harm) for own, harm in corners),
        found.probes if found is not None else 0,
        found.settled if found is not None else True,
    )


def _layers_of(
    structure: Structure,
    weights: Sequence[int],
    reads: Sequence[int],
    found: Traces | None = None,
    rounding: Errors | None = None,
) -> tuple[LayerBits, ...]:
    calls = structure.reads()
    layers = []
    for place, layer in enumerate(structure.layers):
        pairs = [(structure.macs[key], reads[calls[key][1].number]) for key in layer.calls]
        layers.append(
            LayerBits(
                layer.name,
                layer.calls[0].operation,
                weights[place],
                max(own for _, own in pairs),
                layer.size,
                layer.macs,
                sum(macs * max(weights[place], own) for macs, own in pairs),
                sum(macs * weights[place] * own for macs, own in pairs),
                layer.is_free,
                None if found is None else float(found.layers[place]),
                None if found is None else float(found.layer_errors[place]),
                {} if rounding is None else rounding[place],
            )
        )
    return tuple(layers)


Settings = dict[Address, NumberFormat]


def _chosen(structure: Structure, weights: Sequence[int], reads: Sequence[int]) -> tuple[Settings, Settings]:
    """Return the levels of every target whose bits could be chosen, of weights and of inputs."""
    own: Settings = {}
    for layer, bits in zip(structure.layers, weights, strict=True):
        if layer.is_free:
            own.update(dict.fromkeys(layer.addresses, with_bits(layer.place.form, bits)))
    inputs: Settings = {}
    for read, bits in zip(structure.activations, reads, strict=True):
        if not read.fixed:
            inputs.update(dict.fromkeys(read.addresses, with_bits(read.form, bits)))
    return own, inputs


def _entries(weights: Settings, inputs: Settings) -> list[dict[str, Any]]:
    """Return the config_list that says some levels: an entry for each target name and number of bits."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for settings in (weights, inputs):
        for (module, target), form in settings.items():
            dtype = f"{'' if form.signed else 'u'}int{form.bits}"
            grouped.setdefault((target, dtype, "symmetric" if form.symmetric else "affine"), []).append(
                module
            )
    return [
        {"op_names": modules, "target_names": [target], "quant_dtype": dtype, "quant_scheme": scheme}
        for (target, dtype, scheme), modules in grouped.items()
    ]


def _by_hand(structure: Structure, bits: Mapping[str, int | tuple[int, int]]) -> tuple[Settings, Settings]:
    weights: Settings = {}
    inputs: Settings = {}
    unused = dict.fromkeys(bits)
    calls = structure.reads()
    for layer in structure.layers:
        pattern = next((own for own in bits if _fits(layer, own)), None)
        if pattern is None:
            continue
        unused.pop(pattern, None)
        if not layer.is_free:
            raise ConfigError(f"{layer.name} cannot be given bits by name; is it in the config_list already?")
        given = bits[pattern]
        own, read = (given, given) if isinstance(given, int) else given
        weights.update(dict.fromkeys(layer.addresses, with_bits(layer.place.form, own)))
        for key in layer.calls:
            activation = calls[key][1]
            if (key.module, "_input_0") in activation.addresses and not activation.fixed:
                inputs[key.module, "_input_0"] = with_bits(activation.form, read)
    for pattern in unused:
        names = [name for layer in structure.layers for name, _ in layer.addresses]
        if not any(_fits(layer, pattern) for layer in structure.layers):
            raise ConfigError(f"bits: no layer is named {pattern!r}{did_you_mean(pattern, names)}")
    return weights, inputs


def _fits(layer: Layer, pattern: str) -> bool:
    names = [layer.name, *(module for module, _ in layer.addresses)]
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


__all__ = ["best_assignment", "checked_bits", "choose_bits", "default_levels", "manual_bits", "result_of"]
