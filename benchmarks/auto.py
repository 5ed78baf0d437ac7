"""``dw.auto`` at a quarter of the latency, against uniform pruning and int8 at the same measured latency.

    python benchmarks/auto.py [--tasks digits fashion sentences] [--seeds 3]      rows in benchmarks/results/auto.jsonl
    python benchmarks/auto.py --page                                              docs/auto_results.md from the rows

A row of ``dw.auto`` names a budget of 0.25 of the float network's latency in ONNX Runtime and in OpenVINO, both at
once, one thread, and has a validation set that is no part of the training data; the rows are judged on the test set, by
the exported file in each runtime, and timed anew beside the float network. Two other ways get the latency that
``dw.auto`` came to, in both runtimes: every axis loses the same share by L1, found by bisection on measured times
(*uniform*, which is fine-tuned on the labels and quantized after training, and *uniform, trained like auto*, which has
the training of ``dw.auto``: the float network as teacher and int8 in the loop). All ways train for the same number of
epochs.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dwindle as dw
from contest.tasks import SentenceClassifier, Task, TokenLoader, film_sentences, image_task, trained
from dwindle import zoo
from dwindle.search.auto import Candidate, Training
from dwindle.search.auto.fitting import Fitted, Fitter, uniform_share
from dwindle.search.auto.judging import Judge
from dwindle.search.auto.latencies import Latencies
from dwindle.search.auto.limits import Limit
from dwindle.search.auto.making import built, integer_model
from dwindle.search.auto.making import trained as train_candidate
from dwindle.search.auto.variant import Workpiece
from dwindle.search.auto.workbench import Workbench

HERE = Path(__file__).resolve().parent
MODELS = HERE / "results" / "cache" / "auto"
ROWS = HERE / "results" / "auto.jsonl"
PAGE = HERE.parent / "docs" / "auto_results.md"
SHARE = 0.25
RUNTIMES = ("onnxruntime", "openvino")
WAYS = ("dw.auto", "uniform", "uniform, trained like auto")
LIMIT_SECONDS = 15 * 60


@dataclass
class Case:
    """A task with its validation set and the batch whose latency counts.

    Attributes:
        task: Model, training data, test data.
        validation: Batches that no way trains on.
        batch: Samples of a timed pass.
        training: How candidates are trained.
    """

    task: Task
    validation: list[Any]
    batch: int
    training: Training

    @property
    def examples(self) -> tuple[Tensor, ...]:
        """The inputs whose latency counts."""
        return tuple(own[:1].repeat(self.batch, *[1] * (own.dim() - 1)) for own in self.task.examples)


def _sgd(rate: float, parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=5e-4, nesterov=True)


def _adamw(rate: float, parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, rate, weight_decay=0.01)


def _images(
    name: str, data: zoo.ImageData, held: int, build: Any, small: int, batch: int, **own: Any
) -> Case:
    """Make a case of images, whose last training pictures are the validation set."""
    left = dataclasses.replace(
        data, train_images=data.train_images[:-held], train_labels=data.train_labels[:-held]
    )
    task = image_task(name, left, build, rate=0.2, tuning_rate=0.1, **own)
    validation = list(zoo.BatchLoader(data.train_images[-held:], data.train_labels[-held:], 250))
    return Case(task, validation, batch, Training(small, functools.partial(_sgd, 0.1)))


def digits() -> Case:
    """scikit-learn's digits, 300 of them for validation; ResNet-8; batches of 32."""
    return _images("digits", zoo.digits(), 300, zoo.digits_resnet, 30, 32, epochs=20, tuning=10)


def fashion() -> Case:
    """6,000 pictures of Fashion-MNIST and 1,000 for validation; ResNet-8 behind a strided stem; batches of 32."""
    data = zoo.fashion_mnist().first(7_000, 5_000)
    return _images("fashion", data, 1_000, zoo.fashion_resnet, 12, 32, epochs=10, tuning=2)


