"""How far digits can be pruned within one point of accuracy: the search, every rate by brute force, and NNCF's rule.

    python benchmarks/accuracy_aware.py [--seeds 3] [--smoke]

Two tables come out, for docs/training_helpers.md. The first is what estimating normalizations anew brings back behind a
cut, without any training. In the second, rates are judged on a part of the training digits that nothing is trained on;
what is found is cut out (``dw.realize``) and judged on the test digits. Brute force trains every rate of a grid from
the original, for as many epochs as the search may spend at a rate. "Steps up and down" is how NNCF's adaptive
compression goes on: a rate that satisfies is followed by a larger one, one that does not by a smaller one, steps and
learning rate halve at each turn, and training goes on from wherever it is.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import dwindle as dw
from dwindle import zoo
from dwindle.graph.macs import count_macs
from dwindle.training import AccuracyOptions, accuracy, accuracy_aware, adapt_normalization

WIDTHS = (8, 16, 32)
GOAL = 0.95
DROP = 0.01
EPOCHS = 3
STEP, MINIMUM = 0.1, 0.025


class Setting:
    """A trained network, its data in three parts, and a pruner whose goal is nearly everything."""

    def __init__(self, seed: int, epochs: int) -> None:
        torch.manual_seed(seed)
        self.model, data = zoo.digits_resnet(WIDTHS), zoo.digits()
        images, labels = data.train_images, data.train_labels
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        train, held = order[350:], order[:350]
        self.loader = zoo.BatchLoader(
            images[train], labels[train], 64, shuffle=True, augment=zoo.random_shift, seed=seed
        )
        self.held = [(images[held], labels[held])]
        self.test = [(data.test_images, data.test_labels)]
        self.batches = [own for own, _ in zoo.BatchLoader(images[train], labels[train], 128)]
        self.example = (images[:2],)
        self.trained = 0
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3)
        for _ in range(epochs):
            self.train(self.model)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3

    def train(self, model: nn.Module) -> None:
        """Train one epoch."""
        self.trained += 1
        model.train()
        for x, y in self.loader:
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            self.optimizer.step()

    def judge(self, model: nn.Module) -> float:
        """Accuracy on the digits that were held back."""
        return accuracy(model, self.held)

    def calibrate(self, model: nn.Module) -> None:
        """Put the statistics of normalizations right."""
        adapt_normalization(model, self.batches)

    def pruner(self) -> Any:
        """Return a pruner of whole channels."""
        config = [{"op_types": ["Conv2d"], "sparse_ratio": GOAL}]
        return dw.pruning.L1NormPruner(self.model, config, example_inputs=self.example)

    def found(self, rate: float) -> dict[str, float]:
        """Cut the masked channels out, and judge what is left."""
        small = dw.realize(self.model, example_inputs=self.example).model
        macs = [count_macs(own, self.example) for own in (zoo.digits_resnet(WIDTHS), small)]
        return {"rate": rate * GOAL, "macs": macs[1] / macs[0], "test": accuracy(small.eval(), self.test)}


def by_search(own: Setting, epochs: int = EPOCHS, *, go_back: bool = True) -> dict[str, float]:
    """``accuracy_aware``."""
    options = AccuracyOptions(
        maximum_drop=DROP, step=STEP, minimum_step=MINIMUM, epochs=epochs, go_back=go_back
    )
    result = accuracy_aware(
        own.pruner(),
        train_epoch=own.train,
        evaluate=own.judge,
        calibrate=own.calibrate,
        options=options,
        keep=[own.optimizer, own.loader],
    )
    return own.found(result.rate)


def by_brute_force(own: Setting) -> dict[str, float]:
    """Every rate of a grid, each from the original."""
    bound = own.judge(own.model.eval()) - DROP
    start = copy.deepcopy((own.model.state_dict(), own.optimizer.state_dict()))
    best, kept = 0.0, None
    for number in range(1, round(1 / MINIMUM) + 1):
        own.model.load_state_dict(start[0])
        own.optimizer.load_state_dict(copy.deepcopy(start[1]))
        pruner = own.pruner()
        pruner.compress(number * MINIMUM)
        own.calibrate(own.model)
        metric = own.judge(own.model)
        for _ in range(EPOCHS):
            if metric >= bound:
                break
            own.train(own.model)
            metric = own.judge(own.model)
        if metric >= bound:
            best, kept = number * MINIMUM, copy.deepcopy(own.model.state_dict())
        pruner.detach(keep_values=False)
    own.model.load_state_dict(start[0])
    pruner = own.pruner()
    pruner.compress(best)
    if kept is not None:
        own.model.load_state_dict(kept)
    return own.found(best)


def by_steps(own: Setting) -> dict[str, float]:
    """Steps up and down, without going back to what satisfied."""
    bound = own.judge(own.model.eval()) - DROP
    pruner = own.pruner()
    pruner.compress(0.0)
    rate, step, up, best, kept = STEP, STEP, True, 0.0, copy.deepcopy(own.model.state_dict())
    while step >= MINIMUM and 0 < rate <= 1:
        pruner.update(rate)
        metric = -1.0
        for _ in range(EPOCHS):
            own.train(own.model)
            metric = own.judge(own.model)
            if metric >= bound:
                break
        good = metric >= bound
        if good and rate > best:
            best, kept = rate, copy.deepcopy(own.model.state_dict())
        if good != up:
            up, step = good, step / 2
            for group in own.optimizer.param_groups:
                group["lr"] /= 2
        rate = round(rate + (step if up else -step), 9)
    pruner.update(best)
    own.model.load_state_dict(kept)
    return own.found(best)


METHODS: dict[str, Callable[[Setting], dict[str, float]]] = {
    "accuracy_aware, 3 epochs a rate at most": by_search,
    "accuracy_aware, 3 epochs, going on": lambda own: by_search(own, go_back=False),
    "accuracy_aware, 8 epochs": lambda own: by_search(own, 8),
    "accuracy_aware, 8 epochs, going on": lambda own: by_search(own, 8, go_back=False),
    "steps up and down, 3 epochs": by_steps,
    "brute force, 3 epochs": by_brute_force,
}


def of_statistics(seeds: int, epochs: int) -> None:
    """Print what normalizations bring back, without training."""
    ways: dict[str, dict[str, Any] | None] = {
        "left as they were": None,
        "moving, 0.1": {"average": 0.1},
        "mean of batches": {"average": "batches"},
        "of all values": {},
        "of all values, one by one": {"one_by_one": True},
    }
    print(f"| statistics | {' | '.join(f'{ratio:.0%} of the channels cut' for ratio in (0.2, 0.4, 0.6))} |")
    print("|---|---|---|---|")
    found: dict[str, list[list[float]]] = {name: [[], [], []] for name in ways}
    for seed in range(seeds):
        own = Setting(seed, epochs)
        for column, ratio in enumerate((0.2, 0.4, 0.6)):
            small = dw.prune(copy.deepcopy(own.model).eval(), own.example, ratio=ratio).model
            for name, options in ways.items():
                copied = copy.deepcopy(small)
                if options is not None:
                    adapt_normalization(copied, own.batches, **options)
                found[name][column].append(accuracy(copied.eval(), own.test))
    for name, columns in found.items():
        print(
            f"| {name} | {' | '.join(f'{statistics.mean(values):.1%}' for values in columns)} |", flush=True
        )


def of_searches(seeds: int, epochs: int) -> None:
    """Print what the searches find, and what they cost."""
    print("| search | ratio | MACs left | accuracy, test (before) | epochs | seconds of the processor |")
    print("|---|---|---|---|---|---|")
    for name, method in METHODS.items():
        rows = []
        for seed in range(seeds):
            own = Setting(seed, epochs)
            before, own.trained, begin = accuracy(own.model.eval(), own.test), 0, time.process_time()
            rows.append(
                {
                    **method(own),
                    "before": before,
                    "epochs": own.trained,
                    "seconds": time.process_time() - begin,
                }
            )
        mean = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
        ratios = ", ".join(f"{row['rate']:.0%}" for row in rows)
        print(
            f"| {name} | {mean['rate']:.0%} ({ratios}) | {mean['macs']:.0%} | {mean['test']:.1%} "
            f"({mean['before']:.1%}) | {mean['epochs']:.0f} | {mean['seconds']:.1f} |",
            flush=True,
        )


def main() -> None:
    """Measure, and print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=("statistics", "searches"), help="one of the two tables")
    parser.add_argument("--smoke", action="store_true", help="one seed and hardly any training")
    given = parser.parse_args()
    seeds, epochs = (1, 1) if given.smoke else (given.seeds, 12)
    if given.only != "searches":
        of_statistics(seeds, epochs)
    if given.only != "statistics":
        of_searches(seeds, epochs)


if __name__ == "__main__":
    main()
