"""Shows how far a study is: trials done, and the best so far; silent without a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from dwindle.search.studies.plan import StudyPlan
from dwindle.search.studies.result import StudyResult

__all__ = ["shown"]


def shown(plan: StudyPlan, steps: Iterable[int], wanted: bool | None) -> Iterator[int]:
    """Yield the steps, with a bar that vanishes at the end.

    Args:
        plan: The study.
        steps: Something comes whenever a trial may be finished.
        wanted: Whether to draw it; None means only when the error output is a terminal.
    """
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield from steps
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[best]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(plan.name, total=plan.trials, best="")
        for step in steps:
            yield step
            bar.update(task, completed=_finished(plan), best=_best(plan))


def _finished(plan: StudyPlan) -> int:
    return sum(trial.state.is_finished() for trial in plan.all_trials())


def _best(plan: StudyPlan) -> str:
    """The best so far in a few words."""
    front = StudyResult.of(plan).front
    if not front:
        return ""
    if len(plan.objectives) > 1:
        return f"{len(front)} on the front"
    name = next(iter(plan.objectives))
    return f"best {name} {front[0].values[name]:.4g} (trial {front[0].number})"