def sentences(train: int = 4_500, held: int = 700, test: int = 2_000, length: int = 32) -> Case:
    """Sentences about films: all-MiniLM-L6-v2 with a linear layer behind its mean; batches of 8, 32 tokens each."""
    tokens, labels = film_sentences(train + held + test, length)
    parts = (slice(train), slice(train, train + held), slice(train + held, None))
    full = torch.full((2, length), 100)
    task = Task(
        "sentences",
        SentenceClassifier,
        lambda seed: TokenLoader(tokens[parts[0]], labels[parts[0]], 32, shuffle=True, seed=seed),
        list(TokenLoader(tokens[parts[2]], labels[parts[2]], 100, shuffle=False)),
        (full, torch.ones_like(full)),
        list(TokenLoader(tokens[:256], labels[:256], 32, shuffle=False)),
        epochs=2,
        tuning=1,
        rate=5e-5,
        tuning_rate=2e-4,
        adam=True,
    )
    validation = list(TokenLoader(tokens[parts[1]], labels[parts[1]], 100, shuffle=False))
    return Case(
        task, validation, 8, Training(2, functools.partial(_adamw, 3e-4), quantize_at=0.5, cache=True)
    )


CASES = {"digits": digits, "fashion": fashion, "sentences": sentences}


def by_auto(
    case: Case, seed: int, original: nn.Module, **options: Any
) -> tuple[nn.Module, Candidate, dict[str, Any]]:
    """Let ``dw.auto`` find a model."""
    begin = time.perf_counter()
    result = dw.auto(
        original,
        case.task.loader(seed),
        budget={f"latency:{name}": SHARE for name in RUNTIMES},
        validation=case.validation,
        training=case.training,
        example_inputs=case.examples,
        threads=1,
        seed=seed,
        **options,
    )
    seconds = time.perf_counter() - begin
    figures = {
        "seconds": seconds,
        "parts": dict(result.seconds),
        "trials": len(result.study.trials) if result.study else 0,
    }
    return result.model, result.candidate, figures


class Uniform:
    """Every axis loses the same share, so much that the measured times are those of another model."""

    def __init__(self, case: Case, original: nn.Module, seconds: dict[str, float], bench: Workbench) -> None:
        self.case = case
        self.workpiece = Workpiece(
            original, case.examples, {}, case.task.calibration, nn.functional.cross_entropy
        )
        limits = [Limit(f"latency:{name}", seconds[f"latency:{name}"], True) for name in RUNTIMES]
        latencies = Latencies(self.workpiece, bench, "onnxruntime", 1)
        self.fitter = Fitter(self.workpiece, bench, limits, "onnxruntime", latencies)

    def candidate(self) -> Fitted:
        """Return the uniform candidate; the smallest one where no uniform one is as fast."""
        found = self.fitter.fit(Candidate(), uniform_share())
        if found is not None and found.fits:
            return found
        space = self.workpiece.variant().space
        return self.fitter.measure(Candidate(counts=space.named(space.smallest())))

    def trained(self, candidate: Candidate, seed: int) -> nn.Module:
        """Train it on the labels in float, then quantize."""
        small = built(self.workpiece, candidate)
        training = Training(self.case.training.epochs, self.case.training.optimizer, teacher_weight=0.0)
        small = self._train(candidate.but(numbers="float32"), small, training, seed)
        return integer_model(self.workpiece, candidate, small, "onnxruntime")

    def trained_like_auto(self, candidate: Candidate, seed: int) -> nn.Module:
        """Train it as ``dw.auto`` trains."""
        own = candidate.but(quantize_at=self.case.training.quantize_at)
        return self._train(own, built(self.workpiece, own), self.case.training, seed)

    def _train(self, candidate: Candidate, small: nn.Module, training: Training, seed: int) -> nn.Module:
        return train_candidate(
            self.workpiece,
            candidate,
            small,
            self.case.task.loader(seed),
            training,
            epochs=training.epochs,
            loss=nn.functional.cross_entropy,
            backend="onnxruntime",
            seed=seed,
            progress=False,
        )


def judged(case: Case, original: nn.Module, model: nn.Module, bench: Workbench) -> dict[str, Any]:
    """Time a model beside the original, and run its file on the test set in each runtime."""
    costs = bench.shares(bench.measure(model, original, integers=True))
    judge = Judge("accuracy", original, case.task.test)
    return {
        "latency": {name: costs[f"latency:{name}"] for name in RUNTIMES},
        "bytes": costs["bytes"],
        "accuracy": {name: judge(session) for name, session in bench.sessions().items()},
    }


