"""``dw.auto`` at a quarter of the latency, against uniform pruning and int8 at the same measured latency.

    python benchmarks/auto.py [--tasks digits sentences] [--seeds 0 1 2]         rows in benchmarks/results/auto.jsonl
    python benchmarks/auto.py --page                                              docs/auto_results.md from the rows

A row of ``dw.auto`` names a budget of 0.25 of the float network's latency in ONNX Runtime and in OpenVINO, both at
once, one thread, and has a validation set that is no part of the training data; the rows are judged on the test set, by
the exported file in each runtime, and timed anew beside the float network. Two other ways get the same latency (the
budget, or what ``dw.auto`` came to where that is more): every axis loses the same share by L1, the least that is
measured to be as fast (*uniform*, which is fine-tuned on the labels and quantized after training, and *uniform, trained
like auto*, which has the training of ``dw.auto``: int8 in the loop, and the float network as teacher where that is
one). All ways train for the same number of epochs.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dwindle as dw
from contest.tasks import SentenceClassifier, Task, TokenLoader, film_sentences, image_task, trained
from dwindle import zoo
from dwindle.search.auto import Candidate, Training
from dwindle.search.auto.fitting import Fitted, Fitter
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
RATIOS = [step / 20 for step in range(6, 19)]
"""What uniform candidates may lose: .3 to .9."""


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
    name: str, data: zoo.ImageData, held: int, build: Any, training: Training, batch: int, **own: Any
) -> Case:
    """Make a case of images, whose last training pictures are the validation set."""
    left = dataclasses.replace(
        data, train_images=data.train_images[:-held], train_labels=data.train_labels[:-held]
    )
    task = image_task(name, left, build, rate=0.2, tuning_rate=0.1, **own)
    validation = list(zoo.BatchLoader(data.train_images[-held:], data.train_labels[-held:], 250))
    return Case(task, validation, batch, training)


def digits() -> Case:
    """scikit-learn's digits, 300 of them for validation; ResNet-8; batches of 32."""
    training = Training(30, functools.partial(_sgd, 0.1))
    return _images("digits", zoo.digits(), 300, zoo.digits_resnet, training, 32, epochs=20, tuning=10)


def fashion(build: Callable[[], nn.Module] | None = None, name: str = "fashion") -> Case:
    """15,000 pictures of Fashion-MNIST, 5,000 for validation; a ResNet-14 of He's widths; batches of 32."""
    data = zoo.fashion_mnist().first(20_000)
    training = Training(10, functools.partial(_sgd, 0.1), teacher_weight=0.5, quantize_at=0.5)
    build = build or functools.partial(zoo.fashion_resnet, (16, 32, 64), (2, 2, 2))
    return _images(name, data, 5_000, build, training, 32, epochs=10, tuning=2)


def wide() -> Case:
    """The same pictures, and a ResNet-8 twice as wide: half of all its channels do as well as all of them."""
    return fashion(zoo.fashion_resnet, "fashion-wide")


def deeper() -> Case:
    """The same pictures, and He's ResNet-20: chosen before it was run, lest ``fashion`` be a lucky choice."""
    return fashion(functools.partial(zoo.fashion_resnet, (16, 32, 64), (3, 3, 3)), "fashion-20")


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


CASES: dict[str, Callable[[], Case]] = {
    "digits": digits,
    "fashion": fashion,
    "fashion-20": deeper,
    "fashion-wide": wide,
    "sentences": sentences,
}


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
    """Every axis loses the same share, so much that the measured times are at most those of another model."""

    def __init__(self, case: Case, original: nn.Module, latency: dict[str, float], bench: Workbench) -> None:
        self.case, self.original, self.bench = case, original, bench
        self.limits = [Limit(f"latency:{name}", max(SHARE, latency[name]), False) for name in RUNTIMES]
        self.workpiece = self._workpiece(1)

    def _workpiece(self, round_to: int) -> Workpiece:
        return Workpiece(
            self.original,
            self.case.examples,
            {},
            self.case.task.calibration,
            nn.functional.cross_entropy,
            round_to=round_to,
        )

    def candidate(self) -> Fitted:
        """Return the uniform candidate that loses least and is as fast; the fastest one where none is.

        Widths are tried as they come, and as multiples of 8, which runtimes are fast at.
        """
        able: list[tuple[float, Fitted]] = []
        others: list[Fitted] = []
        for round_to in (8, 1):
            workpiece = self._workpiece(round_to)
            latencies = Latencies(workpiece, self.bench, "onnxruntime", 1)
            fitter = Fitter(workpiece, self.bench, self.limits, "onnxruntime", latencies)
            space = workpiece.variant().space
            for ratio in RATIOS:
                counts = space.counts({v.name: min(ratio, v.largest_ratio) for v in space.variables})
                found = fitter.measure(Candidate(counts=space.named(counts)))
                if found.fits:
                    able.append((ratio, found))
                    break
                others.append(found)
        if able:
            return min(able, key=lambda own: own[0])[1]
        return min(others, key=lambda own: own.over)

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


