"""The subject of a search over recipes: a candidate is a whole recipe, assessed by running it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dwindle.config.errors import ConfigError
from dwindle.recipe.context import Event
from dwindle.recipe.data_source import load_data
from dwindle.recipe.directory import DirectoryBusy, RunDirectory, fingerprint
from dwindle.recipe.parsing import parse_recipe
from dwindle.recipe.runner import RunResult, run_recipe
from dwindle.recipe.schema import Recipe
from dwindle.recipe.schema.searching import METRICS
from dwindle.recipe.searching.costs import finished_stages, measure_costs
from dwindle.recipe.searching.reading import RecipeSearch, parse_search
from dwindle.search.studies import Assessment, Direction, Report

__all__ = ["RecipeSubject", "make_subject"]


def make_subject(text: str, source: str, directory: str) -> RecipeSubject:
    """Make the subject in any process.

    Args:
        text: The recipe with its ``search`` part.
        source: Name of its file, for messages.
        directory: Where trials are run.
    """
    return RecipeSubject(parse_search(text, source), Path(directory))


class RecipeSubject:
    """Candidates of a recipe.

    Args:
        search: The recipe.
        directory: Where trials are run, each in ``trials/NUMBER``.
    """

    def __init__(self, search: RecipeSearch, directory: Path) -> None:
        self.search, self.directory = search, directory

    @property
    def objectives(self) -> Mapping[str, Direction]:
        """Metrics are maximized, costs minimized."""
        names = self.search.part.objective
        return {name: "maximize" if name in METRICS else "minimize" for name in names}

    @property
    def costs(self) -> list[str]:
        """Every cost that is asked for: objectives, limits, and what is only written down."""
        part = self.search.part
        asked = [*part.objective, *(limit.cost for limit in self.search.limits), *part.measure]
        return [name for name in dict.fromkeys(asked) if name not in METRICS]

    def identity(self) -> Mapping[str, Any]:
        """What trials depend on: the recipe, what is searched, what is measured and how it is scored."""
        part = self.search.part
        said = part.model_dump(mode="json")
        names = ("budget", "drop", "measure", "timing", "space", "order", "evaluation", "validation")
        return {
            "recipe": fingerprint(self.search.space.base),
            **{name: said[name] for name in names},
        }

    def suggest(self, trial: Any) -> Mapping[str, Any]:
        """Draw a value for every open place."""
        values = self.search.space.suggest(trial)
        return {"values": values, "recipe": self.search.recipe(values)}

    def parameters(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters of a trial that begins with values by path."""
        return self.search.space.parameters(values)

    def assess(self, candidate: Mapping[str, Any], report: Report) -> Assessment:
        """Write the recipe of a trial, run it, and measure the last model."""
        folder = self.directory / "trials" / f"{report.number:04d}"
        recipe = write_recipe(candidate["recipe"], folder / "recipe.yaml")
        run = folder / "run"
        try:
            result = self._run(recipe, folder, run, report)
        except DirectoryBusy:
            # One that was taken for dead is not. It will learn so; its directory stays its own until then.
            run = folder / f"run-{os.getpid()}"
            result = self._run(recipe, folder, run, report)
        assessment = self.judge(recipe, result)
        shutil.copyfile(run / "summary.json", folder / "summary.json")
        if not self.search.part.keep_runs:
            shutil.rmtree(run)
        return assessment

    def _run(self, recipe: Recipe, folder: Path, run: Path, report: Report) -> RunResult:
        self._share(recipe, run)
        return run_recipe(folder / "recipe.yaml", run, listener=_Teller(recipe, run, report))

    def judge(self, recipe: Recipe, result: RunResult) -> Assessment:
        """Say how good a finished run is."""
        rows = result.summary.rows
        metric = self.search.part.metric or result.summary.metric
        scores = [row.score(metric) for row in (rows[0], rows[-1])]
        costs: dict[str, float] = {}
        whole: dict[str, float] = {}
        if self.costs:
            data = load_data(recipe.data)
            costs, whole = measure_costs(recipe, result.directory, data, self.costs, self.search.part.timing)
        before, after = (None if score is None else score.mean for score in scores)
        if metric == "agreement" and before is None:
            before = 1.0
        if after is None or before is None:
            raise ConfigError(f"the data have no labels: there is no {metric}; search for the 'agreement'")
        violations = {
            limit.cost: costs[limit.cost] / limit.allowed(whole[limit.cost]) - 1.0
            for limit in self.search.limits
        }
        if self.search.part.drop is not None:
            violations["drop"] = before - after - self.search.part.drop
        values = {name: after if name in METRICS else costs[name] for name in self.search.part.objective}
        return Assessment(
            values,
            {metric: after, **costs},
            violations,
            {
                "original": {metric: before, **whole},
                "shares": {name: costs[name] / whole[name] for name in costs},
            },
        )

    # stages that are the same in all trials

    def prepare(self) -> None:
        """Do the stages that all trials begin with, once."""
        count = self.search.space.shared_stages()
        data = self.search.recipe(self.search.space.first())
        if count and list(data["stages"])[:count]:
            folder = self.directory / "shared"
            write_recipe({**data, "stages": data["stages"][:count]}, folder / "recipe.yaml")
            run_recipe(folder / "recipe.yaml", folder / "run")

    def _share(self, recipe: Recipe, run: Path) -> None:
        """Put the shared stages into the run of a trial; where they are not at hand, the trial does them itself."""
        shared = self.directory / "shared" / "run"
        for seed in recipe.seeds:
            for stage in finished_stages(shared, seed):
                place = run / f"seed-{seed}" / stage["directory"].name
                if place.exists():
                    continue
                with RunDirectory(run).opened(recipe.name):
                    draft = place.with_name(f".{place.name}.{os.getpid()}.copy")
                    shutil.copytree(stage["directory"], draft, dirs_exist_ok=True)
                    with contextlib.suppress(FileExistsError):
                        draft.rename(place)


class _Teller:
    """Tells a study the metric after each stage that made a model."""

    def __init__(self, recipe: Recipe, run: Path, report: Report) -> None:
        self._recipe, self._run, self._report = recipe, run, report
        self._step = 0

    def __call__(self, event: Event) -> None:
        """Take an event of the run."""
        if event.kind not in ("finished", "skipped"):
            return
        records = [entry for entry in finished_stages(self._run, event.seed) if entry["label"] == event.label]
        evaluation = records[0]["result"].get("evaluation") if records else None
        if evaluation is None or event.label == "original":
            return
        value = evaluation["accuracy"] if evaluation["accuracy"] is not None else evaluation["agreement"]
        if value is not None:
            self._report(self._step, float(value))
            self._step += 1


def write_recipe(data: Mapping[str, Any], path: Path) -> Recipe:
    """Write a recipe, and return it checked."""
    text = yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True)
    recipe = parse_recipe(text, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    return recipe
