"""The table of a sample: models side by side, measured, and written into a README by the run that measured them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import dwindle as dw
from dwindle.export.writing import is_quantized
from dwindle.quantization.aware_training import finished

__all__ = ["BEGIN", "END", "equal_share", "say", "table_of", "write_table"]

BEGIN, END = "<!-- table: written by train.py -->", "<!-- end of table -->"
"""What stands before and behind the table in a README."""

_LABELS = {"torch": "torch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}

Ask = Callable[..., Any]
"""Something that is called like the model: the model itself, or its file in a runtime."""


def equal_share(one: Tensor, other: Tensor) -> float:
    """Return the share of equal entries of two integer tensors, such as predicted classes."""
    return float((one == other).double().mean())


def table_of(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    answers: Callable[[Ask], Any],
    score: Callable[[Any], float],
    *,
    score_name: str = "test accuracy",
    show: Callable[[float], str] = "{:.2%}".format,
    same: Callable[[Any, Any], float] = equal_share,
    same_name: str = "answers equal to torch's",
    runtimes: Sequence[str] = ("torch", "onnxruntime", "openvino"),
    batch: int = 1,
    max_seconds: float = 30.0,
) -> str:
    """Measure models against each other, one thread each, and return a Markdown table with a column for each.

    Args:
        models: By name, the first one is what the others came from. Those trained with quantizers are measured as the
            integer models that they are.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword inputs.
        answers: ``answers(ask)`` gives the answers to all test data, where ``ask`` is called like the model.
        score: ``score(answers) -> number`` against the truth.
        score_name: What the score is.
        show: Writes a score.
        same: ``same(answers of a file, answers of torch) -> share``.
        same_name: What that share is.
        runtimes: Where the models run.
        batch: Samples of a timed forward pass.
        max_seconds: No more seconds than this for all timed calls.
    """
    given: list[Any] = []

    def ask(session: Ask) -> float:
        given.append(answers(session))
        return score(given[-1])

    final = {name: finished(own) for name, own in models.items()}
    integer = {name for name, own in final.items() if is_quantized(own)}
    found = dw.measure(
        final,
        example_inputs,
        runtimes=runtimes,
        accuracy=ask,
        batch=batch,
        threads=1,
        repeats=200,
        max_seconds=max_seconds,
    )
    keys = [(name, label) for name, entry in found.items() for label in entry.accuracy]
    by_key = dict(zip(keys, given, strict=True))
    first = next(iter(found.values()))

    def row(title: str, cell: Callable[[str, Any], str]) -> str:
        return f"| {title} | " + " | ".join(cell(name, entry) for name, entry in found.items()) + " |"

    lines = [
        "| | " + " | ".join(found) + " |",
        "|---|" + "---:|" * len(found),
        row("parameters", lambda name, own: _count(own.parameters, first.parameters)),
        row("multiply-accumulates", lambda name, own: _count(own.macs_per_sample, first.macs_per_sample)),
        row("bytes of the ONNX file", lambda name, own: _count(_file(own), _file(first))),
    ]
    for runtime in runtimes:
        title = f"{score_name}, {_LABELS.get(runtime, runtime)}"
        lines.append(row(title, lambda name, own, at=runtime: show(own.accuracy[at])))
    for runtime in runtimes:
        if runtime != "torch" and "torch" in runtimes:
            title = f"{same_name}, {_LABELS.get(runtime, runtime)}"
            lines.append(
                row(
                    title,
                    lambda name, own, at=runtime: f"{same(by_key[name, at], by_key[name, 'torch']):.2%}",
                )
            )
    for runtime in runtimes:
        title = f"ms (fastest call), {_LABELS.get(runtime, runtime)}"  # other work disturbs it least
        lines.append(
            row(
                title,
                lambda name, own, at=runtime: (
                    "simulated" if at == "torch" and name in integer else f"{own.latency[at].minimum:.3f}"
                ),
            )
        )
    return "\n".join(lines)


def write_table(readme: str | os.PathLike[str], text: str) -> None:
    """Put a text between the two marks in a README, in place of what stood there.

    Raises:
        ValueError: The marks are not there, once each and in this order.
    """
    path = Path(readme)
    content = path.read_text(encoding="utf-8")
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"{path} needs the lines {BEGIN!r} and {END!r}, once each")
    draft = path.with_suffix(".draft")
    draft.write_text(f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}", encoding="utf-8")
    draft.replace(path)


def say(text: str) -> None:
    """Tell the person at the terminal how far the run is."""
    print(text, file=sys.stderr, flush=True)


def _file(entry: Any) -> float:
    sizes = entry.bytes_on_disk
    return float(sizes.get("onnxruntime", sizes["safetensors"]))


def _count(value: float, whole: float) -> str:
    """A number with a unit, and the share of the first model's that it is."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            text = f"{value / size:.3g} {unit}"
            break
    else:
        text = f"{value:.0f}"
    return text if value == whole else f"{text} ({value / whole:.1%})"
