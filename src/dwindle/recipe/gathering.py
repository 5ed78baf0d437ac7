"""Gathers the records of all stages and seeds into the summary of the run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

import dwindle
from dwindle.recipe.schema import Recipe
from dwindle.report import Figure, Row, RunSummary, RuntimeFigures, SeedRun

__all__ = ["gather"]

Records = Sequence[Mapping[str, Any]]

_TITLES = {
    "prune": "pruned",
    "factorize": "factorized",
    "finetune": "fine-tuned",
    "quantize": "int8",
    "train": "trained",
}


def gather(recipe: Recipe, text: str, chains: Mapping[int, Records]) -> RunSummary:
    """Make the summary of a run from the records of its stages.

    Args:
        recipe: The recipe.
        text: Its file.
        chains: Records by seed, in the order of the stages; every seed has the same stages.
    """
    first = next(iter(chains.values()))
    models = _model_positions(first)
    measures = [position for position, record in enumerate(first) if record["kind"] == "measure"]
    evaluation = first[models[0]]["result"]["evaluation"]
    metric: Literal["accuracy", "agreement"] = "agreement" if evaluation["accuracy"] is None else "accuracy"
    rows = [
        _row(position, index == 0, list(chains.values()), measures) for index, position in enumerate(models)
    ]
    last_measure = first[measures[-1]]["result"] if measures else {}
    return RunSummary(
        name=recipe.name,
        title=recipe.title or recipe.name,
        description=recipe.description,
        metric=metric,
        model=recipe.model.name,
        data=recipe.data.name,
        samples=evaluation["samples"],
        rows=tuple(_with_unique_titles(rows)),
        seeds=tuple(
            SeedRun(seed, tuple(_public(record) for record in chain)) for seed, chain in chains.items()
        ),
        recipe_text=text,
        versions=_versions(),
        machine=_machine(),
        batch_size=last_measure.get("batch_size"),
        threads=last_measure.get("threads"),
    )


def _model_positions(records: Records) -> list[int]:
    """Positions of the original and of all model-making stages after it."""
    makers = [position for position, record in enumerate(records) if "evaluation" in record["result"]]
    original = makers[0]
    for position in makers:
        if records[position]["kind"] not in ("train", "original"):
            break
        original = position
    return [position for position in makers if position >= original]


def _row(position: int, is_original: bool, chains: Sequence[Records], measures: Sequence[int]) -> Row:
    """The figures of one model over all seeds."""
    records = [chain[position] for chain in chains]
    label, kind = str(records[0]["label"]), str(records[0]["kind"])
    results = [record["result"] for record in records]
    measured = [_measured(chain, measures, label) for chain in chains]

    def figure(key: str) -> Figure | None:
        return Figure.of([entry.get(key) for entry in measured])

    size = figure("bytes")
    names = list(dict.fromkeys(name for entry in measured for name in _runtime_names(entry)))
    quantizing = records[0]["settings"].get("preset")
    title: str = str(quantizing) if kind == "quantize" and quantizing else str(_TITLES.get(kind, label))
    return Row(
        label=label,
        kind="original" if is_original else kind,
        title="original" if is_original else (title if label == kind else label),
        parameters=Figure.of([result["parameters"] for result in results]),
        macs=Figure.of([result["macs"] for result in results]),
        bytes=size,
        bytes_of=measured[0].get("bytes_of") if size is not None else None,
        accuracy=Figure.of([result["evaluation"]["accuracy"] for result in results]),
        agreement=Figure.of(
            [1.0 if is_original else result["evaluation"]["agreement"] for result in results]
        ),
        peak_activation_bytes=figure("peak_activation_bytes"),
        runtimes={name: _runtime(name, measured) for name in names},
    )


def _measured(chain: Records, measures: Sequence[int], label: str) -> Mapping[str, Any]:
    """The last measurement of a model, or nothing."""
    for position in reversed(measures):
        found = chain[position]["result"]["models"].get(label)
        if found is not None:
            return found
    return {}


def _runtime_names(entry: Mapping[str, Any]) -> list[str]:
    return [*entry.get("runtimes", {}), *entry.get("failures", {})]


def _runtime(name: str, measured: Sequence[Mapping[str, Any]]) -> RuntimeFigures:
    entries = [entry.get("runtimes", {}).get(name, {}) for entry in measured]
    failures = [entry.get("failures", {}).get(name) for entry in measured]

    def latency(key: str) -> Figure | None:
        return Figure.of([(entry.get("latency") or {}).get(key) for entry in entries])

    return RuntimeFigures(
        p50=latency("p50"),
        p90=latency("p90"),
        score=Figure.of([entry.get("score") for entry in entries]),
        parity=Figure.of([entry.get("parity") for entry in entries]),
        different=Figure.of([entry.get("different") for entry in entries]),
        simulated=any(entry.get("simulated", False) for entry in entries),
        failure=next((failure for failure in failures if failure), None),
    )


def _with_unique_titles(rows: Sequence[Row]) -> list[Row]:
    """Two stages with one title are told apart by their labels."""
    titles = [row.title for row in rows]
    return [
        row
        if titles.count(row.title) == 1
        else Row(**{**row.__dict__, "title": f"{row.title} ({row.label})"})
        for row in rows
    ]


def _public(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "key"}


def _versions() -> dict[str, str]:
    found = {"dwindle": dwindle.__version__, "torch": torch.__version__, "Python": platform.python_version()}
    for package in ("onnx", "onnxruntime", "openvino"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _machine() -> dict[str, str]:
    """What times depend on; nothing that names the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "processor cores": str(cores),
        "architecture": platform.machine(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "torch threads": str(torch.get_num_threads()),
    }
