"""Writes ``docs/int8.md`` from the results of ``benchmarks/int8.py``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MAKERS = ("dwindle", "nncf", "onnxruntime")
RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "emulated": "float arithmetic"}
_NAMES = {"dwindle": "dwindle", "nncf": "NNCF 3.4", "onnxruntime": "ONNX Runtime static"}

_INTRODUCTION = """\
# Int8, side by side

Made by `benchmarks/int8.py`, which says how; do not edit by hand. The same float model and calibration samples go
to dwindle, to NNCF's `quantize` and to ONNX Runtime's static quantization; other samples judge the files.
dwindle places quantizers for the runtime (`backend="onnxruntime"` or `"openvino"`), NNCF has a backend for each.
EfficientNet-Lite0 (ImageNet weights) sees photographs, MiniLM sentences padded to 64 tokens, judged by their
embeddings. The others have random weights: what counts there is the signal to noise.
"""

_SATURATION = """\
Processors without VNNI (AVX2 alone, and AVX-512 without it) multiply uint8 by int8 with an instruction that
saturates in 16 bits. dwindle scales weights so that this cannot happen (`avoid_saturation`, its default); the other
two do so nowhere or in the first layer alone by default, and lose much on such machines. *Float arithmetic* is the
file in ONNX Runtime without its optimizations: what it would give where nothing saturates. Each row says in the
results whether its machine had VNNI.
"""

_PARITY = """\
*Agreement* is the share of samples whose answer is the same as in float: the largest output, and for MiniLM the nearest
of 1,024 stored sentences, many of which are nearly equally near (*classes*: praise or blame, which a linear classifier
tells by the embedding). *Parity* compares the file in the runtime with dwindle's simulation (200 dB: the same bits),
and its second figure is the share of equal answers. Convolutional networks give the same bits, since int8 kernels and
the simulation sum whole numbers and scales are chosen so that no rounding is a near thing; a transformer's norms,
softmax and GELU are computed in float, by other formulas in each runtime, and a value near a half may fall either way.
"""

_SPEED = """\
## Milliseconds, batch 1, one thread

Processor time, medians, all files of a runtime taking turns. The ratio is dwindle's to the faster of the other two
(1.03 is the bar). *f32* and *default* are what OpenVINO computes float operations in: the default is bfloat16 on
processors that have it. The load beside each row is the machine's while it was measured; a machine with other work
makes figures rough.
"""


_SEEDED = "mobilenetv3_small_050"

_STAND_INS = """\
## Squeeze-excite and hard-swish

Five stand-ins of mobilenetv3_small_050, each with random weights of another seed, against NNCF's default.
"""


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _quality(rows: dict[str, dict[str, Any]]) -> str:
    found = []
    for name, row in rows.items():
        if not name.startswith("quality "):
            continue
        _, model, maker = name.split()
        if "_seed_" in model:
            continue
        if "failed" in row:
            found.append([model, _NAMES[maker], "", row["failed"].replace("|", "/"), "", "", "", ""])
        for runtime, title in RUNTIMES.items():
            if runtime not in row:
                continue
            own = row[runtime]
            parity = (
                f"{own['parity_sqnr_db']:.1f} dB, {own['parity_agreement']:.1%}"
                if "parity_sqnr_db" in own
                else ""
            )
            if "parity_classes" in own:
                parity += f" (classes {own['parity_classes']:.1%})"
            classes = f" (classes {own['classes']:.1%})" if "classes" in own else ""
            figures = [
                f"{own['sqnr_db']:.2f} dB",
                f"{own['agreement']:.1%}{classes}",
                f"{own['cosine']:.4f}",
                f"{own['bytes'] / 1e6:.2f} MB",
            ]
            found.append([model, _NAMES[maker], title, *figures, parity])
    head = ["model", "maker", "runtime", "signal to noise", "agreement", "cosine", "size", "parity"]
    return _table(head, found)


def _stand_ins(rows: dict[str, dict[str, Any]]) -> str:
    """Signal to noise of all stand-ins of one architecture, and what dwindle's is above NNCF's."""
    models = [
        name.split()[1]
        for name in rows
        if name.startswith("quality ") and name.split()[1].startswith(_SEEDED)
    ]
    models = [model for model in sorted(set(models)) if f"quality {model} nncf" in rows]
    found = []
    for runtime in ("onnxruntime", "openvino"):
        gains = []
        for number, model in enumerate(models):
            mine, theirs = (
                rows[f"quality {model} {maker}"][runtime]["sqnr_db"] for maker in ("dwindle", "nncf")
            )
            gains.append(mine - theirs)
            found.append(
                [RUNTIMES[runtime], str(number), f"{mine:.2f} dB", f"{theirs:.2f} dB", f"{gains[-1]:+.2f} dB"]
            )
        mean = (
            f"**{statistics.mean(gains):+.2f} dB** (median {statistics.median(gains):+.2f})" if gains else ""
        )
        found.append([RUNTIMES[runtime], "mean", "", "", mean])
    return _table(["runtime", "seed", "dwindle", "NNCF 3.4", "gain"], found)


def _speed(rows: dict[str, dict[str, Any]]) -> str:
    found = []
    for name, row in rows.items():
        if not name.startswith("speed "):
            continue
        _, model, runtime, precision = name.split()
        times = row["processor_ms"]
        ratio = times["dwindle"] / min(times["nncf"], times["onnxruntime"])
        place = RUNTIMES[runtime] + (f", {precision}" if runtime == "openvino" else "")
        own = [f"{times[maker]:.2f}" for maker in (*MAKERS, "float")]
        found.append([model, place, *own, f"{ratio:.2f}", f"{row['load']:.1f}"])
    head = ["model", "runtime", *(_NAMES[maker] for maker in MAKERS), "float", "ratio", "load"]
    return _table(head, found)


def write_page(results: Path, page: Path) -> None:
    """Write the page.

    Args:
        results: JSON lines of the benchmark; of rows of one name the last one counts.
        page: The Markdown file, which is replaced.
    """
    rows = _rows(results)
    page.write_text(
        "\n".join(
            [
                _INTRODUCTION,
                _quality(rows),
                _PARITY,
                _SATURATION,
                _STAND_INS,
                _stand_ins(rows),
                _SPEED,
                _speed(rows),
            ]
        )
    )
