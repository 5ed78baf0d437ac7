"""Time of one training step with quantizers against the same step in float, taken in turn.

    python benchmarks/training_step.py                         rows in benchmarks/results/training_step.json
    python benchmarks/training_step.py --models resnet18 --methods qat

Batch 8 of 224 x 224, SGD with momentum, one thread unless --threads says otherwise. CPU time of the process, medians
and ratios to float; NNCF's quantized model stands beside where ``nncf`` is installed.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests")]


def models(name: str) -> Any:
    """Return an untrained model of torchvision."""
    from support import torchvision_shim

    torchvision_shim.install()
    import torchvision

    return torchvision.models.get_model(name, weights=None)


def quantized(model: Any, method: str, images: Any) -> Any:
    """Return a copy that trains with quantizers: dwindle's of a method, or NNCF's."""
    import torch

    own = copy.deepcopy(model).train()
    if method == "float":
        return own
    if method == "nncf":
        import nncf

        data = nncf.Dataset([images[:2]])
        return nncf.quantize(own.eval(), data, subset_size=1, fast_bias_correction=True).train()
    from dwindle.quantization import TrainingQuantizer

    TrainingQuantizer(own, calibration_data=[images[:2]], method=method).attach()
    torch.manual_seed(0)
    return own


def stepper(model: Any, images: Any, labels: Any) -> Callable[[], None]:
    """Return one step of training."""
    import torch

    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--methods", nargs="*", default=["qat", "lsq", "nncf"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "training_step.json")
    options = parser.parse_args()
    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.models:
        torch.manual_seed(0)
        model, images, labels = models(name), torch.randn(8, 3, 224, 224), torch.randint(0, 1000, (8,))
        steps = {}
        for method in ("float", *options.methods):
            try:
                steps[method] = stepper(quantized(model, method, images), images, labels)
            except ImportError as error:
                print(f"{method}: {error}")
        times: dict[str, list[float]] = {method: [] for method in steps}
        for number in range(options.rounds + 2):
            for method, step in steps.items():
                begin = time.process_time()
                step()
                if number > 1:
                    times[method].append(time.process_time() - begin)
        medians = {method: statistics.median(own) for method, own in times.items()}
        for method, seconds in medians.items():
            pairs = zip(times[method], times["float"], strict=True)
            row = {"model": name, "method": method, "seconds": seconds, "ratio": seconds / medians["float"]}
            row["median_of_ratios"] = statistics.median(own / base for own, base in pairs)
            rows.append(row)
            print(f"{name:14} {method:8} {seconds:.3f} s  {row['ratio']:.2f} of float", flush=True)
    source = {
        "torch": torch.__version__,
        "threads": options.threads,
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    options.output.write_text(json.dumps(source, indent=1) + "\n")


if __name__ == "__main__":
    main()
