"""``dw.repair``: makes up for what pruning took away, without labels and without training, in closed form."""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dwindle import simulate
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.graph.modes import modes_kept
from dwindle.quantization.calls import tensors_in
from dwindle.realize.repairing.affine_calls import to_weight
from dwindle.realize.repairing.collecting import collect, padding_of
from dwindle.realize.repairing.correspondence import correspondence
from dwindle.realize.repairing.layers import Layer, pair_layers, passes_of
from dwindle.realize.repairing.least_squares import Fit, Moments, fit
from dwindle.realize.repairing.recording import record
from dwindle.realize.repairing.report import LayerRepair, RepairReport
from dwindle.realize.shrink import ShrinkResult
from dwindle.training.inputs import Inputs, input_batches
from dwindle.training.progress import tracked

PARTS = ("weights", "biases", "norms")

#: Passes over the data, and bytes of the sums of one pass.
PASSES, MEMORY = 8, 1 << 30

#: Samples of a batch when one tensor is given as data.
_BATCH = 16

#: Every so many batches one is held out.
_HOLD_OUT = 4


def repair(
    model: nn.Module | ShrinkResult,
    original: nn.Module,
    data: Any,
    *,
    parts: Sequence[str] = PARTS,
    passes: int = PASSES,
    batches: int | None = None,
    adapt: Callable[[Any], Any] | None = None,
    memory: int = MEMORY,
) -> RepairReport:
    """Change the weights of a pruned model so that its layers give again what the original's gave.

    Each linear layer, convolution and norm is fitted by ridge regression to the original's outputs on the channels that
    are still there, given the inputs that it has now: constants that removed channels emitted go into biases (or into
    the running mean of the norm behind), what other channels can tell of the removed ones goes into weights. Entries
    of a weight that are zero stay zero, so unstructured pruning is repaired as well as structured. The strength of
    the regularization is chosen on inputs that are held out (one batch of four); a layer whose held-out error would
    grow is left, and if the outputs of the whole model on held-out inputs get worse, everything is taken back.

    He, Zhang and Sun, "Channel pruning for accelerating very deep neural networks" (arXiv:1707.06168).

    Args:
        model: The pruned model (changed in place), or the result of :func:`dwindle.prune` or :func:`dwindle.realize`.
            It may carry masks.
        original: The model before it was pruned: a copy made before, or a fresh one with the same weights.
        data: A few hundred unlabelled inputs: an iterable of batches (labels in them are left out), or one tensor.
            Related samples (crops of one picture) should lie together, so that held-out ones are new.
        parts: What may change: ``"weights"``, ``"biases"`` (and running means that stand for them), ``"norms"`` (scale
            and shift of norms).
        passes: How many times the data goes through both models. Each pass repairs some neighbouring layers, given what
            those before them do after their repair; more passes follow the errors more closely.
        batches: How many batches of ``data`` are used; None takes all. When ``data`` ends earlier, that is an error.
        adapt: Applied to each batch first.
        memory: Bytes that the sums of one pass may take; more passes are made where they would not fit.

    Returns:
        The report; the model is changed in place.

    Raises:
        ConfigError: An argument is not valid, the data ends early, or the models do not belong together.
        DwindleError: Something is not finite. In all cases the model is as it was.
    """
    result = model if isinstance(model, ShrinkResult) else None
    small = model.model if isinstance(model, ShrinkResult) else model
    _check(small, original, parts, passes, batches)
    inputs = repair_inputs(original, data, adapt, batches)
    report = repair_on(small, original, inputs, parts=parts, passes=passes, memory=memory)
    if result is not None:
        result.repair = report
    return report


def repair_on(
    small: nn.Module,
    original: nn.Module,
    inputs: list[Inputs],
    *,
    parts: Sequence[str] = PARTS,
    passes: int = PASSES,
    memory: int = MEMORY,
) -> RepairReport:
    """Repair a model, given the arguments of each forward; the arguments are those of :func:`repair`.

    Raises:
        ConfigError: The models do not belong together.
        DwindleError: Something is not finite. In all cases the model is as it was.
    """
    started = time.perf_counter()
    plain = _without_simulators(small)
    with _still(plain, original), _restored(plain) as put_back:
        report = _repair(plain, original, inputs, frozenset(parts), passes, memory)
        if not report.accepted:
            put_back()
    if plain is not small:
        _hand_over(plain, small)
    report.seconds = time.perf_counter() - started
    return report