def measure(name: str, seed: int, ways: list[str]) -> list[dict[str, Any]]:
    """Return the rows of one task and seed."""
    case = CASES[name]()
    original = trained(case.task, seed, MODELS)
    costs = [*(f"latency:{own}" for own in RUNTIMES), "bytes"]
    bench = Workbench(original, case.examples, {}, costs, threads=1, repeats=100)
    whole = Judge("accuracy", original, case.task.test)(original)
    model, candidate, figures = by_auto(case, seed, copy.deepcopy(original))
    rows = [
        {"way": WAYS[0], **figures, **judged(case, original, model, bench), "candidate": candidate.to_json()}
    ]
    own = {cost: bench.whole[cost] * rows[0]["latency"][cost.partition(":")[2]] for cost in costs[:-1]}
    uniform = Uniform(case, original, own, bench)
    fitted = uniform.candidate()
    makers = {WAYS[1]: uniform.trained, WAYS[2]: uniform.trained_like_auto}
    for way in ways:
        if way in makers:
            begin = time.perf_counter()
            made = makers[way](fitted.candidate, seed)
            seconds = time.perf_counter() - begin
            rows.append(
                {
                    "way": way,
                    "seconds": seconds,
                    **judged(case, original, made, bench),
                    "candidate": fitted.candidate.to_json(),
                }
            )
    return [{"task": name, "seed": seed, "float": whole, **row} for row in rows]


def page(rows: list[dict[str, Any]]) -> str:
    """Return the page of results."""
    lines = [
        "# A quarter of the latency",
        "",
        "Made by `benchmarks/auto.py`, which says how; do not edit by hand. `dw.auto` had a budget of 0.25 of the",
        "float network's latency in ONNX Runtime and in OpenVINO, both at once, one thread. The uniform ways got the",
        "latency that it came to; where no uniform model is that fast, they are the smallest there is (a tenth of",
        "every axis). Mean over the seeds; accuracy of the exported file on the test set, the lower of the two",
        "runtimes. *Drop* is in points, the largest of all seeds behind the mean.",
        "",
        "| task | way | ONNX Runtime | OpenVINO | bytes | float | accuracy | drop | minutes | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for task in CASES:
        for way in WAYS:
            own = [row for row in rows if (row["task"], row["way"]) == (task, way)]
            if not own:
                continue
            scores = [min(row["accuracy"].values()) for row in own]
            drops = [100 * (row["float"] - score) for row, score in zip(own, scores, strict=True)]
            times = [statistics.mean(row["latency"][name] for row in own) for name in RUNTIMES]
            size = statistics.mean(row["bytes"] for row in own)
            lines.append(
                f"| {task} | {way} | {times[0]:.3f} | {times[1]:.3f} | {size:.3f} "
                f"| {100 * statistics.mean(row['float'] for row in own):.2f} % | {100 * statistics.mean(scores):.2f} % "
                f"| {statistics.mean(drops):.2f} (at most {max(drops):.2f}) "
                f"| {statistics.mean(row['seconds'] for row in own) / 60:.1f} | {len(own)} |"
            )
    return "\n".join([*lines, "", *_found(rows), ""])


def _found(rows: list[dict[str, Any]]) -> list[str]:
    """Say what was found for each task and seed."""
    lines = ["What `dw.auto` did:", ""]
    for row in rows:
        if row["way"] == WAYS[0]:
            own = Candidate.from_json(row["candidate"])
            lines.append(f"- {row['task']}, seed {row['seed']}: {own.summary()}")
    return lines


def main() -> None:
    """Run what is missing, or write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
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
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    done = {(row["task"], row["seed"]) for row in known}
    for seed in options.seeds:
        for name in options.tasks:
            if (name, seed) in done:
                continue
            for row in measure(name, seed, options.ways):
                with options.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(
                    f"{name:10} {seed} {row['way']:28} {row['accuracy']} of {row['float']:.4f}, "
                    f"latency {row['latency']}, {row['seconds']:.0f} s {row.get('parts', '')}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
