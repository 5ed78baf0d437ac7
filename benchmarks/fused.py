"""All methods in one training run against one after the other, with the same number of steps and the same cost.

    python benchmarks/fused.py [--tasks digits fashion] [--seeds 3]      rows in benchmarks/results/fused.jsonl
    python benchmarks/fused.py --page                                    docs/fusion_results.md from the rows

From the same trained network: channels by Taylor's criterion (half of every layer's, or none), int8 by LSQ, and a
teacher that is the network itself; or layers of low rank first. ``fused`` has all of it in one run. ``in turn`` prunes
and trains, then learns from the teacher, then trains with rounding: a third of the steps each, each with a learning
rate that rises and falls. ``in turn, teacher throughout`` lets the teacher take part in every one of its stages, as a
stricter comparison. What comes out is realized, exported and judged in ONNX Runtime on the whole test set; where a way
ends with the same layers, its multiply-accumulates times bits are the same, and the rows say how many.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dwindle as dw
from contest.tasks import TASKS, Task, rise_and_fall, trained
from dwindle.distillation import Distiller
from dwindle.graph.macs import count_macs
from dwindle.pruning import AGPPruner, TaylorPruner
from dwindle.quantization import TrainingQuantizer
from dwindle.training import TrainingOptions, fit

HERE = Path(__file__).resolve().parent
MODELS = HERE / "results" / "cache" / "pruners"
ROWS = HERE / "results" / "fused.jsonl"
PAGE = HERE.parent / "docs" / "fusion_results.md"
EPOCHS = {"digits": 30, "fashion": 9}
TEACHER = 0.7
"""Weight of the teacher's answers; the labels have the rest."""
CONVOLUTIONS = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
RANK = {"macs": 0.6}
WAYS = ("fused", "in turn", "in turn, teacher throughout")
METHODS = ("channels + int8", "low rank + int8", "low rank + channels + int8")


_REMARK = """\
The digits have 450 test pictures, of which one is .22 %. Ranks of low rank are chosen before the training in every way.
Where the teacher takes part in every stage, part of what one run gives is there already: its teacher in all steps.
"""


def verdict(rows: list[dict[str, Any]]) -> str:
    """Say in how many pairs of means one run is at or above the other ways."""
    means = {
        key: statistics.mean(
            row["accuracy"] for row in rows if (row["task"], row["method"], row["way"]) == key
        )
        for key in {(row["task"], row["method"], row["way"]) for row in rows}
    }
    said = []
    for way in WAYS[1:]:
        gains = [
            100 * (mean - means[task, method, way])
            for (task, method, own), mean in means.items()
            if own == WAYS[0] and (task, method, way) in means
        ]
        if gains:
            above = sum(gain >= 0 for gain in gains)
            said.append(
                f"against *{way}* in {above} of {len(gains)} pairs of rows ({statistics.mean(gains):+.2f} points on "
                f"the mean, {min(gains):+.2f} at worst)"
            )
    return f"One run is at or above: {'; '.join(said)}.\n\n{_REMARK}"


