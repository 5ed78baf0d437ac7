"""Quantization-aware training at few bits, on real tasks: accuracy by method and bits, beside the float model.

    python benchmarks/low_bits.py                                what is missing; it goes on where it stopped
    python benchmarks/low_bits.py --tasks digits --methods lsq --bits 2 --seeds 0
    python benchmarks/low_bits.py --page                           docs/low_bits.md from the results

Every method begins with the same trained float model and has the same epochs, learning rate and order of batches. The
float model is trained on with them too, so that more training alone is no advantage. Weights and inputs of all layers
but the first and the last have the bits of the row, those two have 8. The accuracy is that of the finished integer
model (normalizations folded, biases rounded), as ``dwindle.export`` writes it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

RESULTS = HERE / "results" / "low_bits.jsonl"
MODELS = HERE / "results" / "cache" / "pruners"
METHODS = ("lsq", "lsq_plus", "qat", "pact", "tqt", "symmetric_range", "asymmetric_range", "dorefa")
EPOCHS = {"digits": 20, "fashion": 6}
KEYS = ("task", "method", "bits", "seed")


def read_rows(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the rows so far by what they are about."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {tuple(row[key] for key in KEYS): row for row in rows}


def row_of(task: Any, model: Any, method: str, bits: int, seed: int) -> dict[str, Any]:
    """Train one model on and judge it."""
    import torch

    from dwindle.quantization import TrainingQuantizer

    begin = time.perf_counter()
    torch.manual_seed(seed)
    epochs = EPOCHS[task.name]
    if method == "float":
        task.tune(model, seed, epochs=epochs)
        return {"accuracy": task.accuracy(model), "seconds": time.perf_counter() - begin}
    quantizer = TrainingQuantizer(model, calibration_data=task.calibration, method=method, bits=bits)
    task.tune(model, seed, [quantizer], epochs=epochs)
    seconds = time.perf_counter() - begin
    return {
        "accuracy": task.accuracy(quantizer.finish()),
        "simulated": task.accuracy(model),
        "seconds": seconds,
    }


def run(options: argparse.Namespace) -> None:
    """Make the rows that are missing."""
    import torch

    from contest.tasks import TASKS, trained

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    known = read_rows(options.output)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    cases = [("float", 32), *((method, bits) for bits in options.bits for method in options.methods)]
    for seed in options.seeds:
        for name in options.tasks:
            task = TASKS[name]()
            whole = trained(task, seed, MODELS)
            before = task.accuracy(whole)
            for method, bits in cases:
                if (name, method, bits, seed) in known:
                    continue
                row = {"task": name, "method": method, "bits": bits, "seed": seed, "accuracy_before": before}
                row |= row_of(task, copy.deepcopy(whole), method, bits, seed)
                row |= {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
                with options.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(
                    f"{name:8} {seed} {method:18} {bits:2} {row['accuracy']:.4f} {row['seconds']:.0f} s",
                    flush=True,
                )


def page(rows: list[dict[str, Any]]) -> str:
    """Return the docs page."""
    found: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for row in rows:
        found[row["task"], row["method"], row["bits"]].append(100 * row["accuracy"])
    tasks = sorted({key[0] for key in found})
    bits = sorted({key[2] for key in found if key[1] != "float"}, reverse=True)
    seeds = len({row["seed"] for row in rows})
    text = [
        "# Few bits by training",
        "",
        "Written by `python benchmarks/low_bits.py --page` from `benchmarks/results/low_bits.jsonl`.",
        "",
        (__doc__ or "").split("\n\n", 2)[2].strip(),
        "",
        f"Mean accuracy in % over {seeds} seeds, and its standard error. ResNet-8 on scikit-learn's digits and on "
        "Fashion-MNIST (6,000 pictures to train, 5,000 to judge).",
        "",
    ]
    for task in tasks:
        text += [f"## {task}", "", f"float, trained on as long: {_cell(found[task, 'float', 32])}", ""]
        text += ["| method |" + "".join(f" {own} bits |" for own in bits), "|---|" + "---:|" * len(bits)]
        methods = sorted({key[1] for key in found if key[0] == task and key[1] != "float"}, key=METHODS.index)
        for method in methods:
            cells = "".join(f" {_cell(found[task, method, own])} |" for own in bits)
            text.append(f"| `{method}` |{cells}")
        text.append("")
    return "\n".join(text)


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {error:.2f}"


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="*", default=["digits", "fashion"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--bits", nargs="*", type=int, default=[4, 2])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="write the page from the results, run nothing")
    options = parser.parse_args()
    if options.page:
        (HERE.parent / "docs" / "low_bits.md").write_text(page(list(read_rows(options.output).values())))
        return
    run(options)


if __name__ == "__main__":
    main()
