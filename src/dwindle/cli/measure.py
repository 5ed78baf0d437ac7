"""``dwindle measure``: parameters, MACs, bytes and latency of models, side by side."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dwindle.cli.inputs import example_inputs, parse_arguments
from dwindle.cli.inspect import ArgumentOption, JsonOption, ShapeOption
from dwindle.cli.output import console, print_json, waiting

__all__ = ["measure_command"]


def measure_command(
    models: Annotated[list[str], typer.Argument(help="Models; each is compared with the first.")],
    input_shape: ShapeOption = None,
    argument: ArgumentOption = None,
    runtimes: Annotated[
        str, typer.Option(help="Runtimes, with commas between.")
    ] = "torch,onnxruntime,openvino",
    batch: Annotated[
        int | None, typer.Option(help="Samples a forward pass; default: the input's own.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of each runtime.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed calls of each model in each runtime.")] = 50,
    latency: Annotated[bool, typer.Option(help="Take times.")] = True,
    json: JsonOption = False,
) -> None:
    """Measure models side by side: parameters, MACs, bytes, activations, latency in each runtime."""
    from dwindle.measure import Comparison, measure
    from dwindle.recipe import load_model

    names = [name.strip() for name in runtimes.split(",") if name.strip()]
    with waiting("measuring"):
        made: dict[str, Any] = {
            name: load_model(name, parse_arguments(argument or [])).eval() for name in models
        }
        args, kwargs = example_inputs(input_shape or [], made[models[0]])
        found: Comparison = measure(
            made,
            args,
            kwargs or None,
            runtimes=names,
            batch=batch,
            threads=threads,
            repeats=repeats,
            latency=latency,
            on_error="record",
        )
    if json:
        print_json(found.to_json())
        return
    console().print(found.table())
    for name, measurement in found.items():
        for runtime, message in measurement.failures.items():
            console().print(f"{name} does not run in {runtime}: {message}")
