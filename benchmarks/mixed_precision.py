"""Mixed precision against uniform bits on digits and Fashion-MNIST: quality of the quantized nets at equal compression.

    python benchmarks/mixed_precision.py [--data digits --data fashion] [--seeds 3] [--trained]

Each seed trains a small residual network in float (its weights are kept under results/cache), and quantizes it,
weights and inputs of all layers, first and last included: uniformly at 3, 4, 5 and 8 bits, and with bits chosen by
HAWQ-v2 at the same compression. Compression is relative to 8 bits: of bit operations (multiplications times the larger
of the two numbers of bits) or of the size of the weights. Without training afterwards, everything else is the same for
all: 256 calibration pictures, clipped weights, corrected biases. ``--trained`` adds five epochs of LSQ.

Judged on test pictures: accuracy in percent, the Kullback-Leibler divergence of the float net's distribution, and the
signal to noise of the logits. A row is appended as soon as it is known; rows that are known are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

import dwindle as dw
from dwindle.quantization.mixed_precision import MixedPrecision, choose_bits, manual_bits
from dwindle.training import TrainingOptions, fit
from dwindle.zoo import BatchLoader, ImageData, digits, digits_resnet, fashion_mnist, fashion_resnet

RESULTS = Path(__file__).parent / "results"
ALL = range(2, 9)
FEW = (2, 4, 8)
CHOICES: dict[str, dict[str, Any]] = {
    "HAWQ-v2, 1.5x": {"ratio": 1.5, "bits": FEW, "activations": "liberal"},
    "HAWQ-v2, 1.5x, sensitive": {"ratio": 1.5, "bits": FEW, "activations": "sensitive"},
    "HAWQ-v2, 1.6x, sensitive": {"ratio": 1.6, "bits": ALL, "activations": "sensitive"},
    "HAWQ-v2, 2x, sensitive": {"ratio": 2.0, "bits": ALL, "activations": "sensitive"},
    "HAWQ-v2, 2x size, inputs 4": {"ratio": 2.0, "cost": "size", "bits": ALL, "activations": 4},
    "HAWQ-v2, 2.67x, sensitive": {"ratio": 8 / 3, "bits": ALL, "activations": "sensitive"},
    "HAWQ-v2, 2.67x size, inputs 3": {"ratio": 8 / 3, "cost": "size", "bits": ALL, "activations": 3},
}
UNIFORM = {f"uniform int{bits}": bits for bits in (8, 5, 4, 3)}
TRAINED = (
    "uniform int4",
    "HAWQ-v2, 2x, sensitive",
    "uniform int3",
    "HAWQ-v2, 2.67x, sensitive",
    "HAWQ-v2, 1.5x",
)


def data_of(name: str) -> tuple[ImageData, Callable[[], nn.Module], int, int]:
    """Return the data, what makes the net, epochs and batch size."""
    if name == "digits":
        return digits(), lambda: digits_resnet(widths=(16, 32, 64)), 12, 64
    return fashion_mnist().first(20000, 5000), lambda: fashion_resnet(widths=(16, 32, 64)), 4, 128


def float_net(name: str, seed: int) -> nn.Module:
    """Train a net, or read it from the cache."""
    data, make, epochs, batch = data_of(name)
    torch.manual_seed(seed)
    model = make()
    kept = RESULTS / "cache" / "mixed_precision" / f"{name}-{seed}.pt"
    if not kept.exists():
        loader = BatchLoader(data.train_images, data.train_labels, batch, shuffle=True, seed=seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=epochs * len(loader))
        options = TrainingOptions(schedule_every="step")
        fit(model, loader, optimizer, epochs=epochs, schedule=schedule, options=options)
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), kept)
    model.load_state_dict(torch.load(kept))
    return model.eval()


class Judge:
    """Compares nets with the float net on the test pictures."""

    def __init__(self, model: nn.Module, data: ImageData) -> None:
        self.data = data
        self.expected = self._logits(model)

    def _logits(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model(part) for part in self.data.test_images.split(250)])

    def __call__(self, model: nn.Module) -> dict[str, float]:
        logits = self._logits(model)
        noise = float((logits - self.expected).square().sum())
        divergence = nn.functional.kl_div(
            logits.log_softmax(-1), self.expected.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        return {
            "accuracy": 100 * float((logits.argmax(1) == self.data.test_labels).float().mean()),
            "agreement": 100 * float((logits.argmax(1) == self.expected.argmax(1)).float().mean()),
            "divergence": float(divergence),
            "sqnr_db": float(10 * torch.log10(self.expected.square().sum() / max(noise, 1e-30))),
        }


class Bits:
    """The bits of each method for one net; made once."""

    def __init__(self, model: nn.Module, data: ImageData, probes: int) -> None:
        self.model, self.data, self.probes = model, data, probes
        self.known: dict[str, MixedPrecision] = {}

    def __getitem__(self, method: str) -> MixedPrecision:
        if method not in self.known:
            parts = [slice(start, start + 16) for start in range(0, 256, 16)]
            batches = [(self.data.train_images[own], self.data.train_labels[own]) for own in parts]
            if method in UNIFORM:
                self.known[method] = manual_bits(self.model, batches[0][0], {"*": UNIFORM[method]})
            else:
                options = {"probes": self.probes, "weight_range": "mse", **CHOICES[method]}
                self.known[method] = choose_bits(self.model, batches, **options)
        return self.known[method]


def calibration(data: ImageData) -> list[torch.Tensor]:
    return list(data.train_images[:256].split(64))


def quantized(model: nn.Module, data: ImageData, found: MixedPrecision) -> nn.Module:
    """Quantize without training."""
    batches = calibration(data)
    return dw.quantize(model, batches, config_list=found.config_list, weight_range="mse", backend="layers")


def trained(model: nn.Module, data: ImageData, found: MixedPrecision, seed: int) -> nn.Module:
    """Five epochs of LSQ."""
    import copy

    from dwindle.quantization.aware_training import TrainingQuantizer

    own = copy.deepcopy(model).train()
    torch.manual_seed(seed)
    quantizer = TrainingQuantizer(
        own, found.config_list, calibration_data=calibration(data), method="lsq", backend="layers"
    )
    loader = BatchLoader(data.train_images, data.train_labels, 64, shuffle=True, seed=seed)
    optimizer = torch.optim.Adam(own.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5 * len(loader))
    options = TrainingOptions(schedule_every="step")
    fit(own, loader, optimizer, epochs=5, compressors=[quantizer], schedule=schedule, options=options)
    return own.eval()


def work(
    name: str, seed: int, rows: list[dict[str, Any]], path: Path, probes: int, with_training: bool
) -> None:
    """Make the missing rows of one seed."""
    wanted = [("none", own) for own in ("float", *UNIFORM, *CHOICES)]
    wanted += [("LSQ", own) for own in TRAINED] if with_training else []
    known = {(row["data"], row["seed"], row["training"], row["method"]) for row in rows}
    missing = [(training, own) for training, own in wanted if (name, seed, training, own) not in known]
    if not missing:
        return
    data = data_of(name)[0]
    model = float_net(name, seed)
    judge, bits = Judge(model, data), Bits(model, data, probes)
    for training, method in missing:
        started = time.process_time()
        row: dict[str, Any] = {"data": name, "seed": seed, "training": training, "method": method}
        if method == "float":
            row |= judge(model)
        else:
            found = bits[method]
            row |= {"compression": found.compression, "probes": found.probes, "settled": found.settled}
            row["bits"] = [list(own) for own in found.bits.values()]
            row |= judge(
                quantized(model, data, found) if training == "none" else trained(model, data, found, seed)
            )
        row["processor_seconds"] = round(time.process_time() - started, 1)
        print(
            name,
            seed,
            training,
            method,
            {key: row[key] for key in ("accuracy", "divergence", "sqnr_db")},
            flush=True,
        )
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown: means over seeds, and in how many seeds a choice beats its uniform rival."""
    lines = [
        "| data | training | method | bit operations | size | seeds | accuracy | KL divergence | SQNR |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["training"], row["method"]), []).append(row)
    order = ["float", *UNIFORM, *CHOICES]
    for (data, training, method), own in sorted(
        groups.items(), key=lambda item: (item[0][0], item[0][1] != "none", order.index(item[0][2]))
    ):
        mean = {
            key: statistics.mean(row[key] for row in own) for key in ("accuracy", "divergence", "sqnr_db")
        }
        ratios = [
            f"{statistics.mean(row['compression'][key] for row in own):.2f}x" if method != "float" else "-"
            for key in ("bit_operations", "size")
        ]
        rest = "- | -" if method == "float" else f"{mean['divergence']:.4f} | {mean['sqnr_db']:.1f} dB"
        lines.append(
            f"| {data} | {training} | {method} | {ratios[0]} | {ratios[1]} | {len(own)} | "
            f"{mean['accuracy']:.2f} | {rest} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "mixed_precision.jsonl")
    parser.add_argument("--data", choices=["digits", "fashion"], action="append")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--probes", type=int, default=100)
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--table", action="store_true", help="only print the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path: Path = arguments.output
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not arguments.table:
        for name in arguments.data or ["digits", "fashion"]:
            for seed in range(arguments.seeds):
                work(name, seed, rows, path, arguments.probes, arguments.trained)
    print(table(rows))


if __name__ == "__main__":
    main()
