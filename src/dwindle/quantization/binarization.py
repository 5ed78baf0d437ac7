"""Binarization as a part of training: which targets get which binary quantizer, and the stages in which they start."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle import simulate
from dwindle.config import Target, resolve
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.quantization.binary_stages import BinaryStages
from dwindle.quantization.quantizers.binary import (
    BinaryActivation,
    BinaryQuantizerBase,
    BinaryWeight,
    SignActivation,
    StepActivation,
)
from dwindle.quantization.quantizers.binary_gradients import check_name
from dwindle.training.claims import Claim
from dwindle.training.processes import share_from_first

__all__ = ["ACTIVATIONS", "WEIGHTS", "BinaryQuantizer"]

#: Binary weights by name, made for the dimension of the output channels.
WEIGHTS: dict[str, Callable[[int], BinaryWeight]] = {
    "bnn": lambda axis: BinaryWeight("none", "clipped", axis),
    "xnor": lambda axis: BinaryWeight("channel", "identity", axis),
    "xnor_paper": lambda axis: BinaryWeight("channel", "xnor", axis),
    "dorefa": lambda axis: BinaryWeight("tensor", "identity", axis),
    "bireal": lambda axis: BinaryWeight("channel", "magnitude", axis),
}

#: Binary activations by name, made for a number of channels and their dimension.
ACTIVATIONS: dict[str, Callable[[int, int], BinaryActivation]] = {
    "bnn": lambda channels, dim: SignActivation("clipped"),
    "bireal": lambda channels, dim: SignActivation("polynomial"),
    "scale_threshold": lambda channels, dim: StepActivation(channels, dim),
    "dorefa": lambda channels, dim: StepActivation(learned=False),
}

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class BinaryQuantizer:
    """Makes weights and inputs of layers binary while the model trains, in four stages.

    A compressor for :func:`dwindle.compress` and :func:`dwindle.training.fit`. The simulation stays on the model behind
    the run; :func:`dwindle.pack_binary` makes it real, :meth:`withdraw` takes it off.

    Args:
        model: The model, changed in place when the run begins.
        config_list: Targets with ``quant_dtype: "int1"`` (``weight`` and ``_input_0`` of linear layers and
            convolutions, ``_output_0`` of layers without a weight). Outputs of layers with a weight stay as they are:
            they are sums. First and last layers are better left out.
        weights: A name in :data:`WEIGHTS`.
        activations: A name in :data:`ACTIVATIONS`.
        stages: When what starts.
        example_inputs: Inputs of the model (a tensor or a tuple); needed where learned steps start at once.

    Raises:
        ConfigError: A name, a target or a number format does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        *,
        weights: str = "xnor",
        activations: str = "scale_threshold",
        stages: BinaryStages | None = None,
        example_inputs: Any = None,
    ) -> None:
        self.model, self.stages, self.example_inputs = model, stages or BinaryStages(), example_inputs
        self._make_weight = WEIGHTS[check_name("weights", weights, tuple(WEIGHTS))]
        self._make_activation = ACTIVATIONS[check_name("activations", activations, tuple(ACTIVATIONS))]
        self.targets = _binary_targets(model, config_list)
        self.simulators: dict[Target, BinaryQuantizerBase] = {}
        self.steps = 0
        self._optimizer: torch.optim.Optimizer | None = None
        self._restart = True
        self._rates: list[float] | None = None

    # The contract of a compressor.

    def attach(self) -> None:
        """Put the quantizers on the model; those whose stage is not reached wait.

        Raises:
            ConfigError: A weight is not finite, a target is masked or taken, or an input has nothing above zero. The
                model is as it was.
        """
        if self.simulators:
            return
        made = {target: self._make(target) for target in self.targets}
        done: list[Target] = []
        try:
            for target, simulator in made.items():
                simulate.register_simulator(self.model, target, simulator, "quantize")
                done.append(target)
            self._learn_from_examples(made)
        except BaseException:
            simulate.detach(self.model, keep_values=False, targets=done, stage="quantize")
            raise
        self.simulators = made
        self._move()

    def step(self) -> None:
        """The optimizer has made one step.

        Raises:
            DwindleError: A learned step is to start on inputs that have nothing above zero.
        """
        self.steps += 1
        self._clip()
        if self.steps == max(self.stages.activations, 1):
            self._warn_of_constant_signs()
        self._move()
        self._begin_anew()

    def loss(self) -> float:
        """Nothing is added to the loss."""
        return 0.0

    def parameters(self) -> Iterator[nn.Parameter]:
        """Scales and thresholds of learned steps."""
        for simulator in self.simulators.values():
            yield from simulator.parameters()

    def parameter_options(self) -> dict[str, Any]:
        """Options of their group in an optimizer."""
        return {"weight_decay": 0.0}

    def claims(self) -> Iterator[Claim]:
        """Yield the targets that become binary."""
        for target in self.targets:
            yield Claim(target, "quantize")

    def status(self) -> dict[str, float]:
        """Return ``binary``, the share of the targets that are rounded by now."""
        begun = sum(own.started for own in self.simulators.values())
        return {"binary": begun / len(self.targets)} if self.targets else {}

    def detach(self) -> None:
        """End the run. The simulation stays, as it is what was trained; what still waits is warned about."""
        waiting = [str(target) for target, own in self.simulators.items() if not own.started]
        if waiting and sys.exc_info()[0] is None:
            warnings.warn(
                f"training ended after {self.steps} steps, before {waiting[0]} became binary", stacklevel=3
            )
        for target, simulator in self.simulators.items():
            if isinstance(simulator, BinaryActivation):
                simulator.watching = False
            if isinstance(simulator, BinaryWeight):
                simulator.remember(self._parameter(target))

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on; the quantizers' own state is in the model's."""
        return {"steps": self.steps, "rates": self._rates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ConfigError: A key is missing.
        """
        missing = {"steps", "rates"} - set(state)
        if missing:
            raise ConfigError(f"the state of {type(self).__name__} needs {', '.join(sorted(missing))}")
        self.steps, self._rates = int(state["steps"]), state["rates"]
        for simulator in self.simulators.values():
            simulator.start(self._is_due(simulator))
        self._watch()

    # More.

    def follow(self, optimizer: torch.optim.Optimizer, restart: bool = True) -> None:
        """Let the stages act on an optimizer.

        At the beginning of stages two and three its momentum and mean squares begin anew: gradients are of another
        size from there on, and Adam would go on with steps for the old ones for a thousand steps. In stage four its
        learning rates fall, and its weight decay ends. Call it after ``run.add_parameters_to(optimizer)``, and use no
        other scheduler in stage four.

        Args:
            optimizer: Of the run.
            restart: Whether it begins anew.
        """
        self._optimizer, self._restart = optimizer, restart

    def withdraw(self) -> nn.Module:
        """Take the quantizers off again; the weights stay as the optimizer has them."""
        simulate.detach(self.model, keep_values=False, targets=list(self.simulators), stage="quantize")
        self.simulators.clear()
        return self.model

    @property
    def stage(self) -> int:
        """The stage, 1 to 4, of the next step."""
        return self.stages.stage(self.steps)

    # Inside.

    def _parameter(self, target: Target) -> Tensor:
        found = self.model.get_submodule(target.module)._parameters[target.name]
        if found is None:
            raise ConfigError(f"{target} is no longer there")
        return found.detach()

    def _make(self, target: Target) -> BinaryQuantizerBase:
        module = self.model.get_submodule(target.module)
        if not target.is_parameter:
            return self._make_activation(*_channels(module)).to(_place_of(self.model, module))
        if simulate.simulator_of(self.model, target, "mask") is not None:
            raise ConfigError(
                f"{target} has a mask, and binary weights have no zero; dw.realize cuts it out first"
            )
        weight = self._parameter(target)
        simulator = self._make_weight(0)
        try:
            simulator.initialize(weight.amin(), weight.amax(), weight)
        except ConfigError as error:
            raise ConfigError(f"{target}: {error}") from error
        return simulator.to(weight.device)

    def _learn_from_examples(self, made: Mapping[Target, BinaryQuantizerBase]) -> None:
        """Set the scales of learned steps that start at once."""
        steps = {t: s for t, s in made.items() if isinstance(s, StepActivation) and s.learned}
        if not steps or self.steps or self.stages.activations:
            return
        if self.example_inputs is None:
            raise ConfigError("learned steps that start at once need example_inputs for their first scale")
        inputs = self.example_inputs
        args = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        flags = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            for simulator in steps.values():
                simulator.watching = simulator.training = True
            with torch.no_grad():
                self.model(*args)
        finally:
            for simulator in steps.values():
                simulator.watching = False
            for module, training in flags:
                module.training = training
        self._take_scales(steps)

    def _take_scales(self, steps: Mapping[Target, StepActivation]) -> None:
        share_from_first([simulator.seen for simulator in steps.values()])
        for target, simulator in steps.items():
            try:
                simulator.initialize(simulator.seen, simulator.seen)
            except ConfigError as error:
                raise ConfigError(f"{target}: {error}") from error

    def _is_due(self, simulator: BinaryQuantizerBase) -> bool:
        stages = self.stages
        return self.steps >= (stages.weights if isinstance(simulator, BinaryWeight) else stages.activations)

    def _move(self) -> None:
        """Start what is due, and let stage four act on the optimizer."""
        if self.steps == self.stages.activations and self.steps:
            steps = {t: s for t, s in self.simulators.items() if isinstance(s, StepActivation) and s.learned}
            try:
                self._take_scales(steps)
            except ConfigError as error:
                raise DwindleError(str(error)) from error
        for target, simulator in self.simulators.items():
            if self._is_due(simulator) and not simulator.started:
                simulator.start()
                if isinstance(simulator, BinaryWeight):
                    simulator.remember(self._parameter(target))
        self._watch()
        self._govern()

    def _watch(self) -> None:
        """Activations look at the inputs of the last step before they start (or of the first step)."""
        for simulator in self.simulators.values():
            if isinstance(simulator, BinaryActivation):
                simulator.watching = self.steps == max(self.stages.activations - 1, 0)

    def _warn_of_constant_signs(self) -> None:
        for target, simulator in self.simulators.items():
            if isinstance(simulator, SignActivation) and simulator.seen >= 0:
                warnings.warn(
                    f"{target}: these inputs are never negative (behind a ReLU?), so all their signs are +1; binarize "
                    "them with 'scale_threshold' or 'dorefa', or take the ReLU out",
                    stacklevel=4,
                )

    def _clip(self) -> None:
        """Keep the numbers behind unscaled signs where their gradient is not zero (BNN, section 1.4)."""
        for target, simulator in self.simulators.items():
            if isinstance(simulator, BinaryWeight) and simulator.clips and simulator.started:
                self._parameter(target).clamp_(-1, 1)

    def _begin_anew(self) -> None:
        """Let the optimizer forget what it knows of gradients, where a stage has just begun."""
        begins = self.steps in (self.stages.activations, self.stages.weights)
        if self._optimizer is not None and self._restart and begins:
            self._optimizer.state.clear()

    def _govern(self) -> None:
        optimizer, decay = self._optimizer, self.stages.decay
        if optimizer is None or decay is None or self.steps < decay:
            return
        if self._rates is None:
            self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        factor = self.stages.learning_rate_factor(self.steps)
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
            if "weight_decay" in group:
                group["weight_decay"] = 0.0


