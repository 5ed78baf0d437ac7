"""Training runs of tiny models that are alone, or spread over two processes, for the tests of many processes."""

from __future__ import annotations

import multiprocessing
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import dwindle as dw
from dwindle import simulate
from dwindle.distillation import Distiller
from dwindle.factorization import LowRankTraining
from dwindle.pruning import (
    AGPPruner,
    FPGMPruner,
    L1NormPruner,
    MagnitudePruner,
    MovementPruner,
    RandomPruner,
    RBPruner,
    RigLPruner,
    SlimPruner,
    SRSTEPruner,
    TaylorPruner,
)
from dwindle.quantization import QuantizationStages, TrainingQuantizer
from dwindle.training import CompressionRun, Staged, load_state, load_whole_state, save_state, whole_state

STEPS, BATCH = 8, 8
_IMPORTED = ["dwindle.pruning", "dwindle.quantization", "dwindle.distillation", "torch.distributed.fsdp"]
_IMPORTED += ["dwindle.realize", "dwindle.factorization"]
Make = Callable[[nn.Module], list[Any]]


class Network(nn.Module):
    """A convolution with its norm, a residual of two linear layers, and a head; 13 channels do not divide by two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 8, 3)
        self.norm = nn.BatchNorm1d(8).eval()
        self.block = nn.Sequential(nn.Linear(16, 13), nn.Tanh(), nn.Linear(13, 16))
        self.head = nn.Linear(16, 4)

    def train(self, mode: bool = True) -> Network:
        """Batch statistics of half a batch are others, so the norm keeps its own."""
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of ``x``, ``[batch, 2, 4]``."""
        y = functional.relu(self.norm(self.stem(x))).flatten(1)
        return self.head(y + self.block(y))


def network(seed: int = 1) -> Network:
    """Return the network with weights of this seed, in float64."""
    torch.manual_seed(seed)
    return Network().double().train()


def batches() -> list[tuple[Tensor, Tensor]]:
    """Return the batches of a run."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(STEPS, BATCH, 2, 4, generator=generator, dtype=torch.float64)
    return list(zip(x, torch.randint(0, 4, (STEPS, BATCH), generator=generator), strict=True))


NAMES = ["stem", "block.0", "block.2"]
WEIGHTS = [{"op_names": NAMES, "sparse_ratio": 0.5}]
CHANNELS = [{"op_names": NAMES, "sparse_ratio": 0.5, "granularity": "out_channel"}]
ELEMENTS = [{**WEIGHTS[0], "granularity": "element"}]
EXAMPLE = batches()[0][0]
HINT = [{"op_names": ["block.0"], "apply_method": "hint", "lambda": 0.5}]


def distiller(model: nn.Module) -> Distiller:
    """Return a distiller with a projection to learn."""
    torch.manual_seed(9)
    teacher = Network()
    teacher.block = nn.Sequential(nn.Linear(16, 11), nn.Tanh(), nn.Linear(11, 16))
    return Distiller(model, HINT, teacher=teacher.double(), logits_weight=1.0, example_inputs=EXAMPLE)


def quantizer(model: nn.Module, method: str, **options: Any) -> TrainingQuantizer:
    """Return a quantizer of 4 bits."""
    return TrainingQuantizer(model, calibration_data=[EXAMPLE], method=method, bits=4, **options)


WATCHED = QuantizationStages(activations=3, watch=2)

METHODS: dict[str, Make] = {
    "magnitude": lambda model: [AGPPruner(MagnitudePruner(model, WEIGHTS), 2, 3)],
    "channels": lambda model: [AGPPruner(L1NormPruner(model, CHANNELS, EXAMPLE), 2, 3)],
    "geometric median": lambda model: [AGPPruner(FPGMPruner(model, CHANNELS), 2, 3)],
    "random": lambda model: [AGPPruner(RandomPruner(model, ELEMENTS, seed=4), 2, 3)],
    "taylor": lambda model: [TaylorPruner(model, ELEMENTS, training_steps=4)],
    "taylor gates": lambda model: [TaylorPruner(model, CHANNELS, EXAMPLE, training_steps=4, on="gates")],
    "taylor outputs": lambda model: [TaylorPruner(model, CHANNELS, training_steps=4, on="outputs")],
    "movement": lambda model: [
        MovementPruner(model, WEIGHTS, training_steps=6, warmup_steps=1, learning_rate=0.5)
    ],
    "rb": lambda model: [RBPruner(model, WEIGHTS, training_steps=6, learning_rate=1.0)],
    "rigl": lambda model: [RigLPruner(model, WEIGHTS, training_steps=8, interval_steps=2, end_share=1.0)],
    "slim": lambda model: [SlimPruner(model, CHANNELS, training_steps=6, regular_scale=0.01)],
    "sr-ste": lambda model: [
        SRSTEPruner(model, [{**WEIGHTS[0], "op_names": ["block.0"]}], training_steps=6, decay=0.0)
    ],
    "qat": lambda model: [quantizer(model, "qat")],
    "lsq": lambda model: [quantizer(model, "lsq", stages=WATCHED)],
    "hint": lambda model: [distiller(model)],
    "low rank": lambda model: [
        LowRankTraining(
            model, [{"op_names": ["block.0"], "rank": 5}], example_inputs=EXAMPLE, training_steps=6, seed=2
        )
    ],
    "fusion": lambda model: [
        MovementPruner(model, WEIGHTS, training_steps=6, learning_rate=0.5),
        Staged(quantizer(model, "lsq"), start=2),
        distiller(model),
    ],
}

WRAPPINGS = ("ddp before", "ddp after", "shards before", "shards after")


def cut_up(model: nn.Module) -> nn.Module:
    """Apply ``fully_shard`` to the block and the rest."""
    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    fully_shard(model.block, mesh=mesh)  # type: ignore[arg-type]
    fully_shard(model, mesh=mesh)
    return model


def own_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are the model's own."""
    return [own for name, own in model.named_parameters() if simulate.RESERVED not in name.split(".")]