def measure(name: str, seed: int, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of one task and seed that are not known yet."""
    case = CASES[name]()
    original = trained(case.task, seed, MODELS)
    costs = [*(f"latency:{own}" for own in RUNTIMES), "bytes"]
    bench = Workbench(original, case.examples, {}, costs, threads=1, repeats=100)
    whole = Judge("accuracy", original, case.task.test)(original)
    about = {"task": name, "seed": seed, "float": whole}
    by_way = {row["way"]: row for row in known}
    if WAYS[0] not in by_way:
        model, candidate, figures = by_auto(case, seed, copy.deepcopy(original))
        by_way[WAYS[0]] = {
            **about,
            "way": WAYS[0],
            **figures,
            **judged(case, original, model, bench),
            "candidate": candidate.to_json(),
        }
        yield by_way[WAYS[0]]
    uniform = Uniform(case, original, by_way[WAYS[0]]["latency"], bench)
    makers = {WAYS[1]: uniform.trained, WAYS[2]: uniform.trained_like_auto}
    missing = [way for way in makers if way not in by_way]
    fitted = uniform.candidate() if missing else None
    for way in missing:
        assert fitted is not None
        begin = time.perf_counter()
        made = makers[way](fitted.candidate, seed)
        seconds = time.perf_counter() - begin
        yield {
            **about,
            "way": way,
            "seconds": seconds,
            **judged(case, original, made, bench),
            "candidate": fitted.candidate.to_json(),
        }


def page(rows: list[dict[str, Any]]) -> str:
    """Return the page of results."""
    lines = [
        "# A quarter of the latency",
        "",
        "Made by `benchmarks/auto.py`, which says how; do not edit by hand. `dw.auto` had a budget of 0.25 of the",
        "float network's latency in ONNX Runtime and in OpenVINO, both at once, one thread. So had the uniform ways",
        "(widths as they come or multiples of 8, whichever loses less); where no uniform model is that fast, it is the",
        "fastest. Mean over the seeds; accuracy of the exported file on the test set, the lower of the two runtimes.",
        "*Drop* is in points, the largest of all seeds behind the mean. `fashion` took the place of `fashion-wide`",
        "after `dw.auto` was seen to gain nothing there ([why](decisions.md)).",
        "",
        "| task | way | ONNX Runtime | OpenVINO | bytes | float | accuracy | drop | minutes | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for task in CASES:
        for way in WAYS:
            own = _rows_of(rows, task, way)
            if not own:
                continue
            scores = [_score_of(row) for row in own]
            drops = [100 * (row["float"] - score) for row, score in zip(own, scores, strict=True)]
            times = [statistics.mean(row["latency"][name] for row in own) for name in RUNTIMES]
            size = statistics.mean(row["bytes"] for row in own)
            lines.append(
                f"| {task} | {way} | {times[0]:.3f} | {times[1]:.3f} | {size:.3f} "
                f"| {100 * statistics.mean(row['float'] for row in own):.2f} % | {100 * statistics.mean(scores):.2f} % "
                f"| {statistics.mean(drops):.2f} (at most {max(drops):.2f}) "
                f"| {statistics.mean(row['seconds'] for row in own) / 60:.1f} | {len(own)} |"
            )
    return "\n".join([*lines, "", *_no_gain(rows), *_found(rows), ""])


def _rows_of(rows: list[dict[str, Any]], task: str, way: str) -> list[dict[str, Any]]:
    return [row for row in rows if (row["task"], row["way"]) == (task, way)]


def _score_of(row: dict[str, Any]) -> float:
    """Return the accuracy in the runtime where it is lower."""
    return float(min(row["accuracy"].values()))


def _no_gain(rows: list[dict[str, Any]]) -> list[str]:
    """Say where a search brings nothing over a uniform cut that is as fast."""
    lines = []
    for task in CASES:
        own = {way: _rows_of(rows, task, way) for way in WAYS}
        if not all(own.values()):
            continue
        scores = {way: statistics.mean(map(_score_of, of)) for way, of in own.items()}
        as_fast = [
            way
            for way in WAYS[1:]
            if all(row["latency"][name] <= SHARE * 1.05 for row in own[way] for name in RUNTIMES)
        ]
        best = max(as_fast, key=lambda way: scores[way], default=None)
        if best is not None and scores[best] >= scores[WAYS[0]]:
            lines.append(
                f"It brings nothing on {task}: *{best}* keeps {100 * scores[best]:.2f} %, `dw.auto` "
                f"{100 * scores[WAYS[0]]:.2f} %. {' '.join((CASES[task].__doc__ or '').split())}"
            )
    return [*lines, ""] if lines else []


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
    for seed in options.seeds:
        for name in options.tasks:
            own = [row for row in known if (row["task"], row["seed"]) == (name, seed)]
            for row in measure(name, seed, own):
                with options.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(
                    f"{name:10} {seed} {row['way']:28} {row['accuracy']} of {row['float']:.4f}, "
                    f"latency {row['latency']}, {row['seconds']:.0f} s {row.get('parts', '')}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