def _check(small: Any, original: Any, parts: Sequence[str], passes: int, batches: int | None) -> None:
    for name, given in {"model": small, "original": original}.items():
        if not isinstance(given, nn.Module):
            raise ConfigError(f"{name} is a {type(given).__name__}, not a model")
    if small is original:
        raise ConfigError("original is the pruned model itself; keep a copy (copy.deepcopy) from before")
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts or isinstance(parts, str):
        raise ConfigError(f"parts: {parts!r} is not a selection of {', '.join(PARTS)}")
    for name, number in {"passes": passes, "batches": batches}.items():
        if number is not None and (isinstance(number, bool) or number < 1):
            raise ConfigError(f"{name}: {number!r} is not a positive number")


def repair_inputs(
    model: nn.Module, data: Any, adapt: Callable[[Any], Any] | None = None, batches: int | None = None
) -> list[Inputs]:
    """Return the arguments of each forward; one tensor is cut into batches.

    Args:
        model: Whose forward it is.
        data: As for :func:`repair`.
        adapt: Likewise.
        batches: Likewise.

    Raises:
        ConfigError: The data ends early.
        DwindleError: It holds NaN or infinite values.
    """
    if isinstance(data, Tensor):
        data = data.split(min(_BATCH, max(1, len(data) // _HOLD_OUT)))
    inputs = list(itertools.islice(input_batches(model, data, adapt), batches))
    if len(inputs) < max(2, batches or 0):
        raise ConfigError(
            f"data ended after {len(inputs)} of {batches or 'at least 2'} batches (one of them is held out)"
        )
    for tensor in tensors_in([[list(args), kwargs] for args, kwargs in inputs]):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DwindleError("data holds NaN or infinite values")
    return inputs


def _is_held_out(number: int, count: int) -> bool:
    return number % _HOLD_OUT == _HOLD_OUT - 1 if count >= _HOLD_OUT else number == count - 1


def _without_simulators(model: nn.Module) -> nn.Module:
    """Return the model itself, or a copy in which masks are zeros."""
    if not simulate.get_masks(model):
        return model
    twin = copy.deepcopy(model)
    simulate.detach(twin, keep_values=True)
    return twin


def _hand_over(plain: nn.Module, model: nn.Module) -> None:
    """Write repaired values into a model that carries masks; what they hide stays as it is."""
    masks = {target.path: mask for target, mask in simulate.get_masks(model).items() if target.is_parameter}
    sources = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    with simulate.disabled(model), torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name not in sources:
                continue
            new = sources[name].detach()
            if name in masks:
                new = torch.where(masks[name].to(new.device).bool().expand_as(new), new, tensor)
            tensor.copy_(new)


@contextlib.contextmanager
def _still(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode it was in."""
    with modes_kept(*models):
        for model in models:
            model.eval()
        yield


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Put the values back when something fails, or when the function it gives is called."""
    tensors = [*model.parameters(), *model.buffers()]
    values = [tensor.detach().clone() for tensor in tensors]

    def put_back() -> None:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)

    try:
        yield put_back
    except BaseException:
        put_back()
        raise


def _repair(
    small: nn.Module,
    original: nn.Module,
    inputs: list[Inputs],
    parts: frozenset[str],
    passes: int,
    memory: int,
) -> RepairReport:
    """Repair a model that carries no simulators, in evaluation mode."""
    link = correspondence(small, original)
    recordings = record(small, *inputs[0]), record(original, *inputs[0])
    layers, left = pair_layers(small, original, recordings, link, parts)
    report = RepairReport(left=left)
    numbers = range(len(inputs))
    held_out = [number for number in numbers if _is_held_out(number, len(inputs))]
    report.inputs = len(inputs) - len(held_out), len(held_out)
    judge = _Judge(original, [inputs[number] for number in held_out])
    report.output_before = best = judge.difference(small)
    groups = passes_of(layers, passes, memory)
    report.passes = len(groups)
    work, worse = list(itertools.product(groups, numbers)), 0
    sums: tuple[dict[str, Moments], dict[str, Moments]] = {}, {}
    for group, number in tracked(work, "repair"):
        collect(small, original, group, inputs[number], sums[number in held_out])
        if number == numbers[-1]:
            with _restored(small) as put_back:
                entries = [entry for layer in group for entry in _repair_layer(small, layer, *sums, left)]
                now = judge.difference(small)
                if best is not None and now is not None and not now <= best:
                    put_back()
                    worse += 1
                    entries = [replace(own, strength=None, error_after=own.error_before) for own in entries]
                else:
                    best = now
            report.layers += entries
            for own in sums:
                own.clear()
    if not layers:
        report.notes.append("no layer was found that could be repaired")
    report.output_after = best
    if report.output_before is None or report.output_after is None:
        report.notes.append("the outputs of the two models cannot be compared, only those of the layers")
    if worse:
        report.accepted = worse < len(groups)
        report.notes.append(
            f"{worse} of {len(groups)} passes made held-out outputs worse and were taken back; more (varied) data help"
        )
    return report


def _repair_layer(
    small: nn.Module,
    layer: Layer,
    train: dict[str, Moments],
    held_out: dict[str, Moments],
    left: dict[str, str],
) -> list[LayerRepair]:
    """Fit one layer and change it; returns its entry of the report."""
    name = layer.place.name
    if name not in train or name not in held_out:
        left[name] = "too few samples reach it, or their shapes differ from the original's"
        return []
    if not (train[name].is_finite() and held_out[name].is_finite()):
        raise DwindleError(f"{name}: the values around this layer are not finite")
    found = fit(train[name], held_out[name], _unknown(layer))
    if found.correction is not None:
        _apply(small, layer, found)
    scale = max(held_out[name].target / held_out[name].count, torch.finfo(torch.float32).tiny)
    return [
        LayerRepair(
            name,
            layer.place.operation,
            layer.place.features,
            train[name].count,
            found.strength,
            found.before / scale,
            found.after / scale,
        )
    ]


def _unknown(layer: Layer) -> Tensor | None:
    """Return which entries of the correction may differ from zero."""
    if layer.support is None:
        return None
    rows = list(range(layer.place.features)) if layer.weight else []
    return layer.support[:, [*rows, *([layer.place.features] if layer.constant else [])]]


def _apply(small: nn.Module, layer: Layer, found: Fit) -> None:
    """Add a correction to the weight, and its constant to the bias or off the running mean."""
    place, correction = layer.place, found.correction
    assert correction is not None
    with torch.no_grad():
        if layer.weight:
            weight = small.get_parameter(place.name)
            own = correction[:, : place.features]
            weight.add_(to_weight(own, weight.shape, place.transposed).to(weight.dtype))
        if layer.constant:
            constant = correction[:, -1].flatten()
            if place.bias is not None:
                bias = small.get_parameter(place.bias)
                bias.add_(constant.to(bias.dtype))
            elif place.shift is not None:
                mean = small.get_buffer(place.shift)
                mean.sub_(constant.to(mean.dtype))


class _Judge:
    """Compares outputs on held-out inputs with those of the original, tokens of padding left out."""

    def __init__(self, original: nn.Module, inputs: Sequence[Inputs]) -> None:
        self.inputs = inputs
        with torch.no_grad():
            self.wanted = [_floating(original(*args, **kwargs)) for args, kwargs in inputs]

    def difference(self, small: nn.Module) -> float | None:
        """Return the squared error of the outputs as a share of the original's; None when nothing can be compared."""
        error = power = 0.0
        for own, wanted in zip(self.inputs, self.wanted, strict=True):
            args, kwargs = own
            with torch.no_grad():
                found = _floating(small(*args, **kwargs))
            tokens = padding_of(own)
            for ours, theirs in zip(found, wanted, strict=False):
                if ours.shape != theirs.shape:
                    continue
                ours, theirs = ours.double(), theirs.double()
                if tokens is not None and ours.shape[:2] == tokens.shape:
                    ours, theirs = ours[tokens], theirs[tokens]
                error += float((ours - theirs).square().sum())
                power += float(theirs.square().sum())
        return error / power if power > 0 else None


def _floating(output: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
