from __future__ import annotations

import copy
from typing import Any

import pytest

from dwindle.report import Figure, Row, RunSummary, RuntimeFigures, SeedRun


def _record(kind: str, seed: int, **result: Any) -> dict[str, Any]:
    return {"kind": kind, "label": kind, "seed": seed, "settings": {}, "seconds": 1.25, "result": result}


def _layers(width: int) -> list[dict[str, Any]]:
    return [
        {
            "name": "body.first",
            "type": "Conv2d",
            "shape": [width, 3, 3, 3],
            "elements": 27 * width,
            "zeros": 0,
        },
        {"name": "head", "type": "Linear", "shape": [10, width], "elements": 10 * width, "zeros": width},
    ]


def _stages(seed: int, scores: tuple[float, float, float]) -> tuple[dict[str, Any], ...]:
    def judged(score: float) -> dict[str, Any]:
        return {"accuracy": score, "agreement": score, "samples": 200}

    curve = [
        {"epoch": n + 1, "loss": 1.0, "metric": scores[0] * (n + 1) / 3, "learning_rate": 0.1}
        for n in range(3)
    ]
    cut = {
        "kind": "channels",
        "before": 64,
        "after": 24,
        "parameters": ["body.first.weight[0]", "head.weight[1]"],
    }
    proof = {
        "proven": True, "max_difference": 3.5e-15, "dtype": "float64", "batch_sizes": [2, 3],
        "reference": "the masked model itself", "inside": [], "seconds": 0.1,
    }  # fmt: skip
    return (
        _record("train", seed, evaluation=judged(scores[0]), layers=_layers(64), curve=curve),
        _record(
            "prune",
            seed,
            evaluation=judged(scores[1]),
            layers=_layers(24),
            cuts=[cut],
            proof=proof,
            rewritten=False,
        ),
        _record("quantize", seed, evaluation=judged(scores[2]), layers=_layers(24)),
    )


def _row(title: str, kind: str, size: float, scores: list[float], times: dict[str, list[float]]) -> Row:
    def figure(value: float) -> Figure:
        return Figure((value,) * len(scores))

    runtimes = {
        name: RuntimeFigures(
            p50=Figure(tuple(values)), p90=Figure(tuple(v * 1.5 for v in values)), score=Figure(tuple(scores)),
            parity=figure(0.995 if title == "int8" and name != "torch" else 1.0), different=figure(1.0),
            simulated=title == "int8" and name == "torch",
        )
        for name, values in times.items()
    }  # fmt: skip
    label = {"original": "train", "pruned": "prune", "int8": "quantize"}[title]
    return Row(
        label, kind, title, figure(1000 * size), figure(2000 * size), figure(4000 * size), "onnxruntime",
        Figure(tuple(scores)), Figure(tuple(scores)), figure(500), runtimes,
    )  # fmt: skip


@pytest.fixture
def summary() -> RunSummary:
    scores = [(0.98, 0.41, 0.975), (0.97, 0.38, 0.97)]
    columns = [[seed[i] for seed in scores] for i in range(3)]
    rows = (
        _row("original", "original", 1.0, columns[0], {"torch": [4.0, 4.0], "onnxruntime": [2.0, 2.0]}),
        _row("pruned", "prune", 0.4, columns[1], {"torch": [2.0, 2.0], "onnxruntime": [0.5, 0.5]}),
        _row("int8", "quantize", 0.1, columns[2], {"torch": [9.0, 9.0], "onnxruntime": [1.0, 1.0]}),
    )
    return RunSummary(
        name="r", title="A <test> & more", description=None, metric="accuracy", model="m:n", data="d:e", samples=200,
        rows=rows, seeds=tuple(SeedRun(n, _stages(n, scores[n])) for n in range(2)), recipe_text="name: <r>\n",
        versions={"dwindle": "9.9.9", "torch": "2.x"}, machine={"processor cores": "2"}, batch_size=1, threads=1,
    )  # fmt: skip


@pytest.fixture
def unlabelled(summary: RunSummary) -> RunSummary:
    values = copy.deepcopy(summary.to_json())
    values["metric"] = "agreement"
    values["rows"] = [values["rows"][0], values["rows"][2]]
    for row in values["rows"]:
        row["accuracy"] = None
        row["runtimes"] = {}
    for run in values["seeds"]:
        run["stages"] = [run["stages"][0], run["stages"][2]]
        for stage in run["stages"]:
            stage["result"]["evaluation"]["accuracy"] = None
            stage["result"].pop("curve", None)
        run["stages"][0]["kind"] = "original"
    return RunSummary.from_json(values)
