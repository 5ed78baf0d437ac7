"""Workers that are killed or frozen at any moment: no trial is lost, none is finished twice, the result is the same."""

from __future__ import annotations

import collections
import concurrent.futures
import json
import os
import random
import signal
import sqlite3
import sys
import time
import types
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from study_subjects import Hill

from dwindle.config.errors import DwindleError
from dwindle.search import StudyResult, SubjectMaker, load_study, run_study, work_on_study

pytest.importorskip("optuna")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked workers")

TRIALS, GENERATION = 10, 3


def place(kind: str, folder: Path) -> str:
    return str(folder / "study.db") if kind == "sqlite" else f"journal:{folder / 'study.log'}"


def core(result: StudyResult) -> list[Any]:
    return [
        (t.number, t.state, dict(t.parameters), dict(t.values), dict(t.violations)) for t in result.trials
    ]


def begin(where: str, log: Path, pause: float) -> Hill:
    """Make the study with its empty trials, and let one of them be done, as a first worker would."""
    subject = Hill(pause=pause, log=str(log))
    maker = SubjectMaker("study_subjects:hill", {"pause": pause, "log": str(log)})
    from dwindle.search.studies.plan import Thinking, open_plan
    from dwindle.search.studies.storage import open_storage

    thinking = Thinking(generation=GENERATION, sampler_options={"n_startup_trials": 4}, seed=5)
    opened = open_storage(where)
    open_plan(opened, "study", subject, maker, thinking, TRIALS, attempts=1000)
    if where.endswith(".db"):
        with closing(sqlite3.connect(where)) as base, base:
            base.execute("CREATE TABLE finished (trial INTEGER, before TEXT, after TEXT)")
            base.execute(
                "CREATE TRIGGER audit AFTER UPDATE OF state ON trials WHEN NEW.state NOT IN ('WAITING', 'RUNNING') "
                "BEGIN INSERT INTO finished VALUES (NEW.number, OLD.state, NEW.state); END"
            )
        opened.optuna.remove_session()
    return subject


def undisturbed(pause: float = 0.0) -> StudyResult:
    return run_study(
        Hill(pause), trials=TRIALS, generation=GENERATION, sampler_options={"n_startup_trials": 4}, seed=5
    )


def times_finished(where: str) -> dict[int, int]:
    """How often each trial was given a final state, by the storage's own books."""
    counts: collections.Counter[int] = collections.Counter()
    if where.endswith(".db"):
        with closing(sqlite3.connect(where)) as base:
            counts.update(number for (number,) in base.execute("SELECT trial FROM finished"))
        return dict(counts)
    for line in Path(where.removeprefix("journal:")).read_text().splitlines():
        entry = json.loads(line)
        if entry["op_code"] == 6 and entry["state"] in (1, 2, 3):  # a state is set: COMPLETE, PRUNED or FAIL
            counts[entry["trial_id"]] += 1
    return dict(counts)


def worker(where: str, **waits: float) -> int:
    """Fork a worker; return its process number."""
    child = os.fork()
    if child:
        return child
    try:
        work_on_study(where, "study", progress=False, **waits)  # type: ignore[arg-type]
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


@contextmanager
def ending(crew: list[int]) -> Iterator[None]:
    try:
        yield
    finally:
        for own in crew:
            os.kill(own, signal.SIGKILL)
            os.waitpid(own, 0)


