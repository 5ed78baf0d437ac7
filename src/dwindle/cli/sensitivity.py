"""``dwindle sensitivity``: what each part of a model costs when it alone is pruned, quantized or factorized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from dwindle.cli.inputs import example_inputs, parse_arguments
from dwindle.cli.inspect import ArgumentOption, JsonOption, ModelArgument, ShapeOption, read_config_list
from dwindle.cli.output import messages, print_json, working
from dwindle.config.errors import ConfigError

__all__ = ["sensitivity_command"]

_CHOICES = {"pruning": "ratios", "quantization": "bits", "factorization": "ranks"}


def sensitivity_command(
    model: ModelArgument,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="package.module:callable, as in recipes.")
    ] = None,
    data_argument: Annotated[
        list[str] | None, typer.Option(help="key=value for the callable that makes the data.")
    ] = None,
    input_shape: ShapeOption = None,
    argument: ArgumentOption = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="accuracy, sqnr (no labels), or package.module:callable from a model to a number. Default: accuracy "
            "where the data have labels."
        ),
    ] = None,
    kinds: Annotated[str, typer.Option(help="With commas between.")] = "pruning,quantization,factorization",
    ratios: Annotated[str | None, typer.Option(help="Shares of each axis that go: 0.25,0.5.")] = None,
    bits: Annotated[str | None, typer.Option(help="Numbers of bits, 2 to 8: 8,4,2.")] = None,
    rank_ratios: Annotated[str | None, typer.Option(help="Shares of the full rank that stay.")] = None,
    importance: Annotated[str, typer.Option(help="Which channels go first, as in dw.prune.")] = "l1",
    config: Annotated[
        Path | None, typer.Option(help="A YAML or JSON file with a config_list that selects layers.")
    ] = None,
    stop_drop: Annotated[
        float | None, typer.Option(help="A target is compressed no further once it lost more than this.")
    ] = None,
    drop: Annotated[
        float | None,
        typer.Option(help="Also give the config_lists at which each target loses so much alone."),
    ] = None,
    batches: Annotated[int, typer.Option(help="Batches for ranges, and for sqnr.")] = 8,
    limit: Annotated[int | None, typer.Option(help="Score on so many test samples only.")] = None,
    storage: Annotated[
        Path | None, typer.Option(help="A folder that keeps every point; the same command goes on there.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write all points as CSV.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with the curves.")] = None,
    json: JsonOption = False,
) -> None:
    """Compress every part of a model alone, level by level, and show what each costs, the worst first."""
    from dwindle.recipe import load_model
    from dwindle.report import write_sensitivity_page
    from dwindle.search.sensitivities import sensitivity
    from dwindle.search.sensitivities.settings import Settings

    chosen_ratios, chosen_bits = _numbers("--ratios", ratios, float), _numbers("--bits", bits, int)
    chosen_ranks = _numbers("--rank-ratios", rank_ratios, float)
    with working():
        config_list = read_config_list(config)
        module = load_model(model, parse_arguments(argument or [])).eval()
        if data is None:
            inputs, score = _random_inputs(module, input_shape or [], metric)
        else:
            inputs, score = _from_data(data, data_argument or [], metric, batches, limit)
        found = sensitivity(
            module,
            inputs,
            score,
            kinds=[kind.strip() for kind in kinds.split(",") if kind.strip()],
            importance=importance,
            config_list=config_list,
            stop_drop=stop_drop,
            storage=storage,
            adapt=_whole,
            ratios=Settings.ratios if chosen_ratios is None else chosen_ratios,
            bits=Settings.bits if chosen_bits is None else chosen_bits,
            rank_ratios=Settings.rank_ratios if chosen_ranks is None else chosen_ranks,
        )
        record = {"model": model, **found.to_json()}
        if drop is not None:
            record["config_lists"] = {kind: getattr(found, _CHOICES[kind])(drop=drop) for kind in found.kinds}
        if csv is not None:
            found.to_csv(csv)
        if html is not None:
            write_sensitivity_page(record, html, f"Sensitivity of {model}")
    if json:
        print_json(record)
        return
    print(found.table())
    for kind, entries in record.get("config_lists", {}).items():
        print(f"\n# {kind}: config_list at a drop of {drop:g} each\n{_yaml(entries)}".rstrip())


def _whole(batch: Any) -> Any:
    return batch


def _numbers(option: str, text: str | None, kind: Callable[[str], Any]) -> list[Any] | None:
    """Read numbers with commas between.

    Raises:
        ConfigError: One is none.
    """
    if text is None:
        return None
    try:
        return [kind(own) for own in text.split(",") if own.strip()]
    except ValueError as error:
        raise ConfigError(f"{option} {text}: write numbers with commas between") from error


def _random_inputs(module: nn.Module, shapes: list[str], metric: str | None) -> tuple[list[Any], Any]:
    """Return one batch of random inputs, and the user's metric where there is one."""
    args, kwargs = example_inputs(shapes, module)
    if args and kwargs:
        raise ConfigError("--input-shape: give either positional inputs or named ones")
    if metric == "accuracy":
        raise ConfigError("--metric accuracy needs --data with labels")
    if metric in (None, "sqnr"):
        messages().print("no --data: outputs are compared on random inputs")
    return [kwargs or args], None if metric in (None, "sqnr") else _imported(str(metric))


def _from_data(
    name: str, arguments: list[str], metric: str | None, batches: int, limit: int | None
) -> tuple[list[Any], Any]:
    """Return batches of inputs, and the metric; None for the signal to noise of the outputs."""
    from dwindle.recipe.data_source import load_data
    from dwindle.recipe.evaluation import evaluate
    from dwindle.recipe.schema import DataPart

    part = DataPart(name=name, arguments=parse_arguments(arguments), test_limit=limit)
    data = load_data(part)
    inputs = list(data.calibration_inputs(batches))
    has_labels = next(iter(data.test_batches())).target is not None
    if metric == "accuracy" and not has_labels:
        raise ConfigError(f"--metric accuracy: the data {name!r} have no labels; leave it out, or give sqnr")
    if metric == "sqnr" or (metric is None and not has_labels):
        return inputs, None
    if metric not in (None, "accuracy"):
        return inputs, _imported(str(metric))
    return inputs, lambda model: evaluate(model, data, None)[0].accuracy


def _imported(name: str) -> Any:
    from dwindle.recipe.model_source import import_callable

    return import_callable(name, "metric")


def _yaml(value: Any) -> str:
    import yaml

    return str(yaml.safe_dump(value, sort_keys=False, default_flow_style=None))
