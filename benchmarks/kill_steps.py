"""A training run that is killed (SIGKILL) at random steps and taken up again, against the same run undisturbed.

    python benchmarks/kill_steps.py [--kills 10] [--seed 0]

Taylor pruning on a schedule, LSQ that begins in the second epoch and a teacher that stops, on scikit-learn's digits;
the state is kept after every step. All losses and all final weights must have the same bits.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

EPOCHS, BATCH = 6, 256


class Kill:
    """A compressor that kills its own process at one step."""

    def __init__(self, at: int) -> None:
        self.at, self.steps = at, 0

    def step(self) -> None:
        """Count, and end everything."""
        self.steps += 1
        if self.steps == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def loss(self) -> float:
        """Add nothing."""
        return 0.0

    def parameters(self) -> Any:
        """Have none."""
        return iter(())

    def state_dict(self) -> dict[str, int]:
        """Return the steps."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on counting."""
        self.steps = state["steps"]


def train(folder: Path, kill_at: int) -> None:
    """Train, or go on; write the losses and the weights at the end."""
    import torch
    from safetensors.torch import save_file

    from dwindle import zoo
    from dwindle.distillation import Distiller
    from dwindle.pruning import AGPPruner, TaylorPruner
    from dwindle.quantization import TrainingQuantizer
    from dwindle.training import Staged, TrainingOptions, fit

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, data = zoo.digits_resnet(), zoo.digits()
    example = data.train_images[:8]
    loader = zoo.BatchLoader(
        data.train_images, data.train_labels, BATCH, shuffle=True, augment=zoo.random_shift
    )
    taylor = TaylorPruner(
        model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], example_inputs=(example[:1],)
    )
    compressors = [
        AGPPruner(taylor, interval_steps=2, total_times=6),
        Staged(TrainingQuantizer(model, calibration_data=[example], method="lsq"), start=1, unit="epoch"),
        Staged(Distiller(model, teacher=copy.deepcopy(model)), stop=EPOCHS - 1, unit="epoch"),
        Kill(kill_at),
    ]
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    steps = EPOCHS * len(loader)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    result = fit(
        model,
        loader,
        optimizer,
        epochs=EPOCHS,
        schedule=schedule,
        compressors=compressors,
        options=TrainingOptions(seed=0, progress=False),
        checkpoint=folder / "state.safetensors",
        checkpoint_every=1,
    )
    weights = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    save_file({**weights, "losses": torch.tensor(result.losses, dtype=torch.float64)}, folder / "end")


def start(folder: Path, kill_at: int) -> int:
    """Train in a process of its own; return how it ended."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--folder", str(folder), "--kill-at", str(kill_at)]
    return subprocess.run(command, check=False, capture_output=True).returncode


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kill-at", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        train(options.folder, options.kill_at)
        return
    import torch
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as place:
        whole, broken = Path(place) / "whole", Path(place) / "broken"
        assert start(whole, 0) == 0
        expected = load_file(whole / "end")
        steps = len(expected["losses"])
        for step in sorted(random.Random(options.seed).sample(range(1, steps + 1), options.kills)):
            ended = start(broken, step)
            print(f"killed at step {step} of {steps}: exit status {ended}", flush=True)
            assert ended == -signal.SIGKILL
        assert start(broken, 0) == 0
        found = load_file(broken / "end")
        different = [name for name in expected if not torch.equal(expected[name], found[name])]
        print(f"{steps} losses and {len(expected) - 1} tensors, of which {len(different)} differ {different}")
        sys.exit(bool(different) or expected.keys() != found.keys())


if __name__ == "__main__":
    main()
