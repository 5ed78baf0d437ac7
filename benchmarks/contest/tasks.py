"""Real tasks that a small machine can train: digits, Fashion-MNIST, and sentences with a pretrained encoder."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dwindle import zoo
from dwindle.training import TrainingOptions, fit
from dwindle.training.batches import accuracy

BATCH = 128


class TokenLoader:
    """Shuffled batches of token numbers and masks, cut to their longest sentence.

    Args:
        tokens: ``[n, length]``, zero where a sentence has ended.
        labels: ``[n]``.
        batch_size: Sentences a batch.
        shuffle: A new order in every pass.
        seed: Decides the order.
    """

    def __init__(
        self, tokens: Tensor, labels: Tensor, batch_size: int, *, shuffle: bool, seed: int = 0
    ) -> None:
        self.indices = zoo.BatchLoader(
            torch.arange(len(labels)), labels, batch_size, shuffle=shuffle, seed=seed
        )
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Any:
        for chosen, labels in self.indices:
            tokens = self.tokens[chosen]
            tokens = tokens[:, : max(1, int((tokens != 0).sum(1).max()))]
            yield (tokens, (tokens != 0).long()), labels


class SentenceClassifier(nn.Module):
    """A pretrained encoder, the mean over its tokens, and one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, _ = zoo.minilm()
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return logits of two classes for each sentence."""
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weights).sum(1) / weights.sum(1))


@dataclass
class Task:
    """One model on one set of data.

    Attributes:
        name: What it is called.
        build: Makes the untrained (or pretrained) model; ``torch.manual_seed`` decides its random weights.
        loader: ``loader(seed)`` gives training batches.
        test: Test batches.
        examples: Example inputs for the analysis and for latency.
        calibration: Labelled batches, never test data, for criteria that run the model.
        epochs: Of the first training.
        tuning: Of the fine-tuning, for every method the same.
        rate: Largest learning rate of the first training; fine-tuning takes ``tuning_rate``.
        tuning_rate: See there.
        adam: AdamW in place of SGD with momentum.
        prunable: Options of ``dw.prune`` and entries for a config_list that say what may shrink.
        tuning_loader: Training batches for fine-tuning, where they are not all.
    """

    name: str
    build: Callable[[], nn.Module]
    loader: Callable[[int], Any]
    test: Sequence[Any]
    examples: tuple[Tensor, ...]
    calibration: list[Any]
    epochs: int
    tuning: int
    rate: float
    tuning_rate: float
    adam: bool = False
    prunable: dict[str, Any] = field(default_factory=dict)
    tuning_loader: Callable[[int], Any] | None = None

    @property
    def batches(self) -> int:
        """Optimizer steps of one epoch of fine-tuning."""
        return len((self.tuning_loader or self.loader)(0))

    def accuracy(self, model: nn.Module) -> float:
        """Share of the test set that is right."""
        return accuracy(model, self.test)

    def train(
        self,
        model: nn.Module,
        loader: Any,
        seed: int,
        *,
        epochs: int,
        rate: float,
        compressors: Sequence[Any] = (),
    ) -> nn.Module:
        """Train in place, with a learning rate that rises and falls once."""
        others = {id(parameter) for own in compressors for parameter in own.parameters()}
        parameters = [own for own in model.parameters() if own.requires_grad and id(own) not in others]
        if self.adam:
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.01)
        else:
            optimizer = torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
        total = max(2, epochs * len(loader))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(rise_and_fall, total))
        options = TrainingOptions(seed=seed, progress=False)
        fit(
            model,
            loader,
            optimizer,
            epochs=epochs,
            schedule=schedule,
            compressors=compressors,
            options=options,
        )
        return model.eval()

    def tune(
        self, model: nn.Module, seed: int, compressors: Sequence[Any] = (), epochs: int | None = None
    ) -> nn.Module:
        """Fine-tune in place: the same budget for every method."""
        return self.train(
            model,
            (self.tuning_loader or self.loader)(seed),
            seed,
            epochs=self.tuning if epochs is None else epochs,
            rate=self.tuning_rate,
            compressors=compressors,
        )


def rise_and_fall(total: int, step: int) -> float:
    """Share of the largest learning rate at a step: up over the first tenth, down in a straight line."""
    rising = max(1, total // 10)
    return (step + 1) / rising if step < rising else max(0.0, (total - step) / (total - rising))


def image_task(name: str, data: zoo.ImageData, build: Callable[[], nn.Module], **numbers: Any) -> Task:
    """Make a task of images."""
    count = len(data.train_images)
    calibration = zoo.BatchLoader(
        data.train_images[: min(512, count)], data.train_labels[: min(512, count)], 64
    )
    test = zoo.BatchLoader(data.test_images, data.test_labels, 500)

    def loader(seed: int) -> Any:
        return zoo.BatchLoader(
            data.train_images,
            data.train_labels,
            BATCH,
            shuffle=True,
            augment=zoo.random_shift,
            seed=seed,
            drop_last=True,
        )

    prunable = {"prune": {}, "config": [{"op_types": ["Conv2d"]}]}
    return Task(
        name, build, loader, test, (data.test_images[:2],), list(calibration), prunable=prunable, **numbers
    )


def digits() -> Task:
    """scikit-learn's digits and a ResNet-8 of 309 thousand parameters."""
    return image_task(
        "digits", zoo.digits(), zoo.digits_resnet, epochs=20, tuning=10, rate=0.2, tuning_rate=0.1
    )


