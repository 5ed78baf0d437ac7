"""A model that a stage made, on disk: its weights and manifest, and its answers on the test data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dwindle.recipe.model_source import is_saved_directory, load_model
from dwindle.recipe.schema import ModelPart

__all__ = ["Variant", "load_predictions", "load_variant", "save_predictions", "save_variant"]

_MODEL = "model"
_PREDICTIONS = "predictions.safetensors"


@dataclass(frozen=True)
class Variant:
    """A model that a stage made.

    Attributes:
        label: The stage's label, or ``original``.
        kind: The stage's kind, or ``original``.
        directory: The stage's directory.
    """

    label: str
    kind: str
    directory: Path

    @property
    def model_directory(self) -> Path:
        """What ``dwindle.load`` reads."""
        return self.directory / _MODEL


def save_variant(model: nn.Module, directory: Path, part: ModelPart, args: Any, kwargs: Any) -> None:
    """Write a model into a stage's directory, with the name of its maker.

    Args:
        model: The model.
        directory: The stage's directory.
        part: The recipe's ``model``.
        args: Positional example inputs, for a model that can only be stored as a program.
        kwargs: Keyword example inputs.
    """
    from dwindle.export import save

    source, arguments = _source(part)
    save(
        model,
        directory / _MODEL,
        source=source,
        source_kwargs=arguments if source is not None else None,
        example_inputs=args or None,
        example_kwargs=kwargs or None,
        overwrite=True,
    )


def load_variant(variant: Variant, part: ModelPart) -> nn.Module:
    """Read a model back, in evaluation mode; the recipe's own constructor gives its code.

    Raises:
        FileFormatError: A file is truncated or altered.
    """
    from dwindle.export import load

    if is_saved_directory(part.name):
        # The start was itself a compressed model: its history is part of the variant's, so it is repeated
        # from the plain model that the manifest names.
        return load(variant.model_directory, trust_source=True).eval()
    return load(variant.model_directory, model=lambda: load_model(part.name, part.arguments)).eval()


def _source(part: ModelPart) -> tuple[str | None, dict[str, Any]]:
    """The maker of the plain model and its arguments, as ``dwindle.save`` wants them."""
    if is_saved_directory(part.name):
        manifest = json.loads((Path(part.name) / "manifest.json").read_text(encoding="utf-8"))
        source = manifest.get("source")
        return (None, {}) if source is None else (source["callable"], dict(source["kwargs"]))
    return part.name, dict(part.arguments)


def save_predictions(predictions: Tensor, directory: Path) -> None:
    """Write the answers of a model."""
    save_file({"predictions": predictions.contiguous()}, str(directory / _PREDICTIONS))


def load_predictions(variant: Variant) -> Tensor:
    """Read the answers of a model."""
    return load_file(str(variant.directory / _PREDICTIONS))["predictions"]