def _binary_targets(model: nn.Module, config_list: Sequence[Mapping[str, Any]]) -> list[Target]:
    """Return the targets that a config_list makes binary.

    Raises:
        ConfigError: A target cannot be binary, or the format has more than one bit.
    """
    found = []
    for target, setting in resolve(model, config_list, kind="quantization").items():
        if setting.quant_dtype is None or target.name == "bias":
            continue
        if setting.quant_dtype not in ("int1", "uint1"):
            raise ConfigError(f"{target}: quant_dtype {setting.quant_dtype!r} is not binary; 'int1' is")
        module = model.get_submodule(target.module)
        is_layer, is_output = isinstance(module, _LAYERS), target.name.startswith("_output_")
        if is_layer and is_output:
            continue
        if not is_layer and (not is_output or any(True for _ in module.parameters())):
            raise ConfigError(
                f"{target} is of a {type(module).__name__}: weights and inputs of linear layers and convolutions "
                "can be binary, and outputs of layers without a weight"
            )
        found.append(target)
    if not found:
        raise ConfigError("config_list: no target is made binary")
    return found


def _channels(module: nn.Module) -> tuple[int, int]:
    """Return the number of a layer's input channels and their dimension from the end."""
    if isinstance(module, nn.Linear):
        return module.in_features, -1
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.in_channels, -1 - len(module.kernel_size)
    return 1, -1


def _place_of(model: nn.Module, module: nn.Module) -> torch.device:
    tensors = [*module.parameters(), *model.parameters()]
    return tensors[0].device if tensors else torch.device("cpu")
