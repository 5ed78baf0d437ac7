"""``dwindle export``: writes a saved model for a runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dwindle.cli.inputs import example_inputs, parse_arguments
from dwindle.cli.inspect import ArgumentOption, JsonOption, ModelArgument, ShapeOption
from dwindle.cli.output import print_json, waiting
from dwindle.config.errors import ConfigError, did_you_mean

__all__ = ["export_command"]

_SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}


def export_command(
    model: ModelArgument,
    to: Annotated[str, typer.Option("--to", help="onnx, openvino or pt2.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write. Default: model.SUFFIX here.")
    ] = None,
    input_shape: ShapeOption = None,
    argument: ArgumentOption = None,
    json: JsonOption = False,
) -> None:
    """Write a model for a runtime; the file is run and compared before it counts."""
    from dwindle.export import export
    from dwindle.recipe import load_model

    if to not in _SUFFIXES:
        raise ConfigError(f"--to {to}: known formats are {', '.join(_SUFFIXES)}{did_you_mean(to, _SUFFIXES)}")
    path = output if output is not None else Path(f"model{_SUFFIXES[to]}")
    if path.suffix != _SUFFIXES[to]:
        raise ConfigError(f"--output {path}: a file for {to} ends in {_SUFFIXES[to]}")
    with waiting(f"writing {path}"):
        module = load_model(model, parse_arguments(argument or [])).eval()
        args, kwargs = example_inputs(input_shape or [], module)
        result = export(module, path, args, kwargs or None)
    if json:
        print_json(result.to_json())
        return
    print(result.summary())
    for note in result.notes:
        print(f"note: {note}")
