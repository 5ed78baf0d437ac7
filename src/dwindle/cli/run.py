"""``dwindle run``: the whole job of a recipe, resumable, with a report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from dwindle.cli.inspect import JsonOption
from dwindle.cli.output import console, messages, print_json, working
from dwindle.config.errors import ConfigError
from dwindle.recipe import Event, RunResult, run_recipe
from dwindle.report import Figure, Row, RunSummary
from dwindle.report.wording import bytes_text, count_text, milliseconds_text, percent_text

__all__ = ["run_command"]


def run_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe file (YAML).")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory of the run. Default: runs/NAME.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew, even where a stage is finished.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an earlier run stood (the default).")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Run a recipe: train, prune, fine-tune, quantize, export, measure, report.

    A run that was killed goes on after its last finished stage, and gives the same result.
    """
    if fresh and resume:
        raise ConfigError("--fresh and --resume exclude each other")
    # The progress bar takes its place on the error output before that of the results is turned aside.
    with _Bars() as bars, working():
        result = run_recipe(recipe, output, fresh=fresh, listener=bars)
    if json:
        print_json(
            {
                "directory": str(result.directory),
                "report": None if result.report is None else str(result.report),
                "table": result.summary.table(),
                "summary": result.summary.to_json(),
            }
        )
        return
    _print(result)


class _Bars:
    """Shows events of a run: one bar for all stages, one for the stage in hand; silent without a terminal."""

    def __init__(self) -> None:
        self.shown = sys.stderr.isatty()
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
        )
        self.progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self.whole: TaskID | None = None
        self.part: TaskID | None = None

    def __enter__(self) -> _Bars:
        if self.shown:
            self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.shown:
            self.progress.stop()

    def __call__(self, event: Event) -> None:
        """Take an event."""
        if not self.shown:
            return
        if event.kind == "run":
            self.whole = self.progress.add_task("all stages", total=event.total, text="")
        elif event.kind == "started":
            self._forget_part()
            self.part = self.progress.add_task(self._name(event), total=None, text="")
        elif event.kind == "advanced" and self.part is not None:
            self.progress.update(self.part, completed=event.done, total=event.total, text=event.text)
        elif event.kind in ("finished", "skipped"):
            self._forget_part()
            if self.whole is not None:
                self.progress.advance(self.whole)
            mark = "[green]done[/]" if event.kind == "finished" else "[dim]kept[/]"
            self.progress.console.print(f"{mark}  {self._name(event):<24} {event.text}", highlight=False)

    def _forget_part(self) -> None:
        if self.part is not None:
            self.progress.remove_task(self.part)
            self.part = None

    @staticmethod
    def _name(event: Event) -> str:
        return f"{event.label} (seed {event.seed})"


def _print(result: RunResult) -> None:
    console().print(summary_table(result.summary))
    for line in _places(result):
        messages().print(line)


def summary_table(summary: RunSummary) -> Table:
    """Make the final table for the terminal: a row a figure, a column a model."""
    several = len(summary.seeds) > 1
    caption = f"mean of {len(summary.seeds)} seeds" if several else None
    table = Table(title=summary.title, caption=caption)
    table.add_column("", no_wrap=True)
    for row in summary.rows:
        table.add_column(row.title, justify="right")

    def add(name: str, values: list[str]) -> None:
        if any(value != "-" for value in values):
            table.add_row(name, *values)

    rows = summary.rows
    add("parameters", [_cell(row.parameters, rows[0].parameters, count_text) for row in rows])
    add("MACs a sample", [_cell(row.macs, rows[0].macs, count_text) for row in rows])
    add("file", [_cell(row.bytes, rows[0].bytes, bytes_text) for row in rows])
    add(summary.metric, [_plain(row.score(summary.metric), percent_text) for row in rows])
    if several:
        for index, seed in enumerate(summary.seeds):
            scores = [row.score(summary.metric) for row in rows]
            add(f"  seed {seed.seed}", ["-" if s is None else percent_text(s.values[index]) for s in scores])
    for name in dict.fromkeys(name for row in rows for name in row.runtimes):
        add(f"{name} p50", [_latency(row, name) for row in rows])
    for name in dict.fromkeys(name for row in rows for name in row.runtimes):
        parities = [row.runtimes[name].parity if name in row.runtimes else None for row in rows]
        add(f"{name} parity", [_plain(parity, percent_text) for parity in parities])
    return table


def _cell(figure: Figure | None, first: Figure | None, show: object) -> str:
    if figure is None:
        return "-"
    text = show(figure.mean)  # type: ignore[operator]
    if first is None or figure is first or not first.mean:
        return text
    return f"{text} ({figure.mean / first.mean:.1%})"


def _plain(figure: Figure | None, show: object) -> str:
    return "-" if figure is None else show(figure.mean)  # type: ignore[operator]


def _latency(row: Row, name: str) -> str:
    figures = row.runtimes.get(name)
    if figures is None:
        return "-"
    if figures.failure is not None:
        return "fails"
    if figures.simulated:
        return "simulated"
    return "-" if figures.p50 is None else milliseconds_text(figures.p50.mean)


def _places(result: RunResult) -> list[str]:
    lines = [f"run      {result.directory}"]
    if result.report is not None:
        lines.append(f"report   {result.report}")
    return lines
