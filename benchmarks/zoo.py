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
import contextlib
import json
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE)]

RESULTS = HERE / "results" / "zoo.jsonl"
GIBIBYTE = 2**30


def commit() -> str:
    """The commit that runs, with a plus where files differ from it."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


COMMIT = commit()


def child(name: str, memory: float, onnx: bool, results: Connection, errors: str) -> None:
    """Check one model in this process and send its row."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory * GIBIBYTE), -1))
    with open(errors, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from support.architectures.check import check

    results.send(check(name, onnx=onnx).to_json())


@dataclass
class Running:
    """A model that is being checked in a process of its own."""

    name: str
    process: BaseProcess
    results: Connection
    errors: Path
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, name: str, options: argparse.Namespace, directory: str) -> Running:
        """Fork it from a server that has imported the libraries already."""
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe(duplex=False)
        errors = Path(directory) / name.replace("/", "_")
        arguments = (name, options.memory, not options.no_onnx, theirs, str(errors))
        process = context.Process(target=child, args=arguments)
        process.start()
        theirs.close()
        return cls(name, process, ours, errors)

    def row(self, limit: float) -> dict[str, Any] | None:
        """Return its row, or one that says how it ended; None while it runs."""
        seconds = time.monotonic() - self.started
        found: dict[str, Any] | None = None
        if self.results.poll():
            with contextlib.suppress(EOFError):
                found = self.results.recv()
            self.process.join()
        elif self.process.is_alive():
            if seconds < limit:
                return None
            self.process.kill()
            self.process.join()
            found = self._failure(f"no end after {seconds:.0f} s")
        if found is None:
            last = self.errors.read_text().strip().splitlines()[-1:] if self.errors.exists() else []
            found = self._failure(f"exit {self.process.exitcode}: {' '.join(last)[:300]}")
        found["seconds"] = {**found.get("seconds", {}), "all": seconds}
        return without_places({**found, "date": time.strftime("%Y-%m-%d"), "commit": COMMIT})

    def _failure(self, why: str) -> dict[str, Any]:
        return {"model": self.name, "passes": False, "failures": {"process": why}}


def without_places(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose messages name files as the project does, and no directory of this machine."""
    text = json.dumps(row).replace(f"{HERE.parent}/", "")
    temporary = re.escape(tempfile.gettempdir())
    text = re.sub(rf"{temporary}/[^\s\"]*/([^/\s\"]+)", r"\1", text)
    text = re.sub(r"/[^\s\"]*/(site-packages|python3\.\d+)/", "", text)
    return dict(json.loads(text))


def sweep(wanted: list[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run the models, ``--jobs`` at a time, and yield each row as its process ends."""
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(HERE), os.environ.get("PYTHONPATH", "")]
    )  # for the server
    multiprocessing.get_context("forkserver").set_forkserver_preload(["zoo_libraries"])
    waiting = list(wanted)
    running: list[Running] = []
    with tempfile.TemporaryDirectory() as directory:
        while waiting or running:
            while waiting and len(running) < options.jobs:
                running.append(Running.start(waiting.pop(0), options, directory))
            for own in list(running):
                row = own.row(options.limit)
                if row is not None:
                    running.remove(own)
                    yield row
            time.sleep(0.05)


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
    options = parser.parse_args()
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
    how = {True: "in place", False: "rewritten", None: "nothing cut"}[row["in_place"]]
    proofs = [row["proof_difference"], row["independent_difference"]]
    differences = ", ".join("-" if found is None else f"{found:.0e}" for found in proofs)
    return (
        f"{row['model']}: {'ok' if row['passes'] else 'FAIL'}, left {row['left']:.2f}, "
        f"prunable {row['prunable_share']:.2f}, {how}, differences {differences}, {row['seconds']['all']:.0f} s "
        f"{row['failures'] or ''}"
    )


if __name__ == "__main__":
    main()
