"""``dwindle search`` and ``dwindle worker``: trials of a recipe under a budget, on this machine and on others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dwindle.cli.inspect import JsonOption
from dwindle.cli.output import messages, print_json, working

__all__ = ["search_command", "worker_command"]

HeartbeatOption = Annotated[float, typer.Option(help="Seconds between two signs of life of a worker.")]


def search_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe file (YAML) with a 'search' part.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory of the search. Default: searches/NAME.")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="In place of what the recipe says.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes, in place of what the recipe says.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="SQLite file, journal:PATH or database URL. Default: study.db there.")
    ] = None,
    heartbeat: HeartbeatOption = 10.0,
    json: JsonOption = False,
) -> None:
    """Search a recipe: trials under a budget, each a recipe of its own, then the best one on the test data.

    A search that was killed goes on where it stood. Other machines may help: dwindle worker.
    """
    from dwindle.recipe.searching import search_recipe

    with working():
        found = search_recipe(
            recipe, output, trials=trials, workers=workers, storage=storage, heartbeat=heartbeat
        )
    if json:
        print_json(found.to_json())
        return
    print(found.study.summary())
    if found.tested is not None:
        figures = {**found.tested.values, **found.tested.costs}
        print("  on the test data: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        messages().print(f"best     {found.directory / 'best' / 'recipe.yaml'}")
    messages().print(f"trials   {found.directory / 'trials'}", f"\npage     {found.page}")


def worker_command(
    storage: Annotated[str, typer.Option(help="SQLite file, journal:PATH or database URL of the search.")],
    study: Annotated[str, typer.Option(help="Name of the study: the recipe's name.")],
    trials: Annotated[int | None, typer.Option(help="Leave after so many trials.")] = None,
    directory: Annotated[
        Path | None, typer.Option(help="Where trials are run here. Default: the directory of the search.")
    ] = None,
    heartbeat: HeartbeatOption = 10.0,
    patience: Annotated[
        float | None,
        typer.Option(help="A silent worker is taken for dead after so many seconds. Default: 6 heartbeats."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Work on a search that another process began, until its trials are finished.

    The storage names the code that makes the candidates: only join one whose writers you trust.
    """
    from dwindle.search.studies import work_on_study

    changed = {} if directory is None else {"directory": str(directory.absolute())}
    with working():
        done = work_on_study(
            storage, study, changed=changed, limit=trials, heartbeat=heartbeat, patience=patience
        )
    if json:
        print_json({"study": study, "finished": done})
        return
    print(f"{done} trials finished here")
