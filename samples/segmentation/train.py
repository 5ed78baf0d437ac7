"""Compress a segmentation network in a plain PyTorch loop; a recipe says how.

    python samples/segmentation/train.py --small
    python samples/segmentation/train.py --recipe samples/segmentation/all_at_once.yaml --epochs 20

The photographs come with scikit-image and scikit-learn: pip install "dwindle[onnx,openvino,zoo]"
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dwindle as dw

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from batches import Batches  # noqa: E402
from segmentation.data import CLASSES, augment, scenes  # noqa: E402
from segmentation.metric import confusion, mean_intersection_over_union  # noqa: E402
from segmentation.model import UNet  # noqa: E402
from table import say, table_of, write_table  # noqa: E402

RECIPES = [HERE / name for name in ("pruning.yaml", "int8.yaml", "all_at_once.yaml")]


def train(
    model: nn.Module, loader: Any, epochs: int, rate: float, run: dw.recipe.RecipeRun | None = None
) -> None:
    """A plain training loop; the three lines with `run` are what compression adds to it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=epochs * len(loader), cycle_momentum=False
    )
    if run is not None:
        run.add_parameters_to(optimizer, schedule=schedule)
    model.train()
    for epoch in range(epochs):
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            if run is not None:
                loss = run.task_weight * loss + run.loss()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if run is not None:
                run.step()
        say(f"  epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}")


def compress(model: nn.Module, recipe: Path, loader: Any, epochs: int) -> nn.Module:
    """Return a smaller model that was trained as the recipe says; `model` stays as it is, and teaches."""
    student, images = copy.deepcopy(model), loader.images[:2]
    with dw.from_recipe(
        student,
        recipe,
        example_inputs=(images,),
        calibration_data=loader,
        teacher=model.eval(),
        steps_per_epoch=len(loader),
        training_steps=epochs * len(loader),
    ) as run:
        train(student, loader, epochs, rate=1e-3, run=run)
        return run.realize(example_inputs=(images,)).model.eval()


def classes_in(images: Tensor) -> Callable[[Callable[..., Tensor]], Tensor]:
    """Return a function that asks a model, or its file in a runtime, for the class of each pixel."""

    def classes(ask: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return torch.cat([ask(part).argmax(1) for part in images.split(50)])

    return classes


def main(arguments: Sequence[str] | None = None) -> str:
    """Train, compress by each recipe, measure; return the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, nargs="+", default=RECIPES)
    parser.add_argument("--epochs", type=int, help="of the float model; compression takes a third as many")
    parser.add_argument("--pictures", type=int, nargs=2, metavar=("TRAIN", "TEST"), help="how many to make")
    parser.add_argument("--small", action="store_true", help="few pictures and epochs: minutes on one core")
    parser.add_argument("--readme", action="store_true", help="write the table into the README")
    said = parser.parse_args(arguments)
    begin = time.process_time()
    torch.manual_seed(0)
    epochs = said.epochs or (10 if said.small else 40)
    training, testing = said.pictures or ((1400, 300) if said.small else (8000, 1000))
    data, test = scenes("train", training), scenes("test", testing)
    loader = Batches(data.images, data.labels, augment)
    model = UNet(len(CLASSES)).to(memory_format=torch.channels_last)
    say(f"float model: {len(data):,} pictures, {epochs} epochs")
    train(model, loader, epochs, rate=3e-3)
    models = {"float": model.eval()}
    for recipe in said.recipe:
        say(f"{recipe.name}: {(epochs + 2) // 3} epochs")
        models[recipe.stem.replace("_", " ")] = compress(model, recipe, loader, (epochs + 2) // 3)
    table = table_of(
        models,
        (test.images[:2],),
        classes_in(test.images),
        score=lambda classes: mean_intersection_over_union(confusion(classes, test.labels, len(CLASSES))),
        score_name="mean IoU",
        same_name="pixels equal to torch's",
        max_seconds=10.0 if said.small else 30.0,
    )
    seconds = time.process_time() - begin
    text = (
        f"{len(data):,} training and {len(test):,} test pictures, {epochs} epochs in float and {(epochs + 2) // 3} "
        "under each recipe; batch 1, one thread. Written by the run, "
        f"which took {seconds:.0f} s of processor time.\n\n{table}"
    )
    if said.readme:
        write_table(HERE / "README.md", text)
    return text


if __name__ == "__main__":
    print(main())
