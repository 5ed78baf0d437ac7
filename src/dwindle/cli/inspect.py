"""``dwindle inspect``: axes, couplings, what can be pruned and why not the rest."""

from __future__ import annotations

from typing import Annotated

import typer

from dwindle.cli.inputs import example_inputs, parse_arguments
from dwindle.cli.output import print_json, waiting

__all__ = ["inspect_command"]

ModelArgument = Annotated[
    str, typer.Argument(help="package.module:callable, timm/NAME, hf/PATH, or a directory dwindle wrote.")
]
ShapeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape", "-i", help="Shape of an input: 1,3,224,224 or name=2,16:int64. Once for each input."
    ),
]
ArgumentOption = Annotated[
    list[str] | None,
    typer.Option("--argument", "-a", help="key=value for the callable that makes the model."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def inspect_command(
    model: ModelArgument,
    input_shape: ShapeOption = None,
    argument: ArgumentOption = None,
    parameters: Annotated[bool, typer.Option(help="List every parameter's dimensions.")] = True,
    json: JsonOption = False,
) -> None:
    """Show the axes of a model, what shares them, what can be pruned, and why not the rest."""
    from dwindle.graph import analyse, inspect
    from dwindle.recipe import load_model

    with waiting(f"analysing {model}"):
        module = load_model(model, parse_arguments(argument or [])).eval()
        args, kwargs = example_inputs(input_shape or [], module)
        analysis = analyse(module, args, kwargs)
    if json:
        print_json({"model": model, **inspect.to_json(analysis)})
    else:
        print(inspect.describe(analysis, parameters=parameters))
