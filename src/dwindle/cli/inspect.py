"""``dwindle inspect``: axes, couplings, what can be pruned and why not the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from dwindle.cli.inputs import example_inputs, parse_arguments
from dwindle.cli.output import print_json, waiting
from dwindle.config.errors import ConfigError

__all__ = ["inspect_command", "read_config_list"]

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
    quantization: Annotated[
        bool,
        typer.Option(
            "--quantization", "-q", help="Which operations would run in int8, and why not the rest."
        ),
    ] = False,
    backend: Annotated[
        str, typer.Option(help="With --quantization: the runtime, onnxruntime or openvino.")
    ] = "onnxruntime",
    config: Annotated[
        Path | None, typer.Option(help="With --quantization: a YAML or JSON file with a config_list.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show the axes of a model, what shares them, what can be pruned, and why not the rest."""
    from dwindle.recipe import load_model

    with waiting(f"analysing {model}"):
        config_list = read_config_list(config)
        module = load_model(model, parse_arguments(argument or [])).eval()
        args, kwargs = example_inputs(input_shape or [], module)
        if quantization:
            facts = _placement(module, args, kwargs, backend, config_list)
    if quantization:
        if json:
            print_json({"model": model, **facts.to_json()})
        else:
            print(facts.describe())
        return
    from dwindle.graph import analyse, inspect

    with waiting(f"analysing {model}"):
        analysis = analyse(module, args, kwargs)
    if json:
        print_json({"model": model, **inspect.to_json(analysis)})
    else:
        print(inspect.describe(analysis, parameters=parameters))


def _placement(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], backend: str, config_list: Any
) -> Any:
    from dwindle.quantization.explanation import explain_placement

    if args and kwargs:
        raise ConfigError("--quantization takes either positional inputs or named ones")
    return explain_placement(module, args or kwargs, backend=backend, config_list=config_list)


def read_config_list(path: Path | None) -> list[dict[str, Any]] | None:
    """Read a config_list.

    Raises:
        ConfigError: There is no such file, or it holds something else.
    """
    import yaml

    if path is None:
        return None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ConfigError(f"--config {path} holds no config_list: a list of mappings")
    return found