class Job:
    """One way through for one task and seed."""

    def __init__(self, task: Task, seed: int, original: nn.Module, epochs: int) -> None:
        self.task, self.seed, self.original, self.epochs = task, seed, original, epochs
        self.steps = 0

    def train(
        self, model: nn.Module, compressors: Sequence[Any], share: float, *, teacher: bool
    ) -> dw.training.CompressionRun:
        """Train for a share of all epochs; the learning rate rises and falls once."""
        epochs = round(self.epochs * share)
        loader = self.task.loader(self.seed)
        steps = epochs * len(loader)
        rate = self.task.tuning_rate
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rise_and_fall(steps, step))
        all_of_it = [*compressors]
        if teacher:
            all_of_it.append(
                Distiller(model, teacher=copy.deepcopy(self.original), temperature=4.0, logits_weight=TEACHER)
            )
        options = TrainingOptions(
            seed=self.seed, progress=False, task_weight=1.0 - TEACHER if teacher else 1.0
        )
        fit(
            model, loader, optimizer, epochs=epochs, schedule=schedule, compressors=all_of_it, options=options
        )
        self.steps += steps
        return model.eval()

    def pruner(self, model: nn.Module, share: float) -> AGPPruner:
        """Channels by Taylor, in ten steps over the first half of a stage."""
        steps = round(self.epochs * share) * len(self.task.loader(self.seed))
        every = max(1, steps // 20)
        return AGPPruner(
            TaylorPruner(model, CONVOLUTIONS, example_inputs=self.task.examples), every, total_times=10
        )

    def quantizer(self, model: nn.Module) -> TrainingQuantizer:
        """Int8 by LSQ, placed for ONNX Runtime."""
        batches = [images for images, _ in self.task.calibration]
        return TrainingQuantizer(model, calibration_data=batches, method="lsq", backend="onnxruntime")

    def begin(self, method: str) -> nn.Module:
        """The trained network, with layers of low rank where they are asked for."""
        model = copy.deepcopy(self.original)
        if method.startswith("low rank"):
            data = [images for images, _ in self.task.calibration]
            dw.factorize(model, example_inputs=self.task.examples, target=RANK, data=data)
        return model

    def run(self, method: str, way: str) -> nn.Module:
        """Do everything; what comes out simulates int8 and is small."""
        model, cuts = self.begin(method), "channels" in method
        if way == "fused":
            own = [self.pruner(model, 1.0)] if cuts else []
            self.train(model, [*own, self.quantizer(model)], 1.0, teacher=True)
            return dw.realize(model, self.task.examples).model if cuts else model
        throughout = "throughout" in way
        if cuts:
            self.train(model, [self.pruner(model, 1 / 3)], 1 / 3, teacher=throughout)
            model = dw.realize(model, self.task.examples).model
        else:
            self.train(model, [], 1 / 3, teacher=throughout)
        self.train(model, [], 1 / 3, teacher=True)
        self.train(model, [self.quantizer(model)], 1 / 3, teacher=throughout)
        return model


def judged(job: Job, model: nn.Module) -> dict[str, Any]:
    """Write the int8 file and run it on the test set."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        written = dw.export(model, Path(folder) / "model.onnx", example_inputs=job.task.examples)
        session = onnxruntime.InferenceSession(str(written.path), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        right = equal = total = 0
        with torch.no_grad():
            for images, labels in job.task.test:
                said = torch.from_numpy(session.run(None, {name: images.numpy()})[0]).argmax(1)
                right += int((said == labels).sum())
                equal += int((said == model(images).argmax(1)).sum())
                total += len(labels)
        parity = 200.0 if written.parity_db is None else written.parity_db  # None: the same bits
        return {
            "accuracy": right / total,
            "equal": equal / total,
            "parity_db": parity,
            "bytes": written.bytes,
        }


def measure(task: Task, seed: int, epochs: int, method: str, way: str) -> dict[str, Any]:
    """Return one row."""
    original = trained(task, seed, MODELS)
    job = Job(task, seed, original, epochs)
    begin = time.perf_counter()
    torch.manual_seed(seed)
    model = job.run(method, way)
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        whole, left = count_macs(original, task.examples, {}), count_macs(model, task.examples, {})
    return {
        "task": task.name,
        "seed": seed,
        "method": method,
        "way": way,
        "float_accuracy": task.accuracy(original),
        **judged(job, model),
        "macs": left / whole,
        "bit_operations": left / whole / 16,
        "steps": job.steps,
        "seconds": round(seconds, 1),
    }


def page(rows: list[dict[str, Any]]) -> str:
    """Return the page of results."""
    lines = [
        "# In one run, or one after the other",
        "",
        "Made by `benchmarks/fused.py`, which says how; do not edit by hand. Mean and standard deviation over the",
        "seeds, in ONNX Runtime, int8; the same number of optimizer steps in every row of a task. *Bit operations*",
        "are multiply-accumulates times bits of both factors, as a share of the float network's at 32 bits each.",
        "*Parity* is the lowest of all seeds between the simulation and the file; 200 dB are the same bits.",
        "",
        "| task | methods | way | accuracy | float | MACs | bit operations | parity | equal classes | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["method"], row["way"]), []).append(row)
    order = [
        (task, method, way)
        for task in EPOCHS
        for method in METHODS
        for way in WAYS
        if (task, method, way) in groups
    ]
    for key in order:
        own = groups[key]
        scores = [100 * row["accuracy"] for row in own]
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        whole, macs, bits = (
            statistics.mean(row[figure] for row in own)
            for figure in ("float_accuracy", "macs", "bit_operations")
        )
        lines.append(
            f"| {key[0]} | {key[1]} | {key[2]} | {statistics.mean(scores):.2f}{spread} % "
            f"| {100 * whole:.2f} % | {macs:.1%} | {bits:.2%} "
            f"| {min(row['parity_db'] for row in own):.0f} dB | {min(row['equal'] for row in own):.1%} | {len(own)} |"
        )
    return "\n".join([*lines, "", verdict(rows)])


def main() -> None:
    """Run what is missing, or write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="*", default=list(EPOCHS), choices=list(EPOCHS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="in place of each task's own number")
    parser.add_argument("--output", type=Path, default=ROWS)
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    known = (
        [json.loads(line) for line in options.output.read_text().splitlines()]
        if options.output.exists()
        else []
    )
    if options.page:
        PAGE.write_text(page(known))
        return
    torch.set_num_threads(1)
    done = {(row["task"], row["seed"], row["method"], row["way"]) for row in known}
    for name in options.tasks:
        task = TASKS[name]()
        for seed in range(options.seeds):
            for method in options.methods:
                for way in options.ways:
                    if (name, seed, method, way) in done:
                        continue
                    row = measure(task, seed, options.epochs or EPOCHS[name], method, way)
                    with options.output.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(
                        f"{name:8} {seed} {method:28} {way:28} {row['accuracy']:.2%} of {row['float_accuracy']:.2%}, "
                        f"MACs {row['macs']:.1%}, parity {row['parity_db']:.0f} dB, {row['seconds']} s",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
