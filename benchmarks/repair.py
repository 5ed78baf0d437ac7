"""One-shot pruning of real pretrained models with and without ``dw.repair``: no labels, no training.

    python benchmarks/repair.py [--models efficientnet minilm] [--crops 12] [--output benchmarks/results/repair.json]

EfficientNet-Lite0 with its ImageNet weights, on 55 photographs that scikit-image, scikit-learn and the Debian packages
opencv-doc and mate-backgrounds ship (without the packages: ``--python-only``): the model is
repaired with crops of one part of them and judged on crops of the others, by how often its first guess is that of the
original (and how often the original's first guess is among its five). all-MiniLM-L6-v2 on sentences of Rotten
Tomatoes: the mean cosine of its embeddings to those of the original, on sentences that the repair did not see.

Rows are written as they are made. Seconds are process CPU time of one thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

import dwindle as dw
from dwindle import zoo

Score = Callable[[nn.Module], dict[str, float]]

#: What each repair may do, by the name in the table.
REPAIRS: dict[str, dict] = {
    "biases": {"parts": ["biases"]},
    "norms": {"parts": ["norms"]},
    "all, 1 pass": {"passes": 1},
    "all, 4 passes": {"passes": 4},
    "all, 8 passes": {"passes": 8},
}


def efficientnet(options: argparse.Namespace) -> tuple[nn.Module, tuple, object, Score]:
    """Return the model, example inputs, unlabelled data and what is judged."""
    model = zoo.efficientnet_lite0_timm()
    data = zoo.photographs(
        "calibration", crops=options.crops, size=options.size, debian=not options.python_only
    )
    held_out = zoo.photographs("agreement", crops=8, size=options.size, debian=not options.python_only)
    with torch.no_grad():
        guesses = torch.cat([model(part) for part in held_out.split(8)]).argmax(1)

    def score(small: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            five = torch.cat([small(part) for part in held_out.split(8)]).topk(5).indices
        return {
            "agreement": float((five[:, 0] == guesses).float().mean()),
            "in five": float((five == guesses[:, None]).any(1).float().mean()),
        }

    return model, (held_out[:2],), data, score


def minilm(options: argparse.Namespace) -> tuple[nn.Module, tuple, object, Score]:
    """Return the model, example inputs, unlabelled data and what is judged."""
    model, tokenizer = zoo.minilm()
    texts = [text for text, _ in zoo.movie_reviews("sentences")]

    def batches(chosen: list[str]) -> list[dict]:
        return [
            dict(
                tokenizer(
                    chosen[i : i + 16], padding=True, truncation=True, max_length=64, return_tensors="pt"
                )
            )
            for i in range(0, len(chosen), 16)
        ]

    def embeddings(of: nn.Module, inputs: list[dict]) -> torch.Tensor:
        found = []
        with torch.no_grad():
            for batch in inputs:
                hidden, mask = of(**batch).last_hidden_state, batch["attention_mask"][..., None]
                found.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.cat(found)

    data, held_out = batches(texts[: options.sentences]), batches(texts[4000:4256])
    wanted = embeddings(model, held_out)

    def score(small: nn.Module) -> dict[str, float]:
        cosine = torch.nn.functional.cosine_similarity(embeddings(small, held_out), wanted)
        return {"cosine": float(cosine.mean()), "worst cosine": float(cosine.min())}

    example = held_out[0]
    return model, (example["input_ids"][:2], example["attention_mask"][:2]), data, score


Prune = Callable[[nn.Module, tuple, object], None]


def structured(share: float, importance: str, **options: object) -> Prune:
    """Prune to a share of the multiply-accumulates."""

    def prune(model: nn.Module, example: tuple, data: object) -> None:
        if isinstance(data, torch.Tensor):
            data = data.split(8)
        options["data"] = data if importance == "outputs" else None
        dw.prune(model, example, target={"macs": share}, importance=importance, verify=False, **options)

    return prune


def unstructured(ratio: float) -> Prune:
    """Zero the smallest weights of each layer."""

    def prune(model: nn.Module, example: tuple, data: object) -> None:
        config = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": ratio}]
        pruner = dw.pruning.LevelPruner(model, config)
        pruner.compress()
        pruner.detach()

    return prune


CASES: dict[str, tuple[Callable, dict[str, Callable]]] = {
    "efficientnet": (
        efficientnet,
        {
            "20 % of MACs by l2": structured(0.8, "l2"),
            "30 % of MACs by l2": structured(0.7, "l2"),
            "20 % of MACs by outputs": structured(0.8, "outputs"),
            "30 % of MACs by outputs": structured(0.7, "outputs"),
            "20 % of MACs by outputs and cost": structured(0.8, "outputs", scope="cost"),
            "30 % of MACs by outputs and cost": structured(0.7, "outputs", scope="cost"),
            "50 % of weights": unstructured(0.5),
            "70 % of weights": unstructured(0.7),
        },
    ),
    "minilm": (
        minilm,
        {
            "20 % of MACs by l2": structured(0.8, "l2", axes=["heads", "feed_forward"]),
            "30 % of MACs by l2": structured(0.7, "l2", axes=["heads", "feed_forward"]),
            "20 % of MACs by outputs": structured(0.8, "outputs", axes=["heads", "feed_forward"]),
            "30 % of MACs by outputs": structured(0.7, "outputs", axes=["heads", "feed_forward"]),
            "50 % of weights": unstructured(0.5),
            "70 % of weights": unstructured(0.7),
        },
    ),
}


def main() -> None:
    """Prune, judge, repair, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--cases", nargs="+", help="only these prunings")
    parser.add_argument("--repairs", nargs="+", default=["all, 4 passes"], choices=list(REPAIRS))
    parser.add_argument("--crops", type=int, default=12, help="of each photograph")
    parser.add_argument("--python-only", action="store_true", help="only the photographs of Python packages")
    parser.add_argument("--size", type=int, default=224, help="pixels of a crop")
    parser.add_argument("--sentences", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "repair.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = json.loads(options.output.read_text()) if options.output.exists() else []
    for name in options.models:
        build, cases = CASES[name]
        model, example, data, score = build(options)
        for case, prune in cases.items():
            if options.cases and case not in options.cases:
                continue
            pruned = copy.deepcopy(model)
            prune(pruned, example, data)
            results = [{"repair": "none", "seconds": 0.0, **score(pruned)}]
            print(name, case, results[-1], flush=True)
            for repair in options.repairs:
                small, started = copy.deepcopy(pruned), time.process_time()
                report = dw.repair(small, model, data, **REPAIRS[repair])
                results.append({"repair": repair, "seconds": time.process_time() - started, **score(small)})
                results[-1].update(
                    output_before=report.output_before,
                    output_after=report.output_after,
                    repaired=sum(layer.repaired for layer in report.layers),
                    layers=len(report.layers),
                    accepted=report.accepted,
                )
                print(name, case, results[-1], flush=True)
            for row in results:
                entry = {"model": name, "pruned": case, **row}
                if name == "efficientnet":
                    entry.update(inputs=len(data), size=options.size)
                else:
                    entry.update(inputs=options.sentences)
                key = [entry[part] for part in ("model", "pruned", "repair")]
                rows = [old for old in rows if [old[part] for part in ("model", "pruned", "repair")] != key]
                rows.append(entry)
            options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
