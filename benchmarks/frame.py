"""What the frame of a compression run costs a training step: nothing in it, and one mask, against the plain loop.

    python benchmarks/frame.py                                 rows in benchmarks/results/frame.json

resnet18, batch 8 of 224 x 224, SGD with momentum, one thread; the three take turns. CPU time of the process; medians,
and the median of the ratios of neighbours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from training_step import models

HERE = Path(__file__).resolve().parent


def steppers() -> dict[str, Callable[[], None]]:
    """Return a training step of each kind, each with a model of its own and equal weights."""
    import copy

    import torch

    import dwindle as dw

    torch.manual_seed(0)
    model, images, labels = models("resnet18"), torch.randn(8, 3, 224, 224), torch.randint(0, 1000, (8,))

    def make(kind: str) -> Callable[[], None]:
        own = copy.deepcopy(model).train()
        optimizer = torch.optim.SGD(own.parameters(), 1e-3, momentum=0.9)
        if kind == "plain":

            def step() -> None:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(own(images), labels).backward()
                optimizer.step()

            return step
        one = [{"op_names": ["layer3.0.conv1"], "sparse_ratio": 0.5}]
        run = dw.compress(own, [dw.pruning.L1NormPruner(own, one)] if kind == "one mask" else [])
        run.__enter__()
        run.add_parameters_to(optimizer)

        def step_in_run() -> None:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(own(images), labels) + run.loss()
            loss.backward()
            optimizer.step()
            run.step()

        return step_in_run

    return {kind: make(kind) for kind in ("plain", "empty run", "one mask")}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "frame.json")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    steps = steppers()
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for number in range(options.rounds + 2):
        for kind, step in steps.items():
            begin = time.process_time()
            step()
            if number > 1:
                times[kind].append(time.process_time() - begin)
    rows = []
    for kind, own in times.items():
        ratio = statistics.median(mine / base for mine, base in zip(own, times["plain"], strict=True))
        rows.append({"kind": kind, "seconds": statistics.median(own), "ratio": ratio})
        print(f"{kind:10} {rows[-1]['seconds']:.3f} s  {ratio:.4f} of the plain loop")
    source = {
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "rounds": options.rounds,
        "rows": rows,
    }
    options.output.write_text(json.dumps(source, indent=1) + "\n")


if __name__ == "__main__":
    main()
