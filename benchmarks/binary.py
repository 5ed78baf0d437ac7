"""Packed binary layers against float ones, and binary networks on handwritten digits.

    python benchmarks/binary.py [--output benchmarks/results/binary.json] [--part layers|digits] [--rounds 15]

Layers: a packed layer, which takes float inputs and makes them binary itself, and torch's float layer of the same sizes
take turns; figures are medians of the processor time of one thread, so that other programs on the machine do not count.
Each packed result is first compared with the float product of the same signs: they are equal to the bit.

Digits: a small residual network is trained in float and with binary weights and inputs (all but the first and last
layer; Hardtanh in place of ReLU for the two methods with signs), once at once and once in four stages, with the
same number of steps, for several seeds. Results are kept after each network; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from dwindle.quantization import BinaryQuantizer, BinaryStages
from dwindle.realize import PackedBinaryConv2d, PackedBinaryLinear
from dwindle.training import TrainingOptions, accuracy, fit
from dwindle.zoo import BatchLoader, digits, digits_resnet

#: Batch, inputs, outputs.
LINEARS = [(1, 256, 256), (1, 1024, 1024), (1, 4096, 4096), (16, 1024, 1024), (128, 768, 3072)]

#: Batch, channels, outputs, side of the image, kernel, stride, groups.
CONVOLUTIONS = [
    (1, 64, 64, 56, 3, 1, 1),
    (1, 128, 128, 28, 3, 1, 1),
    (1, 256, 256, 14, 3, 1, 1),
    (1, 512, 512, 7, 3, 1, 1),
    (1, 128, 256, 28, 3, 2, 1),
    (1, 256, 256, 14, 1, 1, 1),
    (1, 256, 256, 14, 3, 1, 256),
    (8, 128, 128, 28, 3, 1, 1),
]

#: Weights and activations of one method.
METHODS = {
    "xnor": ("xnor", "scale_threshold"),
    "dorefa": ("dorefa", "dorefa"),
    "bireal": ("bireal", "bireal"),
    "bnn": ("bnn", "bnn"),
}


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


def signs(*shape: int) -> Tensor:
    """Random signs, int8."""
    return torch.where(torch.rand(shape) < 0.5, 1, -1).to(torch.int8)


def compare(
    kind: str, sizes: tuple[int, ...], plain: nn.Module, packed: nn.Module, x: Tensor, rounds: int
) -> dict[str, Any]:
    """Check one packed layer and time it beside its float twin."""
    binary = torch.where(x >= 0, 1.0, -1.0)
    if not torch.equal(plain(binary), packed(x)):
        raise SystemExit(f"{kind} {sizes}: the packed result is not the float one")
    times = processor_time({"float": lambda: plain(x), "packed": lambda: packed(x)}, rounds)
    size = sum(own.numel() * own.element_size() for own in packed.buffers())
    row = {
        "kind": kind,
        "sizes": list(sizes),
        "float_ms": times["float"],
        "packed_ms": times["packed"],
        "gain": times["float"] / times["packed"],
        "bytes": [4 * plain.get_parameter("weight").numel(), size],
    }
    print(
        f"{kind:6s} {sizes!s:32s} {times['float']:8.3f} ms {times['packed']:8.3f} ms  {row['gain']:5.2f}x",
        flush=True,
    )
    return row


def layers(rounds: int) -> list[dict[str, Any]]:
    """Time all layers."""
    rows = []
    for batch, inputs, outputs in LINEARS:
        weight = signs(outputs, inputs)
        linear = nn.Linear(inputs, outputs, bias=False)
        linear.weight.data.copy_(weight)
        packed = PackedBinaryLinear(weight, torch.ones(outputs), None, torch.zeros(inputs))
        rows.append(
            compare("linear", (batch, inputs, outputs), linear, packed, torch.randn(batch, inputs), rounds)
        )
    for batch, channels, outputs, side, kernel, stride, groups in CONVOLUTIONS:
        pad = kernel // 2
        conv = nn.Conv2d(channels, outputs, kernel, stride, pad, groups=groups, bias=False)
        weight = signs(*conv.weight.shape)
        conv.weight.data.copy_(weight)
        packed_conv = PackedBinaryConv2d(
            weight,
            torch.ones(outputs),
            None,
            torch.zeros(channels),
            stride=(stride, stride),
            padding=(pad, pad, pad, pad),
            groups=groups,
        )
        x = torch.randn(batch, channels, side, side)
        sizes = (batch, channels, outputs, side, kernel, stride, groups)
        rows.append(compare("conv2d", sizes, conv, packed_conv, x, rounds))
    return rows


def train(method: str | None, stages: str, epochs: int, seed: int) -> tuple[nn.Module, float]:
    """Train one network; return it with its test accuracy in percent."""
    data = digits()
    torch.manual_seed(seed)
    model = digits_resnet(widths=(16, 32, 64))
    if method in ("bireal", "bnn"):  # signs need inputs of both signs
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.ReLU):
                parent, _, key = name.rpartition(".")
                setattr(model.get_submodule(parent), key, nn.Hardtanh())
    loader = BatchLoader(data.train_images, data.train_labels, 64, shuffle=True, seed=seed)
    steps = epochs * len(loader)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    compressors = []
    plan = BinaryStages.over(steps)
    if method is not None:
        config = [{"op_types": ["Conv2d"], "exclude_op_names": ["stem"], "quant_dtype": "int1"}]
        compressors.append(
            BinaryQuantizer(
                model,
                config,
                weights=METHODS[method][0],
                activations=METHODS[method][1],
                stages=plan if stages == "four" else BinaryStages(),
                example_inputs=data.train_images[:64],
            )
        )
    # The same fall of the learning rate for all: what differs is only when what becomes binary.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, plan.learning_rate_factor)
    options = TrainingOptions(schedule_every="step")
    fit(model, loader, optimizer, epochs=epochs, compressors=compressors, schedule=schedule, options=options)
    model.eval()
    with torch.no_grad():
        right = float(accuracy(model, [(data.test_images, data.test_labels)]))
    return model, right * 100


def digits_networks(rows: list[dict[str, Any]], epochs: int, seeds: int) -> Iterator[None]:
    """Train in float, at once and in four stages; stop after each new row. Known rows are not made again."""
    for method, stages in [("float", ""), *((own, how) for own in METHODS for how in ("once", "four"))]:
        for seed in range(seeds):
            key = {"method": method, "stages": stages, "epochs": epochs, "seed": seed}
            if any(key.items() <= row.items() for row in rows):
                continue
            key["accuracy"] = train(None if method == "float" else method, stages, epochs, seed)[1]
            print(f"{method:7s} {stages:5s} seed {seed} {key['accuracy']:6.2f} %", flush=True)
            rows.append(key)
            yield


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "binary.json")
    parser.add_argument("--part", choices=["layers", "digits"], action="append")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts = arguments.part or ["layers", "digits"]
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    results["machine"] = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    if "layers" in parts:
        with torch.no_grad():
            results["layers"] = layers(arguments.rounds)
    if "digits" in parts:
        known = results.setdefault("digits", [])
        for _ in digits_networks(known, arguments.epochs, arguments.seeds):
            write(arguments.output, results)
    write(arguments.output, results)


def write(path: Path, results: dict[str, Any]) -> None:
    """Write what is known so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
