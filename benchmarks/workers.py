"""Kills the workers of a search at random moments, and compares its trials with those of an undisturbed search.

python benchmarks/workers.py recipes/digits_search.yaml --workers 3 --storage sqlite journal
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
START = "import sys; from dwindle.cli import main; sys.argv[0] = 'dwindle'; main()"


def start(
    recipe: Path, output: Path, storage: str, workers: int, trials: int | None
) -> subprocess.Popen[bytes]:
    """Start ``dwindle search`` in a process of its own."""
    command = [sys.executable, "-c", START, "search", str(recipe), "--output", str(output), "--json"]
    command += ["--workers", str(workers), "--storage", storage]
    if trials is not None:
        command += ["--trials", str(trials)]
    with (output.parent / f"{output.name}.log").open("ab") as log:
        return subprocess.Popen(
            command, stdout=(output.parent / f"{output.name}.json").open("wb"), stderr=log
        )


def record_of(output: Path, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """What a search that came to its end printed."""
    if process.wait() != 0:
        raise RuntimeError((output.parent / f"{output.name}.log").read_text()[-2000:])
    return json.loads((output.parent / f"{output.name}.json").read_text())


def children(process: int) -> list[int]:
    """The worker processes of a search."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                if int(parent) == process and b"dwindle.search.studies" in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def audited(storage: str) -> None:
    """Let an SQLite file write down every final state that a trial is given."""
    with contextlib.closing(sqlite3.connect(storage, timeout=60)) as base, base:
        base.execute("CREATE TABLE IF NOT EXISTS finished (trial INTEGER)")
        base.execute(
            "CREATE TRIGGER IF NOT EXISTS audit AFTER UPDATE OF state ON trials "
            "WHEN NEW.state NOT IN ('WAITING', 'RUNNING') BEGIN INSERT INTO finished VALUES (NEW.number); END"
        )


def times_finished(storage: str) -> Counter[int]:
    """How often each trial was given a final state, by the storage's own books."""
    if not storage.startswith("journal:"):
        with contextlib.closing(sqlite3.connect(storage)) as base:
            return Counter(number for (number,) in base.execute("SELECT trial FROM finished"))
    lines = map(json.loads, Path(storage.removeprefix("journal:")).read_text().splitlines())
    return Counter(
        entry["trial_id"] for entry in lines if entry["op_code"] == 6 and entry["state"] in (1, 2, 3)
    )


def disturb(process: subprocess.Popen[bytes], moments: random.Random, pause: tuple[float, float]) -> int:
    """Kill one worker after another until the search ends; return how many."""
    kills = 0
    while process.poll() is None:
        time.sleep(moments.uniform(*pause))
        alive = children(process.pid)
        if alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(moments.choice(alive), signal.SIGKILL)
                kills += 1
    return kills


def core(record: dict[str, Any]) -> list[Any]:
    """What must be the same: everything but times."""
    return [
        [
            trial[key]
            for key in ("number", "state", "parameters", "candidate", "values", "costs", "violations")
        ]
        for trial in record["study"]["trials"]
    ]


def killed(
    recipe: Path, folder: Path, kind: str, options: argparse.Namespace, half: int
) -> tuple[dict[str, Any], Counter[int], int, float]:
    """Search with workers that are killed; what came out, the books of the storage, the kills, the seconds."""
    broken, moments = folder / f"killed-{kind}", random.Random(options.seed)
    storage = str(folder / "killed.db") if kind == "sqlite" else f"journal:{folder / 'killed.journal'}"
    if kind == "sqlite":
        from dwindle.search.studies.storage import open_storage

        open_storage(storage).optuna.remove_session()
        audited(storage)
    begin = time.perf_counter()
    process = start(recipe, broken, storage, options.workers, options.trials)
    # The search itself is killed, too, with all its workers, when about half of it is done.
    kills = 0
    while len(list((broken / "trials").glob("*/summary.json"))) < half:
        if process.poll() is not None:
            raise RuntimeError((folder / f"{broken.name}.log").read_text()[-2000:])
        time.sleep(moments.uniform(*options.pause))
        for own in moments.sample(alive := children(process.pid), min(1, len(alive))):
            os.kill(own, signal.SIGKILL)
            kills += 1
    for own in [process.pid, *children(process.pid)]:
        os.kill(own, signal.SIGKILL)
        kills += 1
    process.wait()
    process = start(recipe, broken, storage, options.workers, options.trials)
    kills += disturb(process, moments, options.pause)
    record = record_of(broken, process)
    return record, times_finished(storage), kills, time.perf_counter() - begin


def main() -> None:
    """Compare an undisturbed search with ones whose workers are killed, and that are killed themselves once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--trials", type=int)
    parser.add_argument("--storage", nargs="+", choices=["sqlite", "journal"], default=["sqlite", "journal"])
    parser.add_argument("--pause", type=float, nargs=2, default=(5.0, 20.0), help="seconds between two kills")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sound = True
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        begin = time.perf_counter()
        whole = folder / "undisturbed"
        process = start(options.recipe, whole, str(folder / "undisturbed.db"), 1, options.trials)
        undisturbed = record_of(whole, process)
        seconds = time.perf_counter() - begin
        best = undisturbed["best"]["trial"]
        print(
            f"undisturbed, 1 worker: {seconds:.0f} s, {len(core(undisturbed))} trials, best {best}",
            flush=True,
        )
        for kind in options.storage:
            record, counts, kills, took = killed(
                options.recipe, folder, kind, options, len(core(undisturbed)) // 2
            )
            result = {
                "recipe": options.recipe.name,
                "storage": kind,
                "workers": options.workers,
                "trials": len(core(record)),
                "kills": kills,
                "seconds undisturbed, 1 worker": round(seconds, 1),
                "seconds killed": round(took, 1),
                "finished more than once": sum(count > 1 for count in counts.values()),
                "never finished": len(core(undisturbed)) - len(counts),
                "same trials": core(record) == core(undisturbed),
                "same best": record["best"]["trial"] == best,
                "best": undisturbed["study"]["trials"][best]["values"],
                "best on the test data": undisturbed["best"]["costs"],
                "same on the test data": record["best"]["costs"] == undisturbed["best"]["costs"],
            }
            print(json.dumps(result, indent=2), flush=True)
            with (RESULTS / "workers.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(result) + "\n")
            same = result["same trials"] and result["same best"] and result["same on the test data"]
            sound &= bool(same) and not result["finished more than once"] and not result["never finished"]
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
