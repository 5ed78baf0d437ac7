"""Worker processes on this machine: started, and started again where one dies before the study is finished."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import IO

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.search.studies.plan import StudyPlan

__all__ = ["run_processes"]

#: So many workers in a row may fail before any trial is finished; then the study is given up.
DEATHS = 10


def run_processes(
    plan: StudyPlan, workers: int, *, heartbeat: float, patience: float, poll: float = 0.3
) -> Iterator[int]:
    """Keep worker processes at work until the study is finished; yield how many trials are, whenever that changes.

    Args:
        plan: The study.
        workers: How many processes.
        heartbeat: Seconds between two signs of life of each.
        patience: As of :class:`~dwindle.search.studies.work.Worker`.
        poll: Seconds between two looks at them.

    Raises:
        DwindleError: They die again and again; the message has what the last one said.
    """
    command = [sys.executable, "-m", "dwindle.search.studies", str(plan.storage.place), plan.name]
    command += [str(heartbeat), str(patience)]
    crew: list[_Process] = []
    before, deaths = -1, 0
    try:
        while True:
            done = _finished(plan)
            if done != before:
                before, deaths = done, 0
                yield done
            ended = [own for own in crew if own.ended()]
            crew = [own for own in crew if own not in ended]
            # One that was killed says nothing about the study; a trial that kills its workers is given up in time.
            deaths += sum((own.code or 0) > 0 for own in ended)
            if done >= plan.trials:
                break
            if deaths >= max(DEATHS, 3 * workers):
                raise DwindleError(
                    f"workers of the study {plan.name!r} die at once: {ended[-1].last_words()}"
                )
            refused = [own for own in ended if own.code == 2]
            if refused:
                raise ConfigError(refused[0].last_words())
            while len(crew) < min(workers, plan.trials - done):
                crew.append(_Process(command))
            time.sleep(poll)
        for own in crew:  # they see the end by themselves
            own.wait(10.0)
    finally:
        _stop(crew)


def _finished(plan: StudyPlan) -> int:
    return sum(trial.state.is_finished() for trial in plan.all_trials())


class _Process:
    """One worker process; what it says is kept for the case that it dies."""

    def __init__(self, command: Sequence[str]) -> None:
        self._words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._words, stderr=subprocess.STDOUT, env=environment
        )

    @property
    def code(self) -> int | None:
        """How it ended."""
        return self._process.returncode

    def ended(self) -> bool:
        """Whether it ended."""
        return self._process.poll() is not None

    def wait(self, seconds: float) -> None:
        """Give it time to end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def terminate(self) -> None:
        """Ask it to end."""
        self._process.terminate()

    def kill(self) -> None:
        """End it."""
        self._process.kill()

    def last_words(self) -> str:
        """The end of what it said."""
        self._words.seek(max(0, self._words.seek(0, os.SEEK_END) - 2000))
        text = self._words.read().decode(errors="replace").strip()
        return text.removeprefix("dwindle: ") or f"exit code {self.code}"


def _stop(crew: Sequence[_Process]) -> None:
    for own in crew:
        own.terminate()
    for own in crew:
        own.wait(5.0)
        if not own.ended():
            own.kill()
            own.wait(5.0)
