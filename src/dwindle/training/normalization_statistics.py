"""Running statistics of batch normalizations, estimated anew for the model as it is now.

Masks, cut channels and rounded weights change what a normalization is given, but not what it believes it is given;
a few batches without any training put that right, which often brings back most of what was lost.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from dwindle.config.errors import ConfigError, DwindleError, did_you_mean
from dwindle.graph.modes import modes_kept
from dwindle.training.checkpoint import random_state, restore_random_state
from dwindle.training.inputs import Inputs, input_batches
from dwindle.training.normalization_estimates import Estimate, MeanOfBatches, MovingAverage, OfAllValues
from dwindle.training.progress import tracked

__all__ = ["AdaptedNormalization", "adapt_normalization"]

Average = Literal["values", "batches"] | float
Read = Callable[[str], Iterator[Inputs]]
_AVERAGES = ("values", "batches")


@dataclass(frozen=True)
class AdaptedNormalization:
    """What :func:`adapt_normalization` did.

    Attributes:
        layers: Names of the normalizations with new statistics.
        unreached: Names of those that no batch came to; they keep theirs.
        batches: Batches that were read, in this process.
        moved: For each of ``layers``, how far its means moved: the largest distance, in old standard deviations.
    """

    layers: tuple[str, ...]
    unreached: tuple[str, ...]
    batches: int
    moved: Mapping[str, float]


def adapt_normalization(
    model: nn.Module,
    data: Any,
    *,
    batches: int | None = None,
    average: Average = "values",
    one_by_one: bool = False,
    op_names: Sequence[str] | None = None,
    adapt: Callable[[Any], Any] | None = None,
) -> AdaptedNormalization:
    """Estimate the running statistics of all batch normalizations anew, in place.

    Works on a model with masks, quantizers or other simulators, on one that was cut, and on any kind of inputs. All
    else is as before afterwards, bit for bit: parameters, gradients, other buffers, modes, states of random
    generators. The rest of the model runs in evaluation mode meanwhile, and in all processes of a distributed run
    the statistics are those of all their data.

    Args:
        model: The model.
        data: Batches: tensors, tuples (labels are left out) or mappings.
        batches: At most so many; None reads all.
        average: ``"values"`` takes mean and unbiased variance of all values that reached a layer, however they were
            cut into batches (Wu and Johnson 2021, https://arxiv.org/abs/2105.07576, section 3). ``"batches"`` takes
            the mean of each batch's mean and variance, as torch does with ``momentum=None``. A number above 0, up to
            1, is the weight of each new batch in a moving average that begins with the old statistics.
        one_by_one: False normalizes by each batch's own statistics, as training does, in one pass. True goes from
            the first normalization to the last with a pass for each, while those before it already use their new
            statistics, as inference will: for small batches, even of a single value, since with ``"values"`` the
            result does not depend on the size of the batches.
        op_names: Only these normalizations; None means all that have running statistics.
        adapt: Makes of one batch what the model is called with, see
            :func:`dwindle.training.inputs.forward_inputs`.

    Raises:
        ConfigError: An argument is not valid, the model has no such layer, or the data hold nothing.
        DwindleError: A batch with NaN or infinity came to a layer. The model is as it was.
    """
    _check(average, batches)
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    norms = _normalizations(inner, op_names)
    estimates = {name: _estimate(norm, average) for name, norm in norms.items()}
    if one_by_one and isinstance(data, Iterator):
        data = list(itertools.islice(data, batches))

    def read(what: str) -> Iterator[Inputs]:
        total = batches if batches is not None or not isinstance(data, Sized) else len(data)
        return tracked(input_batches(inner, data, adapt, batches), what, total=total)

    with torch.no_grad(), _undisturbed(inner, norms.values()):
        passes = _one_by_one if one_by_one else _at_once
        count = passes(inner, norms, estimates, read)
    reached = {name: own for name, own in estimates.items() if own.calls}
    moved = {name: _write(norms[name], own) for name, own in reached.items()}
    return AdaptedNormalization(
        tuple(reached), tuple(name for name in norms if name not in reached), count, moved
    )


def _check(average: Average, batches: int | None) -> None:
    if isinstance(average, str):
        if average not in _AVERAGES:
            raise ConfigError(
                f"average {average!r} is not one of {', '.join(_AVERAGES)} or a number"
                f"{did_you_mean(average, _AVERAGES)}"
            )
    elif isinstance(average, bool) or not isinstance(average, int | float) or not 0 < average <= 1:
        raise ConfigError(f"average is 'values', 'batches' or a number above 0, up to 1; not {average!r}")
    if batches is not None and (isinstance(batches, bool) or not isinstance(batches, int) or batches < 1):
        raise ConfigError(f"batches must be a positive number, got {batches!r}")


def _normalizations(model: nn.Module, wanted: Sequence[str] | None) -> dict[str, _BatchNorm]:
    """Return the batch normalizations with running statistics, by name."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and module.running_var is not None
    }
    if wanted is None:
        if not found:
            raise ConfigError("the model has no batch normalization with running statistics")
        return found
    for name in wanted:
        if name not in found:
            raise ConfigError(
                f"op_names: {name!r} is no batch normalization with running statistics{did_you_mean(name, found)}"
            )
    return {name: module for name, module in found.items() if name in set(wanted)}


