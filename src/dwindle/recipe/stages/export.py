"""Writes the newest model for runtimes; every file is run and compared before it counts."""

from __future__ import annotations

from typing import Any

from dwindle.recipe.context import StageContext
from dwindle.recipe.schema import ExportStage

__all__ = ["SUFFIXES", "run_export"]

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}


def run_export(context: StageContext) -> dict[str, Any]:
    """Export to every format of the recipe."""
    from dwindle.export import export

    stage = context.stage
    assert isinstance(stage, ExportStage)
    assert context.current is not None
    model = context.load_current()
    args, kwargs = context.data.example(2)
    files = []
    for done, name in enumerate(stage.formats):
        context.advance(done, len(stage.formats), name)
        path = context.directory / f"{context.recipe.name}{SUFFIXES[name]}"
        entry = export(model, path, args, kwargs or None).to_json()
        # Only names are kept: the directory moves to its place when the stage is finished.
        entry["path"] = path.name
        entry["files"] = [name.rpartition("/")[2] for name in entry["files"]]
        files.append(entry)
    return {"model": context.current.label, "files": files}
