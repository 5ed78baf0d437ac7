"""Seconds to capture, analyse, shrink and prove, beside Torch-Pruning's own prune, interleaved in one run.

    python benchmarks/realize.py [--models resnet18 ...] [--rounds 3] [--output benchmarks/results/realize.json]

Each model runs in a process of its own with a time and memory limit (Torch-Pruning does not come back from some).
Within a process the two tools alternate on fresh copies of the same model with the same 50 % ratio; figures are
medians. Torch-Pruning's time is building its dependency graph (the constructor) plus ``step()``, which removes the
channels; it has no proof. Install it with ``pip install --no-deps torch-pruning==1.6.1``. The column
``torch.export`` is what capturing the evaluation mode alone would take by export, beside dwindle's own recording of
evaluation and training mode.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

MODELS = [
    "resnet18", "resnet50", "vgg11_bn", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "densenet121",
    "efficientnet_b0", "squeezenet1_1", "mnasnet1_0", "regnet_y_400mf", "resnext50_32x4d", "convnext_tiny",
    "vit_b_16", "shufflenet_v2_x0_5", "swin_t",
]  # fmt: skip
TIME_LIMIT, MEMORY_LIMIT = 180, 14 * 2**30


def one_model(name: str, rounds: int) -> dict:
    """Run both tools on one model, alternating."""
    import torch

    from support import torchvision_shim

    torchvision_shim.install()
    import torchvision

    import dwindle as dw

    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval()
    x = torch.randn(2, 3, 224, 224)
    ours: dict[str, list[float]] = {}
    theirs: list[float] = []
    failure = None
    last = None
    for number in range(rounds + 1):
        last = dw.prune(copy.deepcopy(model), (x,), ratio=0.5, verify=number == rounds)
        for key, seconds in last.seconds.items():
            # the first round pays for imports and kernels of both tools and is not counted
            if number > 0 or key == "prove":
                ours.setdefault(key, []).append(seconds)
        if failure is None:
            try:
                seconds, left = torch_pruning(copy.deepcopy(model), x[:1])
                if number > 0:
                    theirs.append(seconds)
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"[:200]
    before = sum(p.numel() for p in model.parameters())
    started = time.perf_counter()
    torch.export.export(copy.deepcopy(model), (x,))
    exported = time.perf_counter() - started
    return {
        "model": name,
        "seconds": {key: statistics.median(values) for key, values in ours.items()},
        "torch_export_seconds": exported,
        "max_difference": last.verification.max_difference,
        "parameters_left": last.parameters_after / last.parameters_before,
        "torch_pruning_seconds": statistics.median(theirs) if theirs else None,
        "torch_pruning_parameters_left": left / before if theirs else None,
        "torch_pruning_failure": failure,
    }


def torch_pruning(model, x) -> tuple[float, int]:
    """Seconds of Torch-Pruning's constructor and step, and the parameters it leaves."""
    import torch
    import torch_pruning

    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    heads = {
        module: module.num_heads
        for module in model.modules()
        if isinstance(module, torch.nn.MultiheadAttention)
    }
    started = time.perf_counter()
    pruner = torch_pruning.pruner.MagnitudePruner(
        model, x, importance=torch_pruning.importance.MagnitudeImportance(p=1), pruning_ratio=0.5,
        ignored_layers=linear[-1:], num_heads=heads,
    )  # fmt: skip
    pruner.step()
    seconds = time.perf_counter() - started
    with torch.no_grad():
        model(x)
    return seconds, sum(p.numel() for p in model.parameters())


def run(name: str, rounds: int) -> dict:
    """Run one model in a process of its own."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))

    command = [sys.executable, __file__, "--child", name, "--rounds", str(rounds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, preexec_fn=limit)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"model": name, "failure": f"over {TIME_LIMIT} s"}
    except (IndexError, json.JSONDecodeError):
        return {
            "model": name,
            "failure": done.stderr.strip().splitlines()[-1][:200] if done.stderr else "killed",
        }


def summary(rows: list[dict]) -> dict:
    """Ratios over the models that both handle."""
    both = [row for row in rows if row.get("torch_pruning_seconds")]
    work = [sum(row["seconds"][step] for step in ("analyse", "choose", "shrink")) for row in both]
    whole = [own + row["seconds"]["capture"] for own, row in zip(work, both, strict=True)]
    theirs = [row["torch_pruning_seconds"] for row in both]
    return {
        "models": len(rows),
        "both": len(both),
        "median_ratio_analyse_and_shrink": statistics.median(
            a / b for a, b in zip(work, theirs, strict=True)
        ),
        "ratio_of_sums_with_capture": sum(whole) / sum(theirs),
        "sum_seconds": sum(whole),
        "torch_pruning_sum_seconds": sum(theirs),
    }


def table(rows: list[dict]) -> str:
    """Markdown table of the rows."""
    lines = [
        "| model | capture | analyse | shrink | prove | difference | left | Torch-Pruning | its left |",
        "|---|" + "---:|" * 9,
    ]
    for row in rows:
        if "failure" in row:
            lines.append(f"| {row['model']} | {row['failure']} |||||||")
            continue
        s = row["seconds"]
        peer = row["torch_pruning_seconds"]
        lines.append(
            f"| {row['model']} | {row['torch_export_seconds']:.3f} | {s['capture']:.3f} | {s['analyse']:.3f} "
            f"| {s['shrink']:.3f} | {s.get('prove', 0):.2f} | {row['max_difference']:.1e} "
            f"| {row['parameters_left']:.3f} "
            + (
                f"| {peer:.3f} | {row['torch_pruning_parameters_left']:.3f} |"
                if peer
                else f"| {row['torch_pruning_failure'] or ''} | |"
            )
        )
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark and print the table and the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(one_model(options.child, options.rounds)))
        return
    rows = []
    for name in options.models:
        rows.append(run(name, options.rounds))
        print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    import torch

    result = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "summary": summary(rows),
        "rows": rows,
    }
    print(table(rows))
    print(json.dumps(result["summary"], indent=1))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
