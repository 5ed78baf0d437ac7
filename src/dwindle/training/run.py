"""Compress a model while it is trained: several compressors, one training run, the user's own loop.

with compress(model, [pruner, quantizer, distiller]) as run:
    for batch in loader:
        loss = criterion(model(batch.x), batch.y) + run.loss()
        loss.backward(); optimizer.step(); optimizer.zero_grad(); run.step()
small = run.realize(example_inputs=(x,))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from dwindle import simulate
from dwindle.config.errors import ConfigError, DwindleError, RealizeError
from dwindle.training.claims import check_claims
from dwindle.training.compressor import (
    Compressor,
    attach_compressor,
    can_detach,
    check_compressor,
    detach_compressor,
)
from dwindle.training.many_processes import ManyProcesses
from dwindle.training.own_parameters import OwnParameters
from dwindle.training.snapshot import ModelSnapshot
from dwindle.training.staged import count_epochs

__all__ = ["CompressionRun", "compress", "register_realizer"]

Realizer = Callable[..., Any]

_realizer: Realizer | None = None


def register_realizer(realizer: Realizer) -> None:
    """Name the function that :meth:`CompressionRun.realize` calls.

    The floors of the house point down, so this floor cannot import the one that realizes; that one registers
    itself here when it is imported.

    Args:
        realizer: Called as ``realizer(model, example_inputs=..., masks=..., **options)``.
    """
    global _realizer
    _realizer = realizer


def compress(
    model: nn.Module,
    compressors: Sequence[Compressor],
    *,
    steps_per_epoch: int | None = None,
    restore_on_error: bool = True,
) -> CompressionRun:
    """Let compressors work together on one model, for the time of a ``with`` block.

    Entering the block attaches them in the given order. Leaving it takes all their hooks off again and keeps
    the compressed values (masked weights are zero). An exception in the block, or while attaching, leaves
    the model as it was before: the same parameters with the same values, no hooks, the same training flags.

    Args:
        model: The model that is trained. Its parameters keep their identity, so any optimizer goes on.
        compressors: What to attach: pruners, quantizers, distillers, factorizers. On one target they act in the order
            low rank, mask, rounding, whatever the order of this list; :class:`dwindle.training.Staged` lets one begin
            later or end sooner.
        steps_per_epoch: Optimizer steps of an epoch, for those that are staged by epochs.
        restore_on_error: Keep a copy of all parameters and buffers, and put it back after an exception. With
            False no memory is needed for it, and after an exception the values trained so far stay.

    Returns:
        The context manager; ``as run`` gives it.

    Raises:
        ConfigError: An entry is not a compressor, works on another model, or cannot go together with another one on
            one target.
    """
    return CompressionRun(
        model, compressors, steps_per_epoch=steps_per_epoch, restore_on_error=restore_on_error
    )


class CompressionRun:
    """One training run of several compressors. Made by :func:`compress`.

    Attributes:
        model: The model.
        compressors: The compressors, in the order in which they were attached.
        steps: Optimizer steps so far.
        active: Whether the ``with`` block is entered.
    """

    def __init__(
        self,
        model: nn.Module,
        compressors: Sequence[Compressor],
        *,
        steps_per_epoch: int | None = None,
        restore_on_error: bool = True,
    ):
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        for position, compressor in enumerate(compressors):
            check_compressor(compressor, position)
            works_on = getattr(compressor, "model", None)
            if works_on is not None and works_on is not model:
                raise ConfigError(
                    f"compressors[{position}] ({type(compressor).__name__}) is made for another model, "
                    f"a {type(works_on).__name__}; make it with the model given to compress()"
                )
        if len({id(compressor) for compressor in compressors}) != len(compressors):
            raise ConfigError("the same compressor object is listed twice")
        if steps_per_epoch is not None:
            count_epochs(compressors, steps_per_epoch)
        check_claims(compressors)
        self.model = model
        self.compressors = tuple(compressors)
        self.steps = 0
        self.active = False
        self._restore_on_error = restore_on_error
        self._snapshot: ModelSnapshot | None = None
        self._masks: dict[str, dict[str, Tensor]] | None = None
        self._own = OwnParameters(self.compressors)
        self._losses: dict[int, Tensor] = {}
        self._processes = ManyProcesses(model, self.compressors)

    def __enter__(self) -> CompressionRun:
        if self.active:
            raise ConfigError("this run is entered already; call compress() for another one")
        self._processes.check()
        self._snapshot = ModelSnapshot(self.model, values=self._restore_on_error)
        attached: list[Compressor] = []
        try:
            for compressor in self.compressors:
                attached.append(compressor)
                attach_compressor(compressor)
        except BaseException:
            self._take_off(attached, keep_values=False)
            self._snapshot.restore()
            self._snapshot = None
            raise
        self.active = True
        self._processes.begin(self.parameters())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.active = False
        failed = kind is not None
        self._processes.end(failed=failed)
        snapshot, self._snapshot = self._snapshot, None
        try:
            self._masks = None if failed else _masks_of(self.model)
            self._take_off(self.compressors, keep_values=not failed)
        finally:
            if failed and snapshot is not None:
                snapshot.restore()

    def _take_off(self, compressors: Sequence[Compressor], *, keep_values: bool) -> None:
        """Detach in reverse order; simulators of a compressor that cannot detach itself go at the end."""
        first_error: BaseException | None = None
        for compressor in reversed(compressors):
            try:
                detach_compressor(compressor)
            except Exception as error:
                first_error = first_error or error
        if not all(can_detach(compressor) for compressor in compressors):
            simulate.detach(self.model, keep_values=keep_values)
        # While an exception is already under way (keep_values is False) that one is the news, not this.
        if first_error is not None and keep_values:
            raise first_error

    def step(self) -> None:
        """Tell every compressor that the optimizer has made one step."""
        self._need_active("step")
        self._processes.before_step()
        self.steps += 1
        for compressor in self.compressors:
            compressor.step()
        self._follow_up()

    def loss(self) -> Tensor | float:
        """Return the sum of the compressors' losses: a 0-d tensor, or 0.0 when none has one."""
        self._need_active("loss")
        self._processes.before_loss()
        total: Tensor | float = 0.0
        self._losses.clear()
        for position, compressor in enumerate(self.compressors):
            own = compressor.loss()
            if isinstance(own, Tensor):
                self._losses[position] = own.detach()
            total = total + own
        return total

    def statistics(self) -> list[dict[str, Any]]:
        """Return where each compressor stands, in order: ``name``, the last ``loss``, and numbers of its own.

        Such as the share of a pruner's targets that is masked, or whether a quantizer rounds already. Reads tensors,
        so on an accelerator it waits; ask every hundred steps, not in each.
        """
        found = []
        for position, compressor in enumerate(self.compressors):
            row: dict[str, Any] = {
                "name": str(getattr(compressor, "name", None) or type(compressor).__name__)
            }
            if position in self._losses:
                row["loss"] = float(self._losses[position])
            row |= getattr(compressor, "status", dict)()
            found.append(row)
        return found

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the compressors' own trainable parameters, each once."""
        seen: set[int] = set()
        for compressor in self.compressors:
            for parameter in compressor.parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter

    def add_parameters_to(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        schedule: Any | None = None,
        multiplier: float = 1.0,
        **group_options: Any,
    ) -> int:
        """Let the user's optimizer train the compressors' own parameters too: scores, gates, adapters.

        A compressor may say how its parameters want to be trained (``parameter_options()``: no weight decay, a
        learning rate of their own); ``group_options`` go before that. Parameters of compressors that begin later
        (:class:`dwindle.training.Staged`) are added when they do.

        Args:
            optimizer: Gets one more parameter group for each compressor that has something to add.
            schedule: The learning rate scheduler that was made for the optimizer before; the new groups follow it
                too, in proportion to the first group.
            multiplier: Their learning rates are multiplied by it.
            group_options: Options of the new groups, such as ``lr=1e-2`` or ``weight_decay=0.0``. Without a learning
                rate they get that of the first group.

        Returns:
            How many parameters were added; those that it or :meth:`adaptive_optimizer` has already are left alone.
        """
        added = self._own.add_to(optimizer, schedule, multiplier, group_options)
        self._processes.follow(self.parameters())
        return added

    def adaptive_optimizer(
        self, optimizer: torch.optim.Optimizer, *, multiplier: float = 1.0
    ) -> torch.optim.Adam | None:
        """Return an optimizer of their own for parameters that plain gradient steps hardly move, or None.

        Logits of masks have gradients as small as their share of a model. Where the user's optimizer is SGD, they are
        given to Adam, and :meth:`add_parameters_to` leaves them alone from then on; those that the user's optimizer has
        already stay there. Step it and zero its gradients beside the user's.

        Args:
            optimizer: The user's.
            multiplier: The learning rates are multiplied by it.
        """
        return self._own.adaptive_optimizer(optimizer, multiplier)

    def _follow_up(self) -> None:
        """Let the optimizers train what compressors that have just begun brought with them."""
        self._own.follow_up()
        self._processes.follow(self.parameters())

    def realize(self, example_inputs: tuple[Any, ...] | None = None, **options: Any) -> Any:
        """Make the really small model: ``dw.realize`` with the masks of this run, and smaller layers of learned ranks.

        Quantizers stay, with what belongs to channels that go cut off; ``dw.export`` writes their integer
        model. Works inside the block and, with the masks that stood at its end, behind it. A model that ``fully_shard``
        has cut up stays as it is: all processes call this together, and each gets a small model of its own.

        Args:
            example_inputs: Positional inputs of the model.
            options: More arguments of :func:`dwindle.realize.realize`.

        Raises:
            RealizeError: The package that realizes was never imported, or the shrinking failed.
        """
        if _realizer is None:
            raise RealizeError(
                "run.realize() needs the package dwindle.realize, which registers itself when imported; "
                "write `import dwindle.realize` first"
            )
        if not self.active and self._masks:
            options.setdefault("masks", self._masks)
        for compressor in self.compressors:
            for key, own in getattr(compressor, "realize_options", dict)().items():
                options[key] = [*options.get(key, []), *own]
        return _realizer(simulate.gathered(self.model), example_inputs=example_inputs, **options)

    def state_dict(self) -> dict[str, Any]:
        """Return the step number and every compressor's state, in order."""
        return {
            "steps": self.steps,
            "order": list(self._own.order),
            "compressors": [
                {"type": type(compressor).__name__, "state": compressor.state_dict()}
                for compressor in self.compressors
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a run with the same compressors in the same order.

        Raises:
            ConfigError: The compressors are others.
        """
        saved = [entry["type"] for entry in state["compressors"]]
        present = [type(compressor).__name__ for compressor in self.compressors]
        if saved != present:
            raise ConfigError(f"the state was saved by the compressors {saved}, this run has {present}")
        for compressor, entry in zip(self.compressors, state["compressors"], strict=True):
            compressor.load_state_dict(entry["state"])
        self.steps = int(state["steps"])
        self._own.continue_order(state.get("order", []))
        self._follow_up()

    def _need_active(self, method: str) -> None:
        if not self.active:
            raise DwindleError(
                f"run.{method}() belongs inside the block: with compress(model, [...]) as run: ..."
            )


def _masks_of(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Copies of the masks that stand on the model, by module and target."""
    return {
        module: {target: mask.detach().clone() for target, mask in masks.items()}
        for module, masks in simulate.masks_as_nested(model).items()
    }