def fashion() -> Task:
    """6,000 pictures of Fashion-MNIST, 5,000 of its test set, and a ResNet-8 behind a strided stem."""
    return image_task(
        "fashion",
        zoo.fashion_mnist().first(6_000, 5_000),
        zoo.fashion_resnet,
        epochs=10,
        tuning=2,
        rate=0.2,
        tuning_rate=0.1,
    )


def film_sentences(count: int, length: int) -> tuple[Tensor, Tensor]:
    """Return token numbers ``[count, length]``, zero behind the end of a sentence, and labels ``[count]``."""
    _, tokenizer = zoo.minilm()
    texts = zoo.movie_reviews("sentences")[:count]
    encoded = tokenizer(
        [text for text, _ in texts],
        truncation=True,
        max_length=length,
        padding="max_length",
        return_tensors="pt",
    )
    return encoded.input_ids * encoded.attention_mask, torch.tensor([label for _, label in texts])


def sentences(train: int = 1600, test: int = 600, length: int = 32) -> Task:
    """Sentences about films and all-MiniLM-L6-v2, whose heads and inner widths may shrink (not its embedding)."""
    tokens, labels = film_sentences(train + test, length)

    def loader(seed: int) -> TokenLoader:
        return TokenLoader(tokens[:train], labels[:train], 32, shuffle=True, seed=seed)

    def tuning_loader(seed: int) -> TokenLoader:
        return TokenLoader(tokens[: train // 2], labels[: train // 2], 32, shuffle=True, seed=seed)

    full = torch.full((2, length), 100)
    return Task(
        "sentences",
        SentenceClassifier,
        loader,
        list(TokenLoader(tokens[train:], labels[train:], 100, shuffle=False)),
        (full, torch.ones_like(full)),
        list(TokenLoader(tokens[:128], labels[:128], 32, shuffle=False)),
        epochs=2,
        tuning=1,
        rate=5e-5,
        tuning_rate=1e-4,
        adam=True,
        prunable={
            "prune": {"axes": ["heads", "feed_forward"]},
            "config": [{"op_names_re": [r".*\.(intermediate\.dense|attention\.self\.(query|key|value))"]}],
        },
        tuning_loader=tuning_loader,
    )


TASKS: dict[str, Callable[[], Task]] = {"digits": digits, "fashion": fashion, "sentences": sentences}


def trained(task: Task, seed: int, directory: Any) -> nn.Module:
    """Return the trained model that every method of this task and seed begins with; trained once and kept.

    Args:
        task: The task.
        seed: Decides its weights and the order of its batches.
        directory: Where it is kept (a folder that is not committed).
    """
    path = directory / f"{task.name}-{seed}.safetensors"
    torch.manual_seed(seed)
    model = task.build()
    from safetensors.torch import load_file, save_file

    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    task.train(model, task.loader(seed), seed, epochs=task.epochs, rate=task.rate)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in copy.deepcopy(model).state_dict().items()}, path)
    return model
