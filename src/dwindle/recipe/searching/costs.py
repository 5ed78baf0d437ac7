"""What the models of a finished run cost, against the original of that run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dwindle.measure import count_macs_by_module
from dwindle.quantization.simulation import is_quantized, simulation_of
from dwindle.recipe.data_source import Data
from dwindle.recipe.directory import read_json
from dwindle.recipe.schema import Recipe, SearchTiming
from dwindle.recipe.variant import Variant, load_variant
from dwindle.search.auto.workbench import Workbench

__all__ = ["bit_operations", "finished_stages", "measure_costs"]


def finished_stages(run: Path, seed: int) -> list[dict[str, Any]]:
    """Return the records of the finished stages of a run, in their order, each with its ``directory``."""
    found = []
    for folder in sorted((run / f"seed-{seed}").glob("[0-9][0-9]-*")):
        if (folder / "record.json").is_file():
            found.append({**read_json(folder / "record.json"), "directory": folder})
    return found


def measure_costs(
    recipe: Recipe, run: Path, data: Data, costs: Sequence[str], timing: SearchTiming
) -> tuple[dict[str, float], dict[str, float]]:
    """Measure the last model of a run beside its original.

    Args:
        recipe: The recipe of the run.
        run: Its directory.
        data: For example inputs.
        costs: Names of :data:`dwindle.search.auto.limits.COSTS`.
        timing: How latencies are measured.

    Returns:
        The costs of the last model, and those of the original, each by name.
    """
    makers = [entry for entry in finished_stages(run, recipe.seeds[0]) if "evaluation" in entry["result"]]
    leading = makers[0]
    for entry in makers:
        if entry["kind"] not in ("train", "original"):
            break
        leading = entry
    original, last = (
        load_variant(Variant(entry["label"], entry["kind"], entry["directory"]), recipe.model)
        for entry in (leading, makers[-1])
    )
    args, kwargs = data.example(timing.batch_size)
    measured = [name for name in costs if name != "bit_operations"]
    bench = Workbench(original, args, kwargs, measured, threads=timing.threads, repeats=timing.repeats)
    found, whole = bench.measure(last, last, integers=is_quantized(last)), dict(bench.whole)
    if "bit_operations" in costs:
        found["bit_operations"] = bit_operations(last, args, kwargs)
        whole["bit_operations"] = bit_operations(original, args, kwargs)
    return {name: found[name] for name in costs}, {name: whole[name] for name in costs}


def bit_operations(model: nn.Module, args: Sequence[Any], kwargs: Any = None) -> float:
    """Return the multiply-accumulates of a model, each times the bits of its weight and of its input.

    What is not quantized counts 32 times 32 bits.

    Args:
        model: A float model, or what :func:`dwindle.quantize` or training with quantizers made.
        args: Positional example inputs.
        kwargs: Keyword inputs.
    """
    counted = count_macs_by_module(model, tuple(args), kwargs or {})
    found = float(counted.total * 32 * 32)
    if not is_quantized(model):
        return found
    simulation = simulation_of(model)
    products: dict[str, int] = {}
    for call, slot in simulation.slots.items():
        bits = slot.place.form.bits * simulation.forms[slot.place.input_quantizer].bits
        products[call.module] = max(bits, products.get(call.module, 0))
    return found - sum(counted.by_module.get(path, 0) * (32 * 32 - bits) for path, bits in products.items())
