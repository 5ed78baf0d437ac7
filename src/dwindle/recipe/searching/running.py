"""Searches a recipe: the trials, the best one run again on the test data, the page."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dwindle.config.errors import ConfigError
from dwindle.recipe.directory import write_json
from dwindle.recipe.runner import RunResult, run_recipe
from dwindle.recipe.searching.reading import load_search
from dwindle.recipe.searching.subject import RecipeSubject, write_recipe
from dwindle.report import write_study_page
from dwindle.search.studies import Assessment, StudyResult, SubjectMaker, run_study

__all__ = ["SearchOutcome", "search_recipe"]


@dataclass(frozen=True)
class SearchOutcome:
    """What a search left.

    Attributes:
        directory: Its directory: ``trials/NUMBER/recipe.yaml``, ``best``, the page.
        study: All trials.
        best: The run of the best trial's recipe on the test data, in ``best/run``; None with several objectives.
        tested: What that run came to.
        page: The HTML page.
    """

    directory: Path
    study: StudyResult
    best: RunResult | None
    tested: Assessment | None
    page: Path

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        tested = self.tested
        return {
            "directory": str(self.directory),
            "page": str(self.page),
            "study": self.study.to_json(),
            "best": None
            if self.best is None or tested is None
            else {
                "trial": self.study.best.number,
                "recipe": str(self.directory / "best" / "recipe.yaml"),
                "run": str(self.best.directory),
                "costs": dict(tested.costs),
                "violations": dict(tested.violations),
                **dict(tested.attributes),
            },
        }


def search_recipe(
    recipe: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    trials: int | None = None,
    workers: int | None = None,
    storage: str | None = None,
    heartbeat: float = 10.0,
    progress: bool | None = None,
) -> SearchOutcome:
    """Search the open places of a recipe; the same call again goes on where a killed one stood.

    Every trial is a recipe of its own, ``trials/NUMBER/recipe.yaml``, that ``dwindle run`` runs with the same result.

    Args:
        recipe: A YAML file with a ``search`` part.
        output: The directory of the search. Default: ``searches/`` and the recipe's name.
        trials: How many, in place of what the recipe says.
        workers: Processes, in place of what the recipe says.
        storage: Where trials are kept, in place of what the recipe says.
        heartbeat: Seconds between two signs of life of a worker.
        progress: Show a bar; None means only when the error output is a terminal.

    Raises:
        ConfigError: The recipe is not valid, or the storage holds a search for something else.
        DwindleError: No trial was completed, or none meets the budget.
    """
    search = load_search(recipe)
    part, name = search.part, search.example.name
    directory = Path(output) if output is not None else Path("searches") / name
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{str(directory)!r} is a file; a search needs a directory")
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    subject = RecipeSubject(search, directory)
    enqueue = [subject.parameters(values) for values in part.enqueue]
    subject.prepare()
    study = run_study(
        SubjectMaker(
            "dwindle.recipe.searching:make_subject",
            {"text": search.text, "source": search.source, "directory": str(directory)},
        ),
        trials=trials if trials is not None else part.wanted,
        name=name,
        storage=storage or part.storage or directory / "study.db",
        sampler=part.chosen_sampler,
        sampler_options=part.sampler_options,
        pruner=part.pruner,
        pruner_options=part.pruner_options,
        seed=part.seed,
        generation=part.generation,
        enqueue=enqueue,
        workers=workers if workers is not None else part.workers,
        heartbeat=heartbeat,
        progress=progress,
    )
    write_json(directory / "study.json", study.to_json())
    page = directory / "search.html"
    write_study_page(study.to_json(), page, title=search.example.title)
    if len(study.objectives) > 1:
        return SearchOutcome(directory, study, None, None, page)
    values = _values(study.best.candidate)
    best = directory / "best"
    checked = write_recipe(search.recipe(values, tested=True), best / "recipe.yaml")
    result = run_recipe(best / "recipe.yaml", best / "run")
    tested = subject.judge(checked, result)
    outcome = SearchOutcome(directory, study, result, tested, page)
    write_json(directory / "best.json", outcome.to_json()["best"])
    return outcome


def _values(candidate: Mapping[str, Any] | None) -> Mapping[str, Any]:
    assert candidate is not None
    found: Mapping[str, Any] = candidate["values"]
    return found
