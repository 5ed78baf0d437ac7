"""Prunes every model of the catalogue to half and checks all that is promised: the sweep behind ``docs/zoo.md``.

    python benchmarks/zoo.py                              everything: own, torchvision, timm, hf (an hour or more)
    python benchmarks/zoo.py --library timm --jobs 2      one library
    python benchmarks/zoo.py --models hf/bert own/gru     single models
    python benchmarks/zoo.py --tables                     write docs/zoo.md and the HTML table from the results

One process a model, with limits of time and memory. The results are JSON lines, appended as each model ends; a sweep
that was interrupted goes on where it stopped. ``--again failed`` repeats the failures, ``--again all`` everything.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE)]

RESULTS = HERE / "results" / "zoo.jsonl"
GIBIBYTE = 2**30


def child(name: str, memory: float, onnx: bool) -> None:
    """Check one model in this process and print its row as the last line."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory * GIBIBYTE), -1))
    from support import torchvision_shim

    torchvision_shim.install()
    from support.architectures.check import check

    print(json.dumps(check(name, onnx=onnx).to_json()))


def launch(name: str, options: argparse.Namespace) -> tuple[subprocess.Popen[str], Any, Any]:
    """Start the process of one model; its output goes to files, so that a full pipe cannot stop it."""
    output, errors = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
    command = [sys.executable, __file__, "--child", name, "--memory", str(options.memory)]
    if options.no_onnx:
        command.append("--no-onnx")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=output, stderr=errors, text=True, env=environment)
    return process, output, errors


def row_of(
    name: str, process: Any, output: Any, errors: Any, seconds: float, timed_out: bool
) -> dict[str, Any]:
    """Return the row that a process printed, or one that says how it ended."""
    output.seek(0)
    lines = output.read().splitlines()
    if process.returncode == 0 and lines and lines[-1].startswith("{"):
        row: dict[str, Any] = json.loads(lines[-1])
    else:
        errors.seek(0)
        last = errors.read().strip().splitlines()[-1:]
        why = (
            f"no end after {seconds:.0f} s"
            if timed_out
            else f"exit {process.returncode}: {' '.join(last)[:300]}"
        )
        row = {"model": name, "passes": False, "failures": {"process": why}}
    row["seconds"] = {**row.get("seconds", {}), "all": seconds}
    return row


def sweep(wanted: list[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run the models, ``--jobs`` at a time, and yield each row as its process ends."""
    waiting = list(wanted)
    running: dict[str, tuple[Any, Any, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < options.jobs:
            name = waiting.pop(0)
            running[name] = (*launch(name, options), time.monotonic())
        for name, (process, output, errors, started) in list(running.items()):
            seconds = time.monotonic() - started
            timed_out = process.poll() is None and seconds > options.limit
            if timed_out:
                process.kill()
                process.wait()
            if process.poll() is not None:
                del running[name]
                yield row_of(name, process, output, errors, seconds, timed_out)
        time.sleep(0.1)


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Return the latest row of each model."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {row["model"]: row for row in rows}


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", help="names such as timm/resnet10t")
    parser.add_argument("--library", choices=["own", "torchvision", "timm", "hf"], nargs="*")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON lines, appended to")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=900, help="seconds a model")
    parser.add_argument("--memory", type=float, default=10, help="GiB a model")
    parser.add_argument("--again", choices=["failed", "all"])
    parser.add_argument("--no-onnx", action="store_true")
    parser.add_argument(
        "--tables", action="store_true", help="write the tables from the results, run nothing"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.memory, not options.no_onnx)
        return
    if options.tables:
        import zoo_tables

        zoo_tables.write(list(read_results(options.output).values()), HERE.parent / "docs", HERE / "results")
        return
    from support.architectures import check

    every = options.models or [
        name for library in options.library or list(check.LIBRARIES) for name in check.names(library)
    ]
    done = {} if options.again == "all" else read_results(options.output)
    if options.again == "failed":
        done = {name: row for name, row in done.items() if row["passes"] and not row["failures"]}
    wanted = [name for name in every if name not in done]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    passed = 0
    with options.output.open("a") as file:
        for number, row in enumerate(sweep(wanted, options), 1):
            file.write(json.dumps(row) + "\n")
            file.flush()
            passed += row["passes"]
            print(f"[{number}/{len(wanted)}] {line(row)}", flush=True)
    print(f"{passed} of {len(wanted)} pass; {len(every) - len(wanted)} were done before")
    sys.exit(0 if passed == len(wanted) else 1)


def line(row: dict[str, Any]) -> str:
    """One line for the person who watches."""
    if "left" not in row:
        return f"{row['model']}: FAIL {row['failures']}"
    proof, own = row["proof_difference"], row["independent_difference"]
    return (
        f"{row['model']}: {'ok' if row['passes'] else 'FAIL'} left {row['left']:.2f} prunable {row['prunable_share']:.2f} "
        f"{'in place' if row['in_place'] else 'rewritten' if row['in_place'] is False else 'nothing cut'} "
        f"proof {'-' if proof is None else format(proof, '.0e')} independent {'-' if own is None else format(own, '.0e')} "
        f"{row['seconds']['all']:.0f} s {row['failures'] or ''}"
    )


if __name__ == "__main__":
    main()
