"""Seconds and memory to rank 100 million weights together, and FPGM's distances of wide layers.

    python benchmarks/ranking.py [--weights 100] [--output benchmarks/results/ranking.json]

Each case runs three times in a process of its own; medians. One thread unless ``--threads`` says otherwise.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

import dwindle as dw

WIDTH = 2000


def model_of(millions: int) -> nn.Module:
    """Square linear layers with so many million weights together, of different scales."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(millions * 1_000_000 // WIDTH**2)]
    with torch.no_grad():
        for number, layer in enumerate(layers):
            layer.weight.normal_().mul_(1 + number / len(layers))
    return nn.Sequential(*layers)


CASES = {
    "LevelPruner, each layer": ("LevelPruner", {"sparse_ratio": 0.7}),
    "LevelPruner, global": ("LevelPruner", {"sparse_ratio": 0.7, "global_group_id": 1}),
    "MagnitudePruner, global": ("MagnitudePruner", {"sparse_ratio": 0.7, "global_group_id": 1}),
    "LevelPruner, 2:4": ("LevelPruner", {"granularity": "2:4"}),
    "LevelPruner, blocks of 16, global": (
        "LevelPruner",
        {"sparse_ratio": 0.7, "granularity": [16, 16], "global_group_id": 1},
    ),
    "L1NormPruner, global": ("L1NormPruner", {"sparse_ratio": 0.5, "global_group_id": 1}),
    "FPGMPruner": ("FPGMPruner", {"sparse_ratio": 0.5}),
}


def measure(case: str, millions: int) -> dict[str, float]:
    """Prune once; return seconds, memory beyond the model and the share of zeros."""
    name, goal = CASES[case]
    model = model_of(millions)
    pruner = getattr(dw.pruning, name)(model, [{"op_types": ["Linear"], **goal}])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    pruner.compress()
    seconds = time.perf_counter() - begin
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    zeros = sum(
        int((own["weight"] == 0).sum()) * (WIDTH**2 // own["weight"].numel()) for own in pruner.masks.values()
    )
    return {"seconds": seconds, "gibibytes": memory / 2**20, "zeros": zeros / (millions * 1_000_000)}


def main() -> None:
    """Run every case, or one in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=int, default=100, help="millions")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", choices=list(CASES), help="only this one, in this process")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "ranking.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.case:
        print(json.dumps(measure(options.case, options.weights)))
        return
    rows = []
    for case in CASES:
        command = [sys.executable, __file__, "--case", case, "--weights", str(options.weights)]
        command += ["--threads", str(options.threads)]
        runs = [
            json.loads(
                subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            )
            for _ in range(3)
        ]
        row = {key: round(statistics.median(run[key] for run in runs), 4) for key in runs[0]}
        rows.append({"case": case, **row})
        print(
            f"{case:36} {row['seconds']:6.2f} s {row['gibibytes']:6.2f} GiB {row['zeros']:.6f} zeros",
            flush=True,
        )
    result = {
        "million weights": options.weights,
        "threads": options.threads,
        "torch": torch.__version__,
        "processor": platform.machine(),
        "rows": rows,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
