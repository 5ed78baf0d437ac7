"""Reconstruction: roundings are learned so that a layer (AdaRound) or a block (BRECQ) gives what it gave in float.

AdaRound (Nagel et al. 2020, arXiv 2004.10568) learns layer after layer, BRECQ (Li et al. 2021, arXiv 2102.05426) block
after block; both with the inputs that the quantized part before really gives and the outputs of the float model, a few
hundred samples without labels, and the rounding variables of :mod:`dwindle.quantization.rounding`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, DwindleError, did_you_mean
from dwindle.quantization.calls import CallKey, EnterModule, LeaveModule, ModulePath
from dwindle.quantization.levels import fake_quantize, spread_over
from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.reconstruction_blocks import (
    ReconstructionBlock,
    Sample,
    find_blocks,
    own_weights,
    run_block,
    samples_of,
    split_inputs,
)
from dwindle.quantization.rounding import (
    annealed_beta,
    hard_weight,
    initial_variables,
    rounding_regularizer,
    soft_weight,
)
from dwindle.quantization.simulation import PlacedMode, Simulation, SimulationMode, WeightSlot
from dwindle.training.inputs import Inputs
from dwindle.training.progress import tracked


@dataclass(frozen=True)
class Reconstruction:
    """How roundings are learned.

    Attributes:
        blocks: Learn whole blocks together (BRECQ); each layer by itself otherwise (AdaRound).
        steps: Steps of Adam for each block. The papers take 10,000 to 20,000; most of the gain comes early.
        learning_rate: Of Adam.
        batch_size: Samples of a step.
        regularization: Weight of the regularizer.
        warmup: Share of the steps without regularizer.
        seed: Of the order of the samples.
    """

    blocks: bool = False
    steps: int = 1000
    learning_rate: float = 1e-2
    batch_size: int = 32
    regularization: float = 0.01
    warmup: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.learning_rate <= 0 or self.regularization < 0:
            raise ConfigError(
                "steps, batch_size and learning_rate must be above 0, regularization at least 0"
            )
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup {self.warmup} is not in [0, 1)")


ROUNDINGS: dict[str, Reconstruction] = {
    "adaround": Reconstruction(),
    "brecq": Reconstruction(blocks=True),
}
"""Learned roundings by name."""

COMPENSATION = "gptq"
"""The rounding that is not learned but computed (:mod:`dwindle.quantization.compensation`)."""


@dataclass(frozen=True)
class BlockResult:
    """What learning brought for one block.

    Attributes:
        path: The block.
        layers: How many layers it has.
        nearest: Relative error of its output when weights are rounded to the nearest level.
        learned: The same with learned rounding; never above ``nearest``, for otherwise nearest is kept.
    """

    path: str
    layers: int
    nearest: float
    learned: float


def get_rounding(rounding: str | Reconstruction) -> str | Reconstruction | None:
    """Return the settings of a learned rounding by name, the name of the one that is computed, or None for nearest.

    Raises:
        ConfigError: The name is not known.
    """
    if isinstance(rounding, Reconstruction):
        return rounding
    if rounding in ("nearest", COMPENSATION):
        return None if rounding == "nearest" else COMPENSATION
    if rounding not in ROUNDINGS:
        known = ", ".join(["nearest", COMPENSATION, *ROUNDINGS])
        raise ConfigError(f"rounding {rounding!r} is not known: {known}{did_you_mean(rounding, ROUNDINGS)}")
    return ROUNDINGS[rounding]


class _Rounded:
    """The weight of one call while its rounding is learned."""

    def __init__(self, weight: Tensor, scale: Tensor, zero_point: Tensor, slot: WeightSlot) -> None:
        place = slot.place
        self.form: NumberFormat = place.form
        weight = weight.detach()
        self.scale, zero = (
            spread_over(own, weight, place.axis, place.block) for own in (scale, zero_point.to(scale.dtype))
        )
        self.shift = zero * self.scale
        self.floor = (weight / self.scale).floor() + zero
        # What is on a level already stays there: zeros of a mask must not come back.
        self.on_level = (self.floor - zero) * self.scale
        self.fixed = weight == self.on_level
        self.variables = initial_variables(weight, self.scale).requires_grad_(True)

    def soft(self) -> Tensor:
        """Return the weight that is being learned."""
        return self._around(soft_weight(self.floor, self.variables, self.scale, self.form))

    def hard(self) -> Tensor:
        """Return the weight on its levels."""
        with torch.no_grad():
            return self._around(hard_weight(self.floor, self.variables, self.scale, self.form))

    def _around(self, weight: Tensor) -> Tensor:
        weight = weight - self.shift
        return torch.where(self.fixed, self.on_level.to(weight.dtype), weight)


class _RoundingMode(SimulationMode):
    """Simulates with weights that are given for some calls."""

    def __init__(
        self, simulation: Simulation, parameters: tuple[Tensor, ...], given: dict[CallKey, Tensor]
    ) -> None:
        super().__init__(simulation, parameters)
        self.given = given
        self.learned: dict[CallKey, _Rounded] = {}

    def weight(self, value: Tensor, key: CallKey, slot: WeightSlot) -> Tensor:
        """Return the weight that is learned, was learned, or is rounded to nearest."""
        if key in self.learned:
            return self.learned[key].soft()
        if key in self.given:
            return self.given[key]
        return super().weight(value, key, slot)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the squared error, summed over channels and averaged over samples and places, 0-d.

    It is measured in units of the target's mean square, so that the regularizer weighs the same at any scale; for
    targets of mean square 1 it is the papers' loss.

    Args:
        output: ``[samples, channels, places...]``, or ``[samples, ..., channels]`` with up to three dimensions.
        target: The same shape.
    """
    channels = target.shape[1] if target.dim() > 3 else target.shape[-1]
    return (output - target).square().mean() / target.square().mean().clamp(min=1e-12) * channels