class Spread:
    """One run: a model with compressors, alone or wrapped.

    Args:
        make: Makes the compressors.
        wrapping: One of :data:`WRAPPINGS`; empty is alone, with whole batches.
    """

    def __init__(self, make: Make, wrapping: str = "") -> None:
        self.model = network()
        self.make, self.wrapping, self.wrapped = make, wrapping, None
        self.part = slice(None)
        if wrapping:
            half = BATCH // 2
            number = torch.distributed.get_rank()
            self.part = slice(number * half, number * half + half)
        self._wrap("before")
        self.compressors = make(self.model)
        self.run: CompressionRun = dw.compress(self.model, self.compressors)

    def _wrap(self, when: str) -> None:
        if self.wrapping == f"ddp {when}":
            self.wrapped = DistributedDataParallel(self.model)
        elif self.wrapping == f"shards {when}":
            cut_up(self.model)

    def start(self) -> None:
        """Everything behind entering the block."""
        self._wrap("after")
        self.optimizer = torch.optim.SGD(own_parameters(self.model), lr=0.2, momentum=0.5)
        self.run.add_parameters_to(self.optimizer)

    def step(self, number: int, *, clip: float | None = None) -> None:
        """Train on one batch."""
        x, y = batches()[number]
        self.optimizer.zero_grad()
        outputs = (self.wrapped or self.model)(x[self.part])
        (functional.cross_entropy(outputs, y[self.part]) + self.run.loss()).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_([*own_parameters(self.model), *self.run.parameters()], clip)
        self.optimizer.step()
        self.run.step()

    def found(self) -> dict[str, Tensor]:
        """Return copies of masks, own parameters, and everything in the model, whole."""
        seen = {f"own {number}": own for number, own in enumerate(self.run.parameters())}
        for module, masks in simulate.masks_as_nested(self.model).items():
            seen |= {f"mask {module}.{name}": mask for name, mask in masks.items()}
        seen |= simulate.gathered(self.model).state_dict()
        return {name: own.detach().clone() for name, own in seen.items()}

    def save(self, path: Path) -> None:
        """Write a checkpoint; the first process does, and all wait."""
        state = whole_state(self.run, [self.optimizer])
        if torch.distributed.get_rank() == 0:
            save_state(state, path)
        torch.distributed.barrier()

    def load(self, path: Path) -> None:
        """Read a checkpoint."""
        load_whole_state(self.run, load_state(path), [self.optimizer])


def trained(make: Make, wrapping: str = "", *, clip: float | None = None) -> tuple[Spread, dict[str, Tensor]]:
    """Train for all batches; return the run behind its block, and what was found at its end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few steps
        spread = Spread(make, wrapping)
        with spread.run:
            spread.start()
            for number in range(STEPS):
                spread.step(number, clip=clip)
                if number == 4:  # an evaluation, which leaves whole parameters in a model that is cut up
                    with torch.no_grad():
                        spread.model.eval()(batches()[0][0])
                    spread.model.train()
            found = spread.found()
    return spread, found


def free_port() -> int:
    """Return a port of this machine on which processes may meet."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def processes(target: Callable[..., None], *arguments: Any) -> list[Any]:
    """Start two processes that call ``target(number, port, *arguments)``.

    They are forked from a server that has imported torch and this project once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    port = free_port()
    started = [context.Process(target=target, args=(number, port, *arguments)) for number in (0, 1)]
    for process in started:
        process.start()
    return started


def exit_codes(started: list[Any], seconds: float = 600.0) -> list[int | None]:
    """Wait for processes; return their exit codes, None for those that hang (they are ended)."""
    for process in started:
        process.join(seconds)
    codes = [process.exitcode for process in started]
    for process in started:
        if process.is_alive():
            process.kill()
    return codes
