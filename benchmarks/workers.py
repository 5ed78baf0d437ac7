"""Kills the workers of a search at random moments, and compares its trials with those of an undisturbed search.

python benchmarks/workers.py benchmarks/workers.yaml --workers 3 --storage sqlite journal

Workers are forked from this process, so that a new one is at work at once; one of them is the search itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def forked(work: Callable[[], Any], log: Path) -> int:
    """Do some work in a process of its own; return its number."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        with log.open("a", encoding="utf-8") as stream:
            traceback.print_exc(file=stream)
        os._exit(1)


def search(recipe: Path, output: Path, storage: str, trials: int | None) -> None:
    """Search to the end, or go on where an earlier search stood; leave what was found in ``found.json``."""
    from dwindle.recipe.searching import search_recipe

    found = search_recipe(recipe, output, storage=storage, trials=trials, workers=1, progress=False)
    (output / "found.json").write_text(json.dumps(found.to_json()), encoding="utf-8")


def found_in(output: Path) -> dict[str, Any]:
    """What a search that came to its end found."""
    return json.loads((output / "found.json").read_text(encoding="utf-8"))


def audited(storage: str) -> None:
    """Let an SQLite file write down every final state that a trial is given."""
    from dwindle.search.studies.storage import open_storage

    open_storage(storage).optuna.remove_session()
    with contextlib.closing(sqlite3.connect(storage, timeout=60)) as base, base:
        base.execute("CREATE TABLE finished (trial INTEGER)")
        base.execute(
            "CREATE TRIGGER audit AFTER UPDATE OF state ON trials "
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


def killed(recipe: Path, output: Path, storage: str, options: argparse.Namespace, pace: float) -> int:
    """Search with workers that are killed one after another, every few ``pace`` seconds; return how many were."""
    from dwindle.search.studies import work_on_study

    moments, log = random.Random(options.seed), output.parent / f"{output.name}.log"
    name = recipe_name(recipe)

    def leader() -> None:
        search(recipe, output, storage, options.trials)

    def worker() -> None:
        work_on_study(storage, name, progress=False)

    def fail(code: int) -> None:
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(log.read_text()[-2000:])

    crew: dict[int, Callable[[], None]] = {}
    kills = 0
    while not (output / "found.json").exists():
        for own in list(crew):
            ended, status = os.waitpid(own, os.WNOHANG)
            if ended:
                del crew[own]
                fail(os.waitstatus_to_exitcode(status))
        if leader not in crew.values():
            crew[forked(leader, log)] = leader
        begun = any((output / "trials").glob("*")) if (output / "trials").is_dir() else False
        while begun and len(crew) < options.workers:
            crew[forked(worker, log)] = worker
        time.sleep(pace * moments.uniform(*options.pause) if begun else 0.2)
        victim = moments.choice(list(crew))
        ended, status = os.waitpid(victim, os.WNOHANG)
        if not ended and begun:
            os.kill(victim, signal.SIGKILL)
            ended, status = os.waitpid(victim, 0)
            kills += os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        if ended:
            del crew[victim]
            fail(os.waitstatus_to_exitcode(status))
    for own in crew:
        with contextlib.suppress(ProcessLookupError):
            os.kill(own, signal.SIGKILL)
        os.waitpid(own, 0)
    return kills


def recipe_name(recipe: Path) -> str:
    """The name of the study."""
    from dwindle.recipe.searching import load_search

    return load_search(recipe).example.name


def preload(recipe: Path) -> None:
    """Import, before any worker is forked, what workers need: they are at work at once then."""
    from dwindle.recipe.data_source import load_data
    from dwindle.recipe.model_source import load_model
    from dwindle.recipe.searching import load_search

    example = load_search(recipe).example
    load_data(example.data)
    load_model(example.model.name, example.model.arguments)
    from dwindle.search.studies import plan, work  # noqa: F401


def core(record: dict[str, Any]) -> list[Any]:
    """What must be the same: everything but times."""
    return [
        [
            trial[key]
            for key in ("number", "state", "parameters", "candidate", "values", "costs", "violations")
        ]
        for trial in record["study"]["trials"]
    ]


def main() -> None:
    """Compare an undisturbed search with ones whose workers are killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--trials", type=int)
    parser.add_argument("--storage", nargs="+", choices=["sqlite", "journal"], default=["sqlite", "journal"])
    parser.add_argument(
        "--pause", type=float, nargs=2, default=(0.2, 3.0), help="between two kills, in trials"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--undisturbed", type=Path, help="keeps what the undisturbed search found, or has it")
    options = parser.parse_args()
    preload(options.recipe)
    sound = True
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        begin = time.perf_counter()
        log = folder / "undisturbed.log"
        whole, place = folder / "undisturbed", str(folder / "undisturbed.db")
        kept = options.undisturbed
        if kept is None or not kept.exists():
            child = forked(lambda: search(options.recipe, whole, place, options.trials), log)
            if os.waitpid(child, 0)[1]:
                raise RuntimeError(log.read_text())
            record = {**found_in(whole), "seconds": time.perf_counter() - begin}
            if kept is not None:
                kept.write_text(json.dumps(record), encoding="utf-8")
        undisturbed = record if kept is None else json.loads(kept.read_text(encoding="utf-8"))
        seconds, best = undisturbed["seconds"], undisturbed["best"]["trial"]
        print(
            f"undisturbed, 1 worker: {seconds:.0f} s, {len(core(undisturbed))} trials, best {best}",
            flush=True,
        )
        for kind in options.storage:
            storage = (
                str(folder / "killed.db") if kind == "sqlite" else f"journal:{folder / 'killed.journal'}"
            )
            if kind == "sqlite":
                audited(storage)
            output, begin = folder / f"killed-{kind}", time.perf_counter()
            kills = killed(options.recipe, output, storage, options, seconds / len(core(undisturbed)))
            record, counts = found_in(output), times_finished(storage)
            result = {
                "recipe": options.recipe.name,
                "storage": kind,
                "workers": options.workers,
                "trials": len(core(record)),
                "kills": kills,
                "seconds undisturbed, 1 worker": round(seconds, 1),
                "seconds killed": round(time.perf_counter() - begin, 1),
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