def _estimate(norm: _BatchNorm, average: Average) -> Estimate:
    mean = norm.running_mean
    assert mean is not None
    if average == "values":
        return OfAllValues(len(mean), mean.device)
    return (
        MeanOfBatches(len(mean), mean.device) if average == "batches" else MovingAverage(norm, float(average))
    )


@contextlib.contextmanager
def _undisturbed(model: nn.Module, norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Evaluation mode, and statistics that stand still; modes, statistics and random generators are put back."""
    kept = [
        (own, own.momentum, [(each, each.clone()) for each in own.buffers(recurse=False)]) for own in norms
    ]
    generators = random_state()
    try:
        with modes_kept(model):
            for module in model.modules():
                module.training = False
            for norm, _, _ in kept:
                norm.momentum = 0.0
            yield
    finally:
        for norm, momentum, buffers in kept:
            norm.momentum = momentum
            for buffer, value in buffers:
                buffer.copy_(value)
        restore_random_state(generators)


@contextlib.contextmanager
def _shown_to(estimates: Mapping[str, Estimate], norms: Mapping[str, _BatchNorm]) -> Iterator[list[str]]:
    """Show what comes to normalizations to their estimates; gives their names in the order of their first calls."""
    order: list[str] = []

    def hook(name: str) -> Any:
        def show(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else kwargs["input"]
            if not estimates[name].calls:
                order.append(name)
            estimates[name].calls += 1
            estimates[name].add(value)

        return show

    handles = [norms[name].register_forward_pre_hook(hook(name), with_kwargs=True) for name in estimates]
    try:
        yield order
    finally:
        for handle in handles:
            handle.remove()


def _at_once(
    model: nn.Module, norms: Mapping[str, _BatchNorm], estimates: Mapping[str, Estimate], read: Read
) -> int:
    """Show all batches to all estimates, each batch normalized by its own statistics."""
    count = 0
    for norm in norms.values():
        norm.training = True
    with _shown_to(estimates, norms):
        for args, kwargs in read("normalization statistics"):
            count += 1
            try:
                model(*args, **kwargs)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise ConfigError(
                    f"batch {count} brings a single value for each channel to a normalization: give larger batches, or "
                    "one_by_one=True"
                ) from error
    _finish(estimates)
    return count


def _one_by_one(
    model: nn.Module, norms: Mapping[str, _BatchNorm], estimates: Mapping[str, Estimate], read: Read
) -> int:
    """Show all batches to one estimate after the other, in the order of the normalizations' calls."""
    with _shown_to({name: Estimate() for name in norms}, norms) as order:
        for args, kwargs in itertools.islice(read("order of normalizations"), 1):
            model(*args, **kwargs)
    count = 0
    for number, name in enumerate(order, 1):
        count = 0
        with _shown_to({name: estimates[name]}, norms):
            for args, kwargs in read(f"normalization statistics {number} of {len(order)}"):
                count += 1
                model(*args, **kwargs)
        _finish({name: estimates[name]})
        _write(norms[name], estimates[name])
    return count


def _finish(estimates: Mapping[str, Estimate]) -> None:
    """Bring the processes together, and refuse what is not finite."""
    for name, own in estimates.items():
        own.share()
        if own.calls and not all(bool(torch.isfinite(each).all()) for each in own.result()):
            raise DwindleError(f"NaN or infinity came to the normalization {name}")


def _write(norm: _BatchNorm, estimate: Estimate) -> float:
    """Give a normalization its new statistics; return how far its means moved, in old standard deviations."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    new_mean, new_variance = estimate.result()
    moved = (new_mean - mean.double()).abs() / (variance.double() + norm.eps).sqrt()
    with torch.no_grad():
        mean.copy_(new_mean)
        variance.copy_(new_variance)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(estimate.calls)
    return float(moved.max())
