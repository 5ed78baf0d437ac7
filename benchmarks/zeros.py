"""What zeros bring, and where they bring nothing: one linear layer in every layout and runtime; sizes of files.

    python benchmarks/zeros.py [--output benchmarks/results/zeros.json]

A layer of 768 inputs and 3,072 outputs with zeros (scattered, 2:4, in blocks of 16) runs as it is and in torch's CSR
and BSR layouts, for batches of 1, 16 and 128; two such layers with a ReLU between them run in ONNX Runtime and OpenVINO
with and without zeros. The forms take turns; figures are medians of the processor time of one thread, so that other
programs on the machine do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

import dwindle as dw
from dwindle.realize import SparseLinear

SHAPE = (3072, 768)
BATCHES = (1, 16, 128)


def scattered(share: float) -> Tensor:
    """1 where a weight stays, of single weights."""
    return (torch.rand(SHAPE) >= share).float()


def blocks(share: float, side: int = 16) -> Tensor:
    """1 where a weight stays, of square blocks."""
    keep = (torch.rand(SHAPE[0] // side, SHAPE[1] // side) >= share).float()
    return keep.repeat_interleave(side, 0).repeat_interleave(side, 1)


def two_of_four() -> Tensor:
    """1 where a weight stays, two of every four neighbours."""
    places = torch.rand(SHAPE[0], SHAPE[1] // 4, 4).argsort(-1)[..., :2]
    return torch.zeros(SHAPE[0], SHAPE[1] // 4, 4).scatter_(-1, places, 1.0).reshape(SHAPE)


KINDS: dict[str, Callable[[], Tensor]] = {
    "none": lambda: torch.ones(SHAPE),
    "2:4": two_of_four,
    **{f"{share:.0%} scattered": (lambda share=share: scattered(share)) for share in (0.5, 0.8, 0.9, 0.95, 0.99)},
    **{f"{share:.0%} in blocks of 16": (lambda share=share: blocks(share)) for share in (0.5, 0.8, 0.9)},
}  # fmt: skip


def processor_time(forms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median processor time of each form in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 2):
        for name, run in forms.items():
            begin = time.process_time()
            run()
            if number > 1:
                times[name].append((time.process_time() - begin) * 1e3)
    return {name: statistics.median(own) for name, own in times.items()}


def layouts(rounds: int) -> list[dict[str, Any]]:
    """One layer in torch."""
    rows = []
    for kind, mask in KINDS.items():
        layer = nn.Linear(SHAPE[1], SHAPE[0])
        with torch.no_grad():
            layer.weight.mul_(mask())
        own: dict[str, nn.Module] = {"dense": layer}
        if kind != "none":
            own["csr"] = SparseLinear(layer.weight, layer.bias)
        if "blocks" in kind:
            own["bsr16"] = SparseLinear(layer.weight, layer.bias, layout="bsr", block=16)
        for batch in BATCHES:
            x = torch.randn(batch, SHAPE[1])
            forms = {name: (lambda form=form, x=x: form(x)) for name, form in own.items()}
            rows.append({"zeros": kind, "batch": batch, "ms": processor_time(forms, rounds)})
            print(rows[-1], flush=True)
    return rows


def runtimes(rounds: int) -> list[dict[str, Any]]:
    """Two layers in ONNX Runtime and OpenVINO, with one thread each."""
    import onnxruntime
    import openvino

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    x = torch.randn(BATCHES[-1], SHAPE[1])
    forms: dict[str, Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("none", "2:4", "90% scattered", "90% in blocks of 16"):
            model = nn.Sequential(
                nn.Linear(SHAPE[1], SHAPE[0]), nn.ReLU(), nn.Linear(SHAPE[0], SHAPE[1])
            ).eval()
            with torch.no_grad():
                mask = KINDS[kind]()
                model[0].weight.mul_(mask)
                model[2].weight.mul_(mask.t())
            path = Path(folder) / f"{len(forms)}.onnx"
            dw.export(model, path, example_inputs=(x,))
            session = onnxruntime.InferenceSession(path, options)
            name = session.get_inputs()[0].name
            forms[f"ONNX Runtime, {kind}"] = lambda own=session, name=name: own.run(None, {name: x.numpy()})
            compiled = openvino.Core().compile_model(
                str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
            )
            forms[f"OpenVINO, {kind}"] = lambda own=compiled: own([x.numpy()])
        times = processor_time(forms, rounds)
    rows = []
    for name, ms in times.items():
        runtime, kind = name.split(", ", 1)
        rows.append({"runtime": runtime, "zeros": kind, "ms": ms})
        print(rows[-1], flush=True)
    return rows


def files() -> list[dict[str, Any]]:
    """Bytes of a saved layer, over those without any zero."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, mask) in enumerate(KINDS.items()):
            layer = nn.Linear(SHAPE[1], SHAPE[0])
            with torch.no_grad():
                layer.weight.mul_(mask())
            place = dw.save(layer, Path(folder) / str(number))
            rows.append({"zeros": kind, "bytes": (place / "model.safetensors").stat().st_size})
            print(rows[-1], flush=True)
    return rows


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def markdown(results: dict[str, Any]) -> str:
    """The tables of ``docs/zeros.md``."""
    by_kind: dict[str, dict[int, dict[str, float]]] = {}
    for row in results["layouts"]:
        by_kind.setdefault(row["zeros"], {})[row["batch"]] = row["ms"]
    speed = []
    for kind, batches in by_kind.items():
        for form in next(iter(batches.values())):
            if form != "dense":
                gains = [f"{batches[batch]['dense'] / batches[batch][form]:.2f}" for batch in BATCHES]
                speed.append([kind, form, *gains])
    runs: dict[str, dict[str, float]] = {}
    for row in results["runtimes"]:
        runs.setdefault(row["zeros"], {})[row["runtime"]] = row["ms"]
    names = ["ONNX Runtime", "OpenVINO"]
    gains = [[kind, *(f"{runs['none'][own] / ms[own]:.2f}" for own in names)] for kind, ms in runs.items()]
    whole = next(row["bytes"] for row in results["files"] if row["zeros"] == "none")
    sizes = [[row["zeros"], f"{row['bytes'] / whole:.3f}"] for row in results["files"]]
    return "\n\n".join(
        [
            table(["zeros", "layout", *(f"batch {batch}" for batch in BATCHES)], speed),
            table(["zeros", *names], gains),
            table(["zeros", "file"], sizes),
        ]
    )


def write_page(results: dict[str, Any]) -> None:
    """Put the tables between the two marks of the page."""
    page = Path(__file__).parent.parent / "docs" / "zeros.md"
    begin, end = "<!-- tables: benchmarks/zeros.py -->", "<!-- end of tables -->"
    before, _, rest = page.read_text().partition(begin)
    page.write_text(f"{before}{begin}\n{markdown(results)}\n{end}{rest.partition(end)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "zeros.json")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.no_grad():
        results = {
            "torch": torch.__version__,
            "processor": platform.machine(),
            "shape": list(SHAPE),
            "layouts": layouts(options.rounds),
            "runtimes": runtimes(options.rounds),
            "files": files(),
        }
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    write_page(results)


if __name__ == "__main__":
    main()
