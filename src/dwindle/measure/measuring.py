"""``dw.measure``: all figures of one model, or of several that are timed against each other."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.graph.modes import in_mode
from dwindle.graph.nested_values import flatten
from dwindle.measure.activations import peak_activation_bytes
from dwindle.measure.macs import count_macs_by_module
from dwindle.measure.measurement import Comparison, Measurement
from dwindle.measure.runtime import PreparedModel, Runtime, Session
from dwindle.measure.runtimes import get_runtime
from dwindle.measure.size import count_parameters, state_bytes
from dwindle.measure.structure import batch_size, example_call, tensors_of, with_batch
from dwindle.measure.timing import Latency, time_interleaved

DEFAULT_RUNTIMES = ("torch", "onnxruntime", "openvino")
Call = tuple[tuple[Any, ...], dict[str, Any]]


def measure(
    model: nn.Module | Mapping[str, nn.Module],
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    runtimes: Sequence[str | Runtime] = DEFAULT_RUNTIMES,
    accuracy: Callable[[Callable[..., Any]], float] | None = None,
    *,
    batch: int | None = None,
    threads: int | None = None,
    warmup: int = 5,
    repeats: int = 50,
    max_seconds: float | None = 30.0,
    latency: bool = True,
    on_error: Literal["raise", "record"] = "raise",
) -> Any:
    """Measure a model, or several against each other.

    Counted are parameters, MACs, bytes on disk and peak activation bytes. Latency is wall time of one
    forward pass in each runtime, in evaluation mode, without the conversion of inputs; all models in all
    runtimes are called in turn, round by round, so that what disturbs the machine disturbs all alike.
    OpenVINO computes in float32 unless a runtime such as ``"openvino:bf16"`` is asked for.

    Args:
        model: A model, or models by name. They are left as they were.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs, batch in
            dimension 0.
        example_kwargs: Keyword inputs.
        runtimes: Names (see :func:`dwindle.measure.runtimes.get_runtime`) or runtime objects.
        accuracy: Called once for each model and runtime with something that is called like the model and
            gives tensors; returns a number (higher is better).
        batch: Samples in one forward pass: the example inputs are repeated or cut to it. None: as they are.
        threads: Threads of one forward pass. None: each runtime's own choice.
        warmup: Rounds before timing.
        repeats: Timed rounds.
        max_seconds: Timing ends after this many seconds in all, but not before three rounds.
        latency: Whether to time at all.
        on_error: ``"record"``: a runtime that cannot run a model is noted in ``failures`` instead of
            raising. A missing library always raises, before anything is measured.

    Returns:
        A :class:`Measurement`; of several models a :class:`Comparison`, which is a dict by name.

    Raises:
        ConfigError: Arguments do not fit.
        MissingDependencyError: A runtime's library is not installed.
        ExportError: A model cannot be brought into a runtime.
    """
    models = {"model": model} if isinstance(model, nn.Module) else dict(model)
    _check(models, batch, threads, warmup, repeats)
    chosen = [get_runtime(runtime, threads=threads) for runtime in runtimes]
    calls = {name: _call(entry, example_inputs, example_kwargs, batch) for name, entry in models.items()}
    result = Comparison()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch_threads(threads))
        for entry in models.values():
            stack.enter_context(in_mode(entry, training=False))
        sessions: dict[tuple[str, str], Session] = {}
        for name, entry in models.items():
            result[name] = _count(name, entry, calls[name], threads)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dwindle-measure-"))
            prepared = PreparedModel(entry, *calls[name], Path(folder))
            for runtime in chosen:
                session = _open(prepared, runtime, result[name], on_error)
                if session is not None:
                    sessions[name, runtime.label] = session
        if latency:
            _time(sessions, calls, result, warmup, repeats, max_seconds)
        if accuracy is not None:
            for (name, label), session in sessions.items():
                result[name].accuracy[label] = float(accuracy(session))
    return result["model"] if isinstance(model, nn.Module) else result


def _check(models: dict[str, Any], batch: int | None, threads: int | None, warmup: int, repeats: int) -> None:
    if not models:
        raise ConfigError("there is no model to measure")
    for name, entry in models.items():
        if not isinstance(entry, nn.Module):
            raise ConfigError(f"the model {name!r} is a {type(entry).__name__}, not a torch.nn.Module")
    for label, value, least in (
        ("batch", batch, 1),
        ("threads", threads, 1),
        ("warmup", warmup, 0),
        ("repeats", repeats, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{label} must be at least {least}, not {value}")


def _call(
    model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None, batch: int | None
) -> Call:
    args, kwargs = example_call(model, example_inputs, example_kwargs)
    if batch is None:
        return args, kwargs
    leaves, rebuild = flatten({"args": args, "kwargs": kwargs})
    resized = rebuild(with_batch([tensor for _, tensor in leaves], batch))
    return resized["args"], resized["kwargs"]


def _count(name: str, model: nn.Module, call: Call, threads: int | None) -> Measurement:
    args, kwargs = call
    parameters = count_parameters(model)
    macs = count_macs_by_module(model, args, kwargs)
    return Measurement(
        name=name,
        parameters=parameters.total,
        trainable_parameters=parameters.trainable,
        batch=batch_size(tensors_of(call)),
        macs=macs.total,
        macs_by_module=macs.by_module,
        uncounted_operators=macs.uncounted,
        peak_activation_bytes=peak_activation_bytes(model, args, kwargs),
        bytes_on_disk={"safetensors": state_bytes(model)},
        threads=threads,
    )


def _open(
    prepared: PreparedModel, runtime: Runtime, measurement: Measurement, on_error: str
) -> Session | None:
    try:
        session = runtime.open(prepared)
    except DwindleError as error:
        if on_error == "raise":
            raise
        measurement.failures[runtime.label] = str(error)
        return None
    if session.bytes_on_disk is not None:
        measurement.bytes_on_disk[runtime.label] = session.bytes_on_disk
    return session


def _time(
    sessions: Mapping[tuple[str, str], Session],
    calls: Mapping[str, Call],
    result: Comparison,
    warmup: int,
    repeats: int,
    max_seconds: float | None,
) -> None:
    functions = {
        key: session.prepare(*calls[key[0]][0], **calls[key[0]][1]) for key, session in sessions.items()
    }
    times = time_interleaved(functions, warmup=warmup, repeats=repeats, max_seconds=max_seconds)
    for (name, label), milliseconds in times.items():
        result[name].latency[label] = Latency.of(milliseconds)


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Give torch a number of threads inside; None leaves it as it is."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
