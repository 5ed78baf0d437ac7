"""Packed binary layers against float ones, and binary networks on handwritten digits and Fashion-MNIST.

    python benchmarks/binary.py [--output benchmarks/results/binary.json] [--part layers|fashion|digits] [--rounds 15]

Layers: a packed layer, which takes float inputs and makes them binary itself, and torch's float layer of the same sizes
take turns; figures are medians of the processor time of one thread, so that other programs on the machine do not count.
Each packed result is first compared with the float product of the same signs: they are equal to the bit.

Networks: a small residual network is trained in float; then the same trained network is made binary (all but its
first and last layer; Hardtanh in place of ReLU for the two methods with signs) at once and in stages: inputs, a quarter
of the steps later weights, from half of the steps on a falling learning rate (``kept``: the same with an optimizer that
does not begin anew with each stage). ``scratch`` is at once without the float network, which is the first of the four
stages: binary from the first step on, with the steps of both trainings. All have the same number of steps, the
same learning rates and the same order of pictures. Results are kept after each network; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from dwindle.quantization import BinaryQuantizer, BinaryStages
from dwindle.realize import PackedBinaryConv2d, PackedBinaryLinear
from dwindle.training import TrainingOptions, accuracy, fit
from dwindle.zoo import BatchLoader, ImageData, digits, fashion_mnist, residual_network

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
    (1, 128, 128, 28, 3, 1, 128),
    (1, 64, 64, 56, 3, 1, 64),
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


@dataclass(frozen=True)
class Task:
    """What a network learns, and how long.

    Attributes:
        load: Gives the data.
        pictures: Of the training set that are used; None takes all.
        stem_stride: Of the network.
        batch: Pictures of a batch.
        float_epochs: Of the float network.
        epochs: Of the binary network, in addition.
    """

    load: Callable[[], ImageData]
    pictures: int | None
    stem_stride: int
    batch: int
    float_epochs: int
    epochs: int


TASKS = {
    "fashion": Task(fashion_mnist, 6000, 4, 100, 6, 10),
    "digits": Task(digits, None, 1, 64, 10, 20),
}
RATE = 2e-3
WAYS = ("float", "scratch", "once", "four", "kept")


def new_network(task: str, signs: bool, seed: int) -> nn.Module:
    """Return a network with random weights."""
    torch.manual_seed(seed)
    model = residual_network((16, 32, 64), stem_stride=TASKS[task].stem_stride)
    if signs:  # signs need inputs of both signs
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.ReLU):
                parent, _, key = name.rpartition(".")
                setattr(model.get_submodule(parent), key, nn.Hardtanh())
    return model


def float_network(task: str, signs: bool, seed: int) -> nn.Module:
    """Return a trained float network; made once and kept."""
    own, data, model = TASKS[task], loaded(task), new_network(task, signs, seed)
    path = (
        Path(__file__).parent
        / "results"
        / "cache"
        / "binary"
        / f"{task}_{'signs' if signs else 'relu'}_{seed}.pt"
    )
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model
    loader = batches(task, data, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    stages = BinaryStages(0, 0, own.float_epochs * len(loader) // 2, own.float_epochs * len(loader))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, stages.learning_rate_factor)
    options = TrainingOptions(schedule_every="step", seed=seed)
    fit(model, loader, optimizer, epochs=own.float_epochs, schedule=schedule, options=options)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model


@functools.cache
def loaded(task: str) -> ImageData:
    """Return the data of a task."""
    return TASKS[task].load()


def batches(task: str, data: ImageData, seed: int) -> BatchLoader:
    """Return the training pictures of a task."""
    count = TASKS[task].pictures
    return BatchLoader(
        data.train_images[:count], data.train_labels[:count], TASKS[task].batch, shuffle=True, seed=seed
    )


def binary_network(task: str, method: str, how: str, seed: int) -> nn.Module:
    """Return a trained float network that was made binary, ``how`` being one of :data:`WAYS` but the first."""
    data, (weights, activations) = loaded(task), METHODS[method]
    make = new_network if how == "scratch" else float_network
    model = make(task, activations in ("bireal", "bnn"), seed)
    loader = batches(task, data, seed + 1000)
    epochs = TASKS[task].epochs + (TASKS[task].float_epochs if how == "scratch" else 0)
    steps, falling = epochs * len(loader), TASKS[task].epochs * len(loader) // 2
    # The float network is the first stage; one step more shows the inputs that scales are taken from.
    first, second = (1, steps // 4) if how in ("four", "kept") else (0, 0)
    quantizer = BinaryQuantizer(
        model,
        [{"op_types": ["Conv2d"], "exclude_op_names": ["stem"], "quant_dtype": "int1"}],
        weights=weights,
        activations=activations,
        stages=BinaryStages(first, second, steps - falling, steps),
        example_inputs=data.train_images[: TASKS[task].batch],
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    quantizer.follow(optimizer, restart=how != "kept")
    options = TrainingOptions(seed=seed)
    fit(model, loader, optimizer, epochs=epochs, compressors=[quantizer], options=options)
    if not all(own.started for own in quantizer.simulators.values()):
        raise SystemExit(f"{method} {how}: something is still float")
    return model


def right(task: str, model: nn.Module) -> float:
    """Return the test accuracy in percent."""
    data = loaded(task)
    model.eval()
    with torch.no_grad():
        return 100 * float(accuracy(model, [(data.test_images, data.test_labels)]))


def networks(
    rows: list[dict[str, Any]], task: str, methods: list[str], ways: list[str], seeds: int
) -> Iterator[None]:
    """Train in float, at once and in stages; stop after each new row. Known rows are not made again."""
    for seed in range(seeds):
        for method in methods:
            for how in ways:
                key: dict[str, Any] = {
                    "task": task,
                    "method": method,
                    "stages": how,
                    "epochs": TASKS[task].epochs,
                    "seed": seed,
                }
                if any(key.items() <= row.items() for row in rows):
                    continue
                if how == "float":
                    model = float_network(task, METHODS[method][1] in ("bireal", "bnn"), seed)
                else:
                    model = binary_network(task, method, how, seed)
                key["accuracy"] = right(task, model)
                print(f"{task} {method:7s} {how:5s} seed {seed} {key['accuracy']:6.2f} %", flush=True)
                rows.append(key)
                yield


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "binary.json")
    parser.add_argument("--part", choices=["layers", *TASKS], action="append")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=["xnor", "dorefa", "bireal"])
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS[:4]))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts = arguments.part or ["layers", *TASKS]
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    results["machine"] = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    if "layers" in parts:
        with torch.no_grad():
            results["layers"] = layers(arguments.rounds)
    for task in (name for name in TASKS if name in parts):
        known = results.setdefault("networks", [])
        for _ in networks(known, task, arguments.methods, arguments.ways, arguments.seeds):
            write(arguments.output, results)
    write(arguments.output, results)


def write(path: Path, results: dict[str, Any]) -> None:
    """Write what is known so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
