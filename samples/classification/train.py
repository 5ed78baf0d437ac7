"""Compress an image classifier in a plain PyTorch loop; a recipe says how.

    python samples/classification/train.py --small
    python samples/classification/train.py --recipe samples/classification/all_at_once.yaml --epochs 10

Fashion-MNIST where its files are found (Debian: apt install dataset-fashion-mnist), else scikit-learn's digits.
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
from dwindle import zoo

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from table import say, table_of, write_table  # noqa: E402

RECIPES = [HERE / name for name in ("pruning.yaml", "int8.yaml", "all_at_once.yaml")]


def load(small: bool, digits: bool = False) -> tuple[str, zoo.ImageData, nn.Module]:
    """Return the name of the data, the data, and a new model for them."""
    if not digits:
        try:
            data = zoo.fashion_mnist()
            return "Fashion-MNIST", (data.first(6_000, 4_000) if small else data), zoo.fashion_resnet()
        except zoo.DatasetNotFoundError as error:
            say(f"{error}; going on with digits")
    return "scikit-learn's digits", zoo.digits(), zoo.digits_resnet()


def train(
    model: nn.Module, loader: Any, epochs: int, rate: float, run: dw.recipe.RecipeRun | None = None
) -> None:
    """A plain training loop; the three lines with `run` are what compression adds to it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * len(loader))
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
    student, images = copy.deepcopy(model), next(iter(loader))[0]
    with dw.from_recipe(
        student,
        recipe,
        example_inputs=(images[:2],),
        calibration_data=loader,
        teacher=model.eval(),
        steps_per_epoch=len(loader),
        training_steps=epochs * len(loader),
    ) as run:
        train(student, loader, epochs, rate=0.05, run=run)
        return run.realize(example_inputs=(images[:2],)).model.eval()


def answers_to(images: Tensor) -> Callable[[Callable[..., Tensor]], Tensor]:
    """Return a function that asks a model, or its file in a runtime, for the class of each image."""

    def answers(ask: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return torch.cat([ask(part).argmax(-1) for part in images.split(500)])

    return answers


def main(arguments: Sequence[str] | None = None) -> str:
    """Train, compress by each recipe, measure; return the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, nargs="+", default=RECIPES)
    parser.add_argument("--epochs", type=int, help="of the float model; compression takes half as many")
    parser.add_argument("--small", action="store_true", help="few images and epochs: minutes on one core")
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits, seconds")
    parser.add_argument("--readme", action="store_true", help="write the table into the README")
    said = parser.parse_args(arguments)
    begin = time.process_time()
    torch.manual_seed(0)
    name, data, model = load(said.small, said.digits)
    epochs = said.epochs or (6 if said.small else 20)
    loader = zoo.BatchLoader(
        data.train_images, data.train_labels, shuffle=True, augment=zoo.random_shift, drop_last=True
    )
    say(f"float model: {len(data.train_images):,} images, {epochs} epochs")
    train(model, loader, epochs, rate=0.1)
    models = {"float": model.eval()}
    for recipe in said.recipe:
        say(f"{recipe.name}: {(epochs + 1) // 2} epochs")
        models[recipe.stem.replace("_", " ")] = compress(model, recipe, loader, (epochs + 1) // 2)
    table = table_of(
        models,
        (data.test_images[:2],),
        answers_to(data.test_images),
        score=lambda classes: float((classes == data.test_labels).double().mean()),
    )
    seconds = time.process_time() - begin
    text = (
        f"{name}, {len(data.train_images):,} training and {len(data.test_images):,} test images, {epochs} epochs "
        f"in float and {(epochs + 1) // 2} under each recipe; batch 1, one thread. Written by the run, "
        f"which took {seconds:.0f} s of processor time.\n\n{table}"
    )
    if said.readme:
        write_table(HERE / "README.md", text)
    return text


if __name__ == "__main__":
    print(main())
