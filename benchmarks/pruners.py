"""Every pruner at 50, 70 and 90 %, on real tasks, beside Torch-Pruning and NNCF, in one run.

    python benchmarks/pruners.py                                    everything, hours: it goes on where it stopped
    python benchmarks/pruners.py --tasks digits --ratios 0.5 --seeds 0 --methods l2 "group norm"
    python benchmarks/pruners.py --page                             docs/pruners.md and its pictures from the results

Structured pruners take away the same share of MACs (within 2 %), unstructured ones the same share of weights. All
begin with the same trained model and have the same epochs, learning rate and order of batches for fine-tuning or for
pruning while training. Methods alternate within each task, ratio and seed. Results are JSON lines, appended to as each
ends. The peers are optional: ``pip install --no-deps torch-pruning==1.6.1 nncf tabulate torchao``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(HERE)]

RESULTS = HERE / "results" / "pruners.jsonl"
MODELS = HERE / "results" / "cache" / "pruners"
RATIOS = (0.5, 0.7, 0.9)
SEEDS = (0, 1, 2)
Key = tuple[str, str, str, float, int]


def commit() -> str:
    """The commit that runs, with a plus where files differ from it."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def latency(whole: Any, small: Any, inputs: tuple[Any, ...], rounds: int = 30) -> tuple[float, float]:
    """Return the median milliseconds of both models on one sample, taken alternately."""
    import torch

    one = tuple(own[:1] for own in inputs)
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for _ in range(rounds + 5):
            for model, own in zip((whole, small), times, strict=True):
                begin = time.perf_counter()
                model(*one)
                own.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times[0][5:]), statistics.median(times[1][5:])


def row_of(
    task: Any, method: Any, ratio: float, seed: int, whole: Any, accuracy_whole: float
) -> dict[str, Any]:
    """Prune, fine-tune and judge one model."""
    from contest.methods import sparsity
    from dwindle.measure.macs import count_macs

    begin = time.perf_counter()
    small, before = method.run(task, copy.deepcopy(whole), ratio, seed)
    seconds = time.perf_counter() - begin
    small.eval()
    slow, fast = latency(whole, small, task.examples)
    return {
        "accuracy_whole": accuracy_whole,
        "accuracy_before_tuning": before,
        "accuracy": task.accuracy(small),
        "macs": count_macs(small, task.examples) / count_macs(whole, task.examples),
        "parameters": sum(own.numel() for own in small.parameters())
        / sum(own.numel() for own in whole.parameters()),
        "sparsity": sparsity(small),
        "milliseconds_whole": slow,
        "milliseconds": fast,
        "seconds": seconds,
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return all rows, the later of two with the same key winning."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return list({key_of(row): row for row in rows}.values())


def key_of(row: dict[str, Any]) -> Key:
    """What a row is about."""
    return row["task"], row["tool"], row["method"], row["ratio"], row["seed"]


def wanted(options: argparse.Namespace) -> Iterator[tuple[str, int, float, Any]]:
    """Yield task, seed, ratio and method of each row in the order in which they run: methods alternate."""
    from contest.methods import structured_methods, unstructured_methods
    from contest.peers import peer_methods

    methods = [*structured_methods(), *unstructured_methods(), *peer_methods()]
    if options.methods:
        methods = [
            own for own in methods if any(part in f"{own.tool}: {own.name}" for part in options.methods)
        ]
    methods = [own for own in methods if options.kind in (None, own.kind)]
    for seed in options.seeds:
        for task in options.tasks:
            for ratio in options.ratios:
                for method in methods:
                    if method.tasks is None or task in method.tasks:
                        yield task, seed, ratio, method


def run(options: argparse.Namespace) -> None:
    """Make the rows that are missing."""
    import torch

    from contest.tasks import TASKS, trained

    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    known = {
        key_of(row) for row in read_rows(options.output) if options.again is None or "failure" not in row
    }
    tasks: dict[str, Any] = {}
    whole: dict[tuple[str, int], Any] = {}
    source = {"commit": commit(), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
              "processor": platform.machine(), "threads": options.threads}  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name, seed, ratio, method in wanted(options):
        row: dict[str, Any] = {
            "task": name, "tool": method.tool, "method": method.name, "kind": method.kind, "ratio": ratio, "seed": seed,
        }  # fmt: skip
        if key_of(row) in known:
            continue
        task = tasks[name] = tasks.get(name) or _task(TASKS[name](), options.quick)
        if (name, seed) not in whole:
            whole.clear()
            model = trained(task, seed, MODELS / ("quick" if options.quick else ""))
            whole[name, seed] = model, task.accuracy(model)
        try:
            with limited(options.limit):
                row |= row_of(task, method, ratio, seed, *whole[name, seed])
        except Exception as error:
            row["failure"] = f"{type(error).__name__}: {error}"[:300]
        with options.output.open("a") as file:
            file.write(json.dumps({**row, **source}) + "\n")
        print(_line(row), flush=True)


def _task(task: Any, quick: bool) -> Any:
    if quick:
        task.epochs, task.tuning, task.calibration = 2, 2, task.calibration[:2]
    return task


def _line(row: dict[str, Any]) -> str:
    head = f"{row['task']:10} {row['seed']} {row['ratio']:.1f} {row['tool']:14} {row['method']:36}"
    if "failure" in row:
        return f"{head} {row['failure']}"
    return f"{head} {row['accuracy']:.4f} macs {row['macs']:.3f} sparsity {row['sparsity']:.4f} {row['seconds']:.0f} s"


class limited:
    """Raise TimeoutError in the block after so many seconds (Torch-Pruning does not come back from some models)."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        def stop(*given: Any) -> None:
            raise TimeoutError(f"no end after {self.seconds} s")

        signal.signal(signal.SIGALRM, stop)
        signal.alarm(self.seconds)

    def __exit__(self, *given: Any) -> None:
        signal.alarm(0)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="*", default=["digits", "fashion", "sentences"])
    parser.add_argument("--ratios", nargs="*", type=float, default=list(RATIOS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--methods", nargs="*", help="parts of 'tool: method'")
    parser.add_argument("--kind", choices=["structured", "unstructured"])
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON lines, appended to")
    parser.add_argument("--limit", type=int, default=3600, help="seconds a row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--quick", action="store_true", help="one epoch of everything: to try the benchmark, not to judge"
    )
    parser.add_argument("--again", choices=["failed"], help="repeat the rows that failed")
    parser.add_argument("--page", action="store_true", help="write the page from the results, run nothing")
    options = parser.parse_args()
    if options.page:
        from contest.page import write

        write(read_rows(options.output), HERE.parent / "docs")
        return
    run(options)


if __name__ == "__main__":
    main()
