"""Reads a recipe file: YAML in, a checked :class:`~dwindle.recipe.schema.Recipe` out, or an error that points.

Every message names the file, the line, the path of the key inside the file and, where there is one, the
nearest valid choice.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.recipe.compression.reading import read_algorithms
from dwindle.recipe.reader import Location, Reader, read_text
from dwindle.recipe.schema import STAGES, FinetuneStage, Recipe, Stage

__all__ = ["check_recipe", "load_recipe", "parse_recipe"]


def load_recipe(path: str | os.PathLike[str]) -> tuple[Recipe, str]:
    """Read and check a recipe file.

    Returns:
        The recipe, and the text of the file.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or says something a recipe cannot say.
    """
    text = read_text(path)
    return parse_recipe(text, str(path)), text


def parse_recipe(text: str, source: str = "recipe") -> Recipe:
    """Check the text of a recipe.

    Args:
        text: YAML.
        source: Name of the file, for messages.

    Raises:
        ConfigError: See :func:`load_recipe`.
    """
    reader, data = Reader.of_text(text, source)
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source}: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    return _recipe(reader, dict(data))


def check_recipe(data: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Check a recipe that is plain data already.

    Args:
        data: What YAML would give.
        source: What to call it, for messages.

    Raises:
        ConfigError: It says something a recipe cannot say.
    """
    return _recipe(Reader(source), dict(data))


def _recipe(reader: Reader, data: dict[Any, Any]) -> Recipe:
    for key in ("model", "data"):
        if isinstance(data.get(key), str):
            data[key] = {"name": data[key]}
    if "seed" in data:
        if "seeds" in data:
            reader.fail(("seed",), "give either 'seed' or 'seeds', not both")
        data["seeds"] = [data.pop("seed")]
    if "compression" in data and "stages" not in data:
        reader.fail(
            ("compression",),
            "a list of algorithms alone drives a training script of yours: dwindle.from_recipe(model, path). Here it "
            "belongs into a stage: stages: [train: {...}, finetune: {compression: [...]}]",
        )
    if "search" in data:
        reader.fail(("search",), "this recipe is searched, not run: dwindle search FILE")
    stages = _stages(reader, data.get("stages"))
    recipe: Recipe = reader.check(Recipe, {**data, "stages": ()}, ())
    for position, stage in enumerate(stages):
        taught = getattr(stage, "distillation", None)
        if taught is not None and taught.cache and recipe.data.augment is not None:
            reader.fail(
                ("stages", position, stage.kind, "distillation", "cache"),
                "data.augment makes new inputs in each epoch, so there is nothing to keep; leave one of them out",
            )
    return recipe.model_copy(update={"stages": stages})


def _stages(reader: Reader, entries: Any) -> tuple[Stage, ...]:
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        reader.fail(("stages",), f"a recipe needs a list of stages, of the kinds {', '.join(STAGES)}")
    stages = tuple(_stage(reader, entry, ("stages", position)) for position, entry in enumerate(entries))
    _check_order(reader, stages)
    return stages


def _stage(reader: Reader, entry: Any, location: Location) -> Stage:
    """Read ``train: {...}``, or a bare ``report``."""
    kind, body = reader.entry(entry, location, STAGES, "stage")
    location = (*location, kind)
    if STAGES[kind] is FinetuneStage and "compression" in body:
        body["compression"] = read_algorithms(reader, body["compression"], (*location, "compression"))
    stage: Stage = reader.check(STAGES[kind], body, location)
    return stage


def _check_order(reader: Reader, stages: Sequence[Stage]) -> None:
    """Raise where the stages cannot follow one another as they do."""
    seen: dict[str, int] = {}
    quantized: str | None = None
    for position, stage in enumerate(stages):
        location: Location = ("stages", position, stage.kind)
        if stage.label in seen:
            first = seen[stage.label]
            reader.fail(
                location, f"stages[{first}] is called {stage.label!r} too; give each a 'name' of its own"
            )
        seen[stage.label] = position
        if stage.kind == "report" and position != len(stages) - 1:
            reader.fail(location, "the report must be the last stage, so that it shows all of them")
        if quantized and stage.makes_model:
            reader.fail(location, f"{stage.kind!r} cannot follow {quantized!r}; put it before")
        quantized = quantized or (stage.kind if stage.kind in ("quantize", "auto") else None)
        for name in getattr(stage, "compare", None) or ():
            models = [other.label for other in stages[:position] if other.makes_model]
            if name not in ("original", *models):
                reader.fail(
                    (*location, "compare"),
                    f"no stage {name!r} before this one makes a model",
                    did_you_mean(name, models),
                )