def reconstruct(
    model: nn.Module,
    simulation: Simulation,
    parameters: tuple[Tensor, ...],
    batches: Iterable[Inputs],
    settings: Reconstruction,
    rectified: frozenset[CallKey] = frozenset(),
) -> list[BlockResult]:
    """Learn all roundings of a model; its weights are set on their levels in place when all blocks are done.

    Args:
        model: The model, not simulating yet, in evaluation mode.
        simulation: Where its quantizers stand.
        parameters: The packed scales and zero points.
        batches: Data without labels.
        settings: How to learn.
        rectified: Calls whose output goes into a ReLU and nowhere else; of these the error behind the ReLU counts.

    Returns:
        What it brought, block by block.

    Raises:
        DwindleError: A loss is not finite. The model is then as it was.
    """
    inputs = split_inputs(batches, settings.batch_size)
    names = own_weights(model, simulation)
    given: dict[CallKey, Tensor] = {}
    results = []
    flags = [(own, own.requires_grad) for own in model.parameters()]
    blocks = find_blocks(model, simulation, inputs[0], single_layers=not settings.blocks)
    try:
        model.requires_grad_(False)
        for block in tracked(blocks, "learned rounding: blocks"):
            mode = _RoundingMode(simulation, parameters, given)
            samples = samples_of(model, block.path, inputs, mode, PlacedMode(simulation))
            results.append(_learn(model, block, mode, samples, names, settings, rectified))
    finally:
        for own, flag in flags:
            own.requires_grad_(flag)
    with torch.no_grad():
        for key, weight in given.items():
            model.get_parameter(names[key]).copy_(weight)
    return results


def _learn(
    model: nn.Module,
    block: ReconstructionBlock,
    mode: _RoundingMode,
    samples: list[Sample],
    names: dict[CallKey, str],
    settings: Reconstruction,
    rectified: frozenset[CallKey],
) -> BlockResult:
    """Learn one block; what it learned is put among the weights that are given."""
    module = model.get_submodule(block.path)
    relu = len(block.keys) == 1 and block.keys[0] in rectified
    handles = _tracked_block(module, block.path, mode.path)
    training = module.training
    try:
        nearest = _error(module, mode, samples, relu)
        for key in block.keys:
            slot = mode.simulation.slots[key]
            part = slice(slot.start, slot.start + slot.length)
            scale, zero_point = mode.weight_scale[part], mode.weight_zero_point[part]
            mode.learned[key] = _Rounded(model.get_parameter(names[key]), scale, zero_point, slot)
        _descend(module, mode, samples, settings, relu, block.path)
        hard = {key: rounded.hard() for key, rounded in mode.learned.items()}
        mode.learned.clear()
        mode.given.update(hard)
        learned = _error(module, mode, samples, relu)
        if not learned <= nearest:
            for key in block.keys:
                slot = mode.simulation.slots[key]
                part = slice(slot.start, slot.start + slot.length)
                weight = model.get_parameter(names[key])
                mode.given[key] = fake_quantize(
                    weight,
                    mode.weight_scale[part],
                    mode.weight_zero_point[part],
                    slot.place.form,
                    slot.place.axis,
                    slot.place.block,
                )
            learned = nearest
    finally:
        mode.path.stack.clear()
        module.training = training
        for handle in handles:
            handle.remove()
    return BlockResult(block.path, len(block.keys), nearest, learned)


def _tracked_block(block: nn.Module, path: str, where: ModulePath) -> list[Any]:
    """Let a path follow the modules of one block, which is then run alone."""
    handles: list[Any] = []
    for name, module in block.named_modules(prefix=path):
        if name:
            handles.append(module.register_forward_pre_hook(EnterModule(where, name), prepend=True))
            handles.append(module.register_forward_hook(LeaveModule(where), always_call=True))
    return handles


def _descend(
    module: nn.Module,
    mode: _RoundingMode,
    samples: list[Sample],
    settings: Reconstruction,
    relu: bool,
    path: str,
) -> None:
    """Minimize the error of the block and the indecision of its roundings."""
    variables = [rounded.variables for rounded in mode.learned.values()]
    optimizer = torch.optim.Adam(variables, lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randint(len(samples), (settings.steps,), generator=generator).tolist()
    for step in range(settings.steps):
        sample = samples[order[step]]
        loss = _loss(run_block(module, mode, sample), sample.target, relu)
        if step >= settings.warmup * settings.steps:
            beta = annealed_beta(step, settings.steps, settings.warmup)
            undecided = torch.stack([rounding_regularizer(own, beta) for own in variables]).sum()
            loss = loss + settings.regularization * undecided
        if not bool(torch.isfinite(loss)):
            raise DwindleError(f"the reconstruction of {path or 'the model'} met values that are not finite")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _loss(output: Tensor, target: Tensor, relu: bool) -> Tensor:
    if relu:
        output, target = F.relu(output), F.relu(target)
    return reconstruction_loss(output, target)


def _error(module: nn.Module, mode: _RoundingMode, samples: list[Sample], relu: bool) -> float:
    """Squared error of the block's output over all samples, as a share of the output's sum of squares."""
    lost = whole = 0.0
    for sample in samples:
        output, target = run_block(module, mode, sample).detach(), sample.target
        if relu:
            output, target = F.relu(output), F.relu(target)
        lost += float((output - target).double().square().sum())
        whole += float(target.double().square().sum())
    return lost / max(whole, 1e-300)
