"""Does what a recipe says, stage by stage and seed by seed; a run that was killed goes on where it stood."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dwindle
from dwindle.config.errors import ConfigError
from dwindle.recipe.context import Event, Listener, StageContext
from dwindle.recipe.data_source import Data, load_data
from dwindle.recipe.directory import RunDirectory, StageDirectory, fingerprint, write_json
from dwindle.recipe.gathering import gather
from dwindle.recipe.parsing import load_recipe
from dwindle.recipe.schema import OriginalStage, Recipe, ReportStage, Stage
from dwindle.recipe.stages import RUNNERS, run_original
from dwindle.recipe.variant import Variant, load_predictions
from dwindle.report import RunSummary, write_page

__all__ = ["RunResult", "run_recipe"]


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Attributes:
        directory: Its directory.
        summary: The figures of all stages and seeds.
        report: The HTML page, when the recipe has a report.
    """

    directory: Path
    summary: RunSummary
    report: Path | None


def run_recipe(
    recipe: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    fresh: bool = False,
    listener: Listener | None = None,
) -> RunResult:
    """Run a recipe; stages that an earlier run finished for the same recipe are not done again.

    Args:
        recipe: A YAML file.
        output: The directory of the run. Default: ``runs/`` and the recipe's name.
        fresh: Begin anew: what an earlier run left in the directory is removed first.
        listener: Told of everything that happens.

    Raises:
        ConfigError: The recipe is not valid, or the directory belongs to another one.
        DwindleError: A stage failed; those before it stay finished.
    """
    checked, text = load_recipe(recipe)
    directory = RunDirectory(Path(output) if output is not None else Path("runs") / checked.name)
    tell = listener or (lambda event: None)
    with directory.opened(checked.name, fresh=fresh), _repeatable(checked.threads):
        return _Run(checked, text, directory, tell).all()


class _Run:
    """One run of a recipe."""

    def __init__(self, recipe: Recipe, text: str, directory: RunDirectory, tell: Listener):
        self.recipe, self.text, self.directory, self.tell = recipe, text, directory, tell
        self.stages = _with_original([stage for stage in recipe.stages if stage.kind != "report"])
        self._data: Data | None = None

    @property
    def data(self) -> Data:
        """The data, read when the first unfinished stage asks for them."""
        if self._data is None:
            self._data = load_data(self.recipe.data)
        return self._data

    def all(self) -> RunResult:
        """Run every stage for every seed, then write the summary and the page."""
        self.tell(Event("run", total=len(self.stages) * len(self.recipe.seeds)))
        chains: dict[int, list[dict[str, Any]]] = {}
        places: set[Path] = set()
        for seed in self.recipe.seeds:
            chains[seed] = self.chain(seed, places)
        self.directory.remove_other_than(places)
        summary = gather(self.recipe, self.text, chains)
        write_json(self.directory.path / "summary.json", summary.to_json())
        report = self.recipe.stages[-1] if self.recipe.stages else None
        page = None
        if isinstance(report, ReportStage):
            page = self.directory.path / report.file
            write_page(summary, page, title=report.title)
        return RunResult(self.directory.path, summary, page)

    def chain(self, seed: int, places: set[Path]) -> list[dict[str, Any]]:
        """Run the stages of one seed; return their records."""
        key = fingerprint(*_root(self.recipe), seed)
        variants: list[Variant] = []
        records: list[dict[str, Any]] = []
        for position, stage in enumerate(self.stages):
            key = fingerprint(key, stage.kind, stage.model_dump(mode="json"))
            place = self.directory.stage(seed, position, stage.label, key)
            places.add(place.path)
            record = place.record()
            if record is None:
                record = self.stage(seed, stage, place, variants, records)
            else:
                self.tell(Event("skipped", seed, stage.label, headline(record)))
            if stage.makes_model:
                variants.append(Variant(stage.label, stage.kind, place.path))
            records.append(record)
        return records

    def stage(
        self,
        seed: int,
        stage: Stage,
        place: StageDirectory,
        variants: list[Variant],
        records: list[dict[str, Any]],
    ) -> dict[str, Any]:
        """Do one stage and finish its directory."""
        self.tell(Event("started", seed, stage.label))
        original = original_of(variants)
        # Training stages that lead to the original have nothing to be compared with yet.
        leads = stage.kind in ("train", "original") and original is not None and original is variants[-1]
        begin = time.perf_counter()
        context = StageContext(
            recipe=self.recipe,
            stage=stage,
            seed=seed,
            directory=place.begin(),
            data=self.data,
            original=original,
            variants=list(variants),
            original_predictions=load_predictions(original) if original is not None and not leads else None,
            records=list(records),
            tell=self.tell,
        )
        if stage.makes_model and stage.kind not in ("train", "original") and not variants:
            raise ConfigError(f"stage {stage.label!r}: there is no model yet")
        work = run_original if isinstance(stage, OriginalStage) else RUNNERS[stage.kind]
        result = work(context)
        record = place.finish(
            {
                "kind": stage.kind,
                "label": stage.label,
                "seed": seed,
                "settings": stage.model_dump(mode="json"),
                "seconds": round(time.perf_counter() - begin, 3),
                "result": result,
            }
        )
        self.tell(Event("finished", seed, stage.label, headline(record)))
        return record


def original_of(variants: list[Variant]) -> Variant | None:
    """The model before any compression: the last of the leading stages that only load or train."""
    found = None
    for variant in variants:
        if variant.kind not in ("train", "original"):
            break
        found = variant
    return found


def headline(record: dict[str, Any]) -> str:
    """Say in a few words what a stage gave."""
    result = record["result"]
    evaluation = result.get("evaluation")
    if evaluation is not None:
        if evaluation["accuracy"] is not None:
            return f"accuracy {evaluation['accuracy']:.2%}"
        return "" if evaluation["agreement"] is None else f"agreement {evaluation['agreement']:.2%}"
    if record["kind"] == "export":
        return ", ".join(f"{entry['path']} {entry['bytes'] / 1e3:,.1f} kB" for entry in result["files"])
    if record["kind"] == "measure":
        return f"{len(result['models'])} models"
    return ""


def _with_original(stages: list[Stage]) -> list[Stage]:
    return stages if stages and stages[0].kind == "train" else [OriginalStage(), *stages]


def _root(recipe: Recipe) -> tuple[Any, ...]:
    """Everything that all stages depend on."""
    return (
        "dwindle-stage-1",
        dwindle.__version__,
        torch.__version__,
        recipe.threads,
        recipe.model.model_dump(mode="json"),
        recipe.data.model_dump(mode="json"),
    )


@contextlib.contextmanager
def _repeatable(threads: int | None) -> Iterator[None]:
    """Let torch choose deterministic algorithms and, where asked, a fixed number of threads."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    count = torch.get_num_threads()
    torch.use_deterministic_algorithms(True, warn_only=True)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.set_num_threads(count)