def all_done(where: str) -> bool:
    return len(load_study(where, "study").trials) == TRIALS


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_killed_at_random_moments(kind: str, tmp_path: Path) -> None:
    where, log = place(kind, tmp_path), tmp_path / "log"
    begin(where, log, pause=0.02)
    chance = random.Random(kind)
    crew: list[int] = []
    kills = 0
    limit = time.monotonic() + 60
    with ending(crew):
        while not all_done(where):
            assert time.monotonic() < limit
            while len(crew) < 3:
                crew.append(worker(where, heartbeat=0.2, patience=30.0))
            time.sleep(chance.uniform(0.02, 0.25))
            victim = crew.pop(chance.randrange(3))
            ended, code = os.waitpid(victim, os.WNOHANG)
            if ended:
                assert code == 0  # it found nothing left to do
                continue
            os.kill(victim, signal.SIGKILL)
            os.waitpid(victim, 0)
            kills += 1
    assert kills >= 3
    assert core(load_study(where, "study")) == core(undisturbed())
    assert times_finished(where) == dict.fromkeys(range(TRIALS), 1)
    lines = log.read_text().splitlines()
    begun = collections.Counter(line.split()[2] for line in lines if " begin " in line)
    assert len(begun) == TRIALS  # what was begun anew had the same parameters


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_a_frozen_worker_loses_its_trial_and_comes_too_late(kind: str, tmp_path: Path) -> None:
    where, log = place(kind, tmp_path), tmp_path / "log"
    begin(where, log, pause=0.1)
    # It shall be frozen while it computes: with the lock of a file in its hand it would stop everyone.
    crew = [worker(where, heartbeat=5.0, patience=5.0)]
    with ending(crew):
        while not log.exists() or " begin " not in log.read_text():
            time.sleep(0.005)
        os.kill(crew[0], signal.SIGSTOP)
        crew.append(worker(where, heartbeat=0.1, patience=0.7))
        limit = time.monotonic() + 30
        while log.read_text().count(" begin ") < 3:
            assert time.monotonic() < limit
            time.sleep(0.02)
        os.kill(crew[0], signal.SIGCONT)
        while not all_done(where):
            time.sleep(0.05)
        for own in crew:
            assert os.waitpid(own, 0)[1] == 0
        crew.clear()
    assert core(load_study(where, "study")) == core(undisturbed())
    assert times_finished(where) == dict.fromkeys(range(TRIALS), 1)


def test_processes_of_a_study(tmp_path: Path) -> None:
    result = run_study(
        SubjectMaker("study_subjects:hill"),
        trials=TRIALS,
        generation=GENERATION,
        sampler_options={"n_startup_trials": 4},
        seed=5,
        storage=tmp_path / "study.db",
        workers=2,
    )
    assert core(result) == core(undisturbed())


def test_ray_starts_workers_that_the_leases_tell_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray's interface, as much of it as is used, with threads for its workers.
    class Tasks(types.ModuleType):
        begun = ended = 0
        pool = concurrent.futures.ThreadPoolExecutor(3)

        def is_initialized(self) -> bool:
            return False

        def init(self, **options: Any) -> None:
            self.begun += 1

        def shutdown(self) -> None:
            self.ended += 1

        def remote(self, **options: Any) -> Any:
            assert options == {"num_cpus": 1, "max_retries": -1}
            return lambda work: types.SimpleNamespace(remote=lambda *given: self.pool.submit(work, *given))

        def wait(self, tasks: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
            done, left = concurrent.futures.wait(tasks, timeout, return_when="FIRST_COMPLETED")
            return list(done), list(left)

        def get(self, task: Any) -> Any:
            return task.result()

    tasks = Tasks("ray")
    monkeypatch.setitem(sys.modules, "ray", tasks)
    result = run_study(
        SubjectMaker("study_subjects:hill", {"pause": 0.01}),
        trials=TRIALS,
        generation=GENERATION,
        sampler_options={"n_startup_trials": 4},
        seed=5,
        storage=place("journal", tmp_path),
        workers=3,
        launcher="ray",
    )
    assert core(result) == core(undisturbed())
    assert times_finished(place("journal", tmp_path)) == dict.fromkeys(range(TRIALS), 1)
    assert (tasks.begun, tasks.ended) == (1, 1)


def test_a_subject_that_nobody_survives_is_given_up(tmp_path: Path) -> None:
    where, log = place("journal", tmp_path), tmp_path / "log"
    subject = begin(where, log, pause=0.0)
    from dwindle.search.studies.plan import Thinking, open_plan
    from dwindle.search.studies.storage import open_storage

    maker = SubjectMaker("study_subjects:deadly", {"log": str(log)})
    thinking = Thinking(generation=GENERATION, sampler_options={"n_startup_trials": 4}, seed=5)
    open_plan(open_storage(where), "study", subject, maker, thinking, TRIALS, attempts=2)
    ends = []
    for _ in range(TRIALS * 2 + 1):
        child = worker(where, heartbeat=5.0, patience=60.0)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert set(ends[:-1]) == {9}
    assert ends[-1] == 0
    result = load_study(where, "study")
    assert {trial.error for trial in result.trials} == {"given up: 2 workers ended while they worked on it"}
    with pytest.raises(DwindleError, match="none of 10 trials was completed"):
        _ = result.best
