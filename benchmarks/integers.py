"""Integer layers in torch (``dw.pack_integers``) against the float model, taken in turn.

    python benchmarks/integers.py                      rows in benchmarks/results/integers.json

Latency of one forward, medians and ratios, one thread unless --threads says otherwise, and bytes of what is held.
resnet18 and mobilenet_v2 of torchvision without trained weights, and the MiniLM sentence encoder with its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests")]


def convolutional(name: str) -> tuple[Any, Any, list[Any]]:
    """Return a model of torchvision with statistics of noise, one image, and calibration data."""
    import torch

    from support import torchvision_shim

    torchvision_shim.install()
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 224, 224))
    return model.eval(), torch.randn(1, 3, 224, 224), [torch.randn(4, 3, 224, 224)]


def minilm(name: str) -> tuple[Any, Any, list[Any]]:
    """Return the encoder, one sentence, and calibration sentences."""
    from dwindle import zoo

    model, tokenizer = zoo.minilm()
    texts = [text for text, _ in zoo.movie_reviews("sentences")[:33]]
    encoded = tokenizer(texts, truncation=True, max_length=64, padding="max_length", return_tensors="pt")
    parts = ("input_ids", "attention_mask")
    return model.eval(), {key: encoded[key][:1] for key in parts}, [{key: encoded[key][1:] for key in parts}]


MODELS = {"resnet18": convolutional, "mobilenet_v2": convolutional, "minilm": minilm}


def latencies(models: dict[str, Any], inputs: Any, rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of each model, taken in turn."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for number in range(rounds + 3):
            for name, model in models.items():
                begin = time.perf_counter()
                model(**inputs) if isinstance(inputs, dict) else model(inputs)
                if number > 2:
                    times[name].append((time.perf_counter() - begin) * 1e3)
    return times


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "integers.json")
    options = parser.parse_args()
    import torch

    import dwindle as dw

    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.models:
        model, inputs, data = MODELS[name](name)
        preset = "int8_transformer" if name == "minilm" else "int8"
        packed = dw.quantize(copy.deepcopy(model), data, backend="torch", preset=preset)
        result = dw.pack_integers(packed, inputs)
        times = latencies({"float": model, "integers": packed}, inputs, options.rounds)
        row = {
            "model": name,
            "float_ms": statistics.median(times["float"]),
            "integers_ms": statistics.median(times["integers"]),
            "ratio": statistics.median(b / a for a, b in zip(times["float"], times["integers"], strict=True)),
            "packed": len(result.kernels),
            "left": len(result.left),
            "sqnr_to_simulation": result.sqnr,
            "bytes": result.bytes,
        }
        rows.append(row)
        print(row, flush=True)
    source = {
        "torch": torch.__version__,
        "threads": options.threads,
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    options.output.write_text(json.dumps(source, indent=1) + "\n")


if __name__ == "__main__":
    main()
