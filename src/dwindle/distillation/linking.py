"""The losses of a distiller's links: pairs of tensors, brought to one shape, compared, weighted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.distillation.checks import widened
from dwindle.distillation.links import FeatureLink, Inputs, summary_of
from dwindle.distillation.methods import METHODS
from dwindle.distillation.projection import Embedding, LastDimension, Projection, needs_projection
from dwindle.distillation.recording import TargetRecorder
from dwindle.graph.modes import modes_kept
from dwindle.training.schedule import value_at

__all__ = ["LinkLosses"]

Values = Mapping[tuple[str, str], list[Tensor]]
Place = tuple[str, str, str]
"""Student module, target, teacher module."""


class LinkLosses:
    """What the links of one distiller add to the loss, and the layers that are learned for it.

    Args:
        links: What is compared with what.
        model: The student.
        teacher: The teacher; the student itself when it teaches itself.
        inputs: Positional and keyword inputs; both models run once with them, and layers are made where shapes differ.
        seed: Of the layers' first weights.
        last_dimension: Methods that need one shape get a linear layer where the last dimensions differ, as in NNI.

    Attributes:
        adapters: The learned layers, by place.
        shapes: What is known of the shapes, as text, by place.

    Raises:
        ConfigError: Two tensors cannot be compared.
    """

    def __init__(
        self,
        links: Sequence[FeatureLink],
        model: nn.Module,
        teacher: nn.Module,
        inputs: Inputs | None,
        seed: int = 0,
        *,
        last_dimension: bool = False,
    ):
        self.links, self.seed, self.last_dimension = tuple(links), seed, last_dimension
        self.adapters: dict[Place, nn.Module] = {}
        self.shapes: dict[Place, str] = {}
        self.ready = False
        if inputs is not None and self.links:
            self.prepare(model, teacher, inputs)

    @property
    def student_targets(self) -> list[tuple[str, str]]:
        """Module and target of what is kept of the student."""
        return [(link.module, link.target) for link in self.links]

    @property
    def teacher_targets(self) -> list[tuple[str, str]]:
        """Module and target of what is kept of the teacher, each once, in a fixed order."""
        return sorted({(name, link.target) for link in self.links for name in link.teacher_modules})

    def prepare(self, model: nn.Module, teacher: nn.Module, inputs: Inputs) -> None:
        """Run both models once, make the layers, and see that every pair can be compared.

        Raises:
            ConfigError: A pair cannot.
        """
        mine = _observed(model, self.student_targets, "student", inputs)
        theirs = _observed(teacher, self.teacher_targets, "teacher", inputs)
        adapters: dict[Place, nn.Module] = {}
        for link in self.links:
            for name in link.teacher_modules:
                pair = _first(mine, link.module, link.target), _first(theirs, name, link.target)
                place = (link.module, link.target, name)
                self.shapes[place] = f"{tuple(pair[0].shape)} and {tuple(pair[1].shape)}"
                adapter = self._adapter(link, name, *pair, number=len(adapters))
                if adapter is not None:
                    kind = widened(pair[0]).dtype
                    adapters[place] = adapter.to(device=pair[0].device, dtype=kind)
                with torch.no_grad():
                    # Three times over: relations between samples need some.
                    tripled = [torch.cat([own] * 3) if own.dim() else own for own in pair]
                    self._compared(link, name, tripled[0], tripled[1], 0, adapter)
        self.adapters, self.ready = adapters, True

    def check_ready(self) -> None:
        """Raise where a link needs shapes that nobody gave.

        Raises:
            ConfigError: Naming the link.
        """
        for link in self.links:
            if METHODS[link.method].adapter == "embed" and not self.ready:
                raise ConfigError(
                    f"{link.module}.{link.target}: apply_method {link.method!r} learns layers, whose sizes come from "
                    "a run of both models; give example_inputs"
                )

    def loss(self, link: FeatureLink, mine: Values, theirs: Values, step: int) -> Tensor:
        """The smallest loss over the linked teacher modules, weighted; calls of a module used twice are paired.

        Raises:
            ConfigError: The calls cannot be paired, or the tensors not compared.
        """
        calls = mine.get((link.module, link.target), [])
        candidates = []
        for name in link.teacher_modules:
            taught = theirs.get((name, link.target), [])
            if len(calls) != len(taught) or not calls:
                raise ConfigError(
                    f"module {link.module!r} was called {len(calls)} times in the model, and {name!r} "
                    f"{len(taught)} times in the teacher; they cannot be paired"
                )
            adapter = self.adapters.get((link.module, link.target, name))
            terms = [
                self._compared(link, name, own, other, step, adapter)
                for own, other in zip(calls, taught, strict=True)
            ]
            candidates.append(torch.stack(terms).mean())
        return value_at(link.weight, step) * torch.stack(candidates).min()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the learned layers."""
        for adapter in self.adapters.values():
            yield from adapter.parameters()

    def state_dict(self) -> dict[str, Any]:
        """Return the learned layers' tensors."""
        return {"|".join(place): dict(adapter.state_dict()) for place, adapter in self.adapters.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ConfigError: The layers are others.
        """
        own = {"|".join(place): adapter for place, adapter in self.adapters.items()}
        if set(own) != set(state):
            raise ConfigError(f"the saved links learn layers for {sorted(state)}, these for {sorted(own)}")
        for place, adapter in own.items():
            try:
                adapter.load_state_dict(state[place])
            except RuntimeError as error:
                raise ConfigError(f"the saved layer of {place} is another: {error}") from error

    def summary(self) -> str:
        """Return a table of the links as text."""
        return summary_of(self.links, self.shapes)

    def _adapter(
        self, link: FeatureLink, name: str, mine: Tensor, theirs: Tensor, number: int
    ) -> nn.Module | None:
        """The layer that a pair needs; its first weights come from the seed, the user's random stream stays."""
        kind = METHODS[link.method].adapter
        last = self.last_dimension and kind == "none" and mine.shape[-1:] != theirs.shape[-1:]
        if not last and (
            kind == "none" or (kind == "project" and not needs_projection(mine.shape, theirs.shape))
        ):
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + number)
            try:
                if kind == "embed":
                    return Embedding(mine.shape, theirs.shape, int(link.options.get("width", 128)))
                return (LastDimension if last else Projection)(mine.shape, theirs.shape)
            except ConfigError as error:
                raise ConfigError(f"{_pair(link, name)}: {error}") from error

    def _compared(
        self, link: FeatureLink, name: str, mine: Tensor, theirs: Tensor, step: int, adapter: nn.Module | None
    ) -> Tensor:
        method = METHODS[link.method]
        try:
            if adapter is not None:
                mine, theirs = adapter(mine, theirs)
            return method(mine, theirs, link.options, step)
        except ConfigError as error:
            hint = ""
            if method.adapter == "none" and mine.shape != theirs.shape and link.method in ("mse", "kl"):
                hint = "; apply_method 'hint' projects, with example_inputs"
            elif method.adapter == "project" and not self.ready and adapter is None:
                hint = "; give example_inputs, so that a projection is made"
            raise ConfigError(f"{_pair(link, name)}: {error}{hint}") from error


def _pair(link: FeatureLink, name: str) -> str:
    return f"{link.module}.{link.target} cannot be compared with the teacher's {name!r}"


def _observed(
    model: nn.Module, targets: Sequence[tuple[str, str]], role: str, inputs: Inputs
) -> dict[tuple[str, str], list[Tensor]]:
    """What the targets hold in one run in evaluation mode; the model is as before afterwards."""
    recorder = TargetRecorder(targets, role)
    handles = recorder.attach(model, only_with_gradients=False)
    try:
        with modes_kept(model), torch.no_grad():
            model.eval()
            model(*inputs[0], **inputs[1])
    finally:
        for handle in handles:
            handle.remove()
    return dict(recorder.values)


def _first(values: Values, module: str, target: str) -> Tensor:
    found = values.get((module, target))
    if not found:
        raise ConfigError(f"module {module!r} is not called with the example inputs, so it has no {target}")
    return found[0]
