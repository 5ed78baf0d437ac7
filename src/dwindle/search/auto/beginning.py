"""What a joint search chooses between, and what it begins with: greedy answers by sensitivity and measured cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from dwindle.config.errors import DwindleError
from dwindle.graph.modes import in_mode
from dwindle.quantization.layer_errors import layer_errors
from dwindle.realize.packing import floating_outputs
from dwindle.search.auto.candidate import Candidate
from dwindle.search.auto.fitting import Fitted, Fitter
from dwindle.search.auto.joint import Choices, Wish
from dwindle.search.auto.making import integer_model
from dwindle.search.auto.variant import Variant
from dwindle.training.inputs import forward_inputs

__all__ = ["METHODS", "Beginning"]

METHODS = ("blocks", "widths", "ranks", "int8")
"""What may be done to a model: residual blocks go, axes shrink, layers become chains of low rank, numbers int8."""

#: At most so many sets of blocks are offered.
_SETS = 7

#: Below so many trials a search has no room for ranks and for sensitive layers in float.
_LONG = 20

#: Layers of a smaller rank stay whole.
_SMALLEST_RANK = 64

Widths = Callable[[Variant], Mapping[str, Sequence[int]] | None]


class Beginning:
    """Looks at a model and a budget before the search.

    Args:
        fitter: Makes candidates fit the budget.
        methods: Some of :data:`METHODS`.
        labelled: Whether there are labels, for importances that need them.
        trials: How many candidates will be scored.
        widths: Counts that the runtime likes, by variable.
        quantize_at: The share of the training behind which layers are rounded.
    """

    def __init__(
        self,
        fitter: Fitter,
        methods: Sequence[str],
        labelled: bool,
        trials: int,
        widths: Widths,
        quantize_at: float = 0.0,
    ) -> None:
        self.fitter, self.workpiece = fitter, fitter.workpiece
        self.methods, self.labelled, self.trials, self.widths = tuple(methods), labelled, trials, widths
        self.quantize_at = quantize_at

    def choices(self) -> Choices:
        """Return what trials choose between."""
        blocks = self._block_sets() if "blocks" in self.methods else ((),)
        numbers: Literal["int8", "float32"] = "int8" if "int8" in self.methods else "float32"
        importances = ("outputs", "taylor") if self.labelled else ("outputs",)
        layers = self._float_sets(blocks[-1]) if numbers == "int8" else ((),)
        if numbers == "int8" and self.trials >= _LONG:
            layers = self._sensitive_sets(layers)
        ranks = self._ranks() if "ranks" in self.methods and self.trials >= _LONG else None
        return Choices(blocks, importances, layers, (numbers,), ranks, (self.quantize_at,))

    def wishes(self, choices: Choices) -> list[Wish]:
        """Return the greedy answers that fit the budget, and the uniform one; at most as many as there are trials.

        Raises:
            DwindleError: None of them fits; the message says how near the nearest came.
        """
        numbers: Literal["int8", "float32"] = "int8" if "int8" in choices.numbers else "float32"
        first = {self._first_layer()}
        plain = [own for own in choices.float_layers if first.issuperset(own)]
        wanted = [
            Wish(
                Candidate(
                    gone,
                    importance=own,
                    numbers=numbers,
                    float_layers=left,
                    quantize_at=self.quantize_at,
                ),
                "greedy",
                {},
            )
            for gone, left, own in itertools.product(reversed(choices.blocks), plain, choices.importances)
        ]
        even = Candidate(
            importance=choices.importances[0],
            numbers=numbers,
            float_layers=choices.float_layers[0],
            quantize_at=self.quantize_at,
        )
        wanted.insert(1, Wish(even, "uniform", {}))  # early, or there might be no trial left for it
        able: list[Wish] = []
        nearest: Fitted | None = None
        for wish in wanted:
            found = self.fitter.fit(wish.base, wish.how(self.widths))
            if found is not None and (nearest is None or found.over < nearest.over):
                nearest = found
            if found is not None and found.fits:
                able.append(wish)
            if len(able) >= self.trials:
                break
        if not able:
            near = "" if nearest is None else f"; the nearest costs {nearest.over:.2f} times what is allowed"
            raise DwindleError(f"the budget is out of reach of every candidate{near}")
        return able

    def _block_sets(self) -> tuple[tuple[str, ...], ...]:
        """Return no block, then more and more of them, the least harmful first."""
        able = [block.path for block in self.workpiece.variant().analysis.blocks if block.reason is None]
        harms = {path: harm for path in able if (harm := self._harm_of(path)) is not None}
        order = sorted(harms, key=lambda path: harms[path])
        sets = [tuple(order[:number]) for number in range(len(order) + 1)]
        step = -(-len(sets) // _SETS)
        return tuple(sets[::step])

    def _harm_of(self, block: str) -> float | None:
        """Return how far the outputs move without a block, as a share of their energy; None where it stays."""
        original = self.workpiece.model
        try:
            model = self.workpiece.variant((block,)).model
        except DwindleError:
            return None
        energy = change = 0.0
        for batch in self.workpiece.batches[:2]:
            args, kwargs = forward_inputs(original, batch)
            with torch.no_grad(), in_mode(model, training=False):
                wanted = [own.double() for own in floating_outputs(original(*args, **kwargs))]
                found = [own.double() for own in floating_outputs(model(*args, **kwargs))]
            energy += sum(float(own.square().sum()) for own in wanted)
            change += sum(float((a - b).square().sum()) for a, b in zip(found, wanted, strict=True))
        return change / max(energy, 1e-30)

    def _float_sets(self, blocks: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
        """Return no layer, and before that the first one where the runtimes run it faster in float.

        A first layer of few channels gains nothing from int8 in some runtimes; whether that is so here is measured on
        the greedy candidate without blocks.
        """
        first = self._first_layer()
        base = Candidate(blocks, importance="outputs")
        plain = self.fitter.fit(base, Wish(base, "greedy", {}).how(self.widths))
        if plain is None or first is None:
            return ((),)
        try:
            other = self.fitter.measure(plain.candidate.but(float_layers=(first,)))
        except DwindleError:
            return ((),)
        return ((first,), ()) if other.over < plain.over else ((),)

    def _sensitive_sets(self, sets: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
        """Return these sets, and the first one with one and two more layers: those that rounding hurts most."""
        workpiece = self.workpiece
        try:
            whole = integer_model(workpiece, Candidate(), workpiece.model, self.fitter.backend)
            errors = layer_errors(workpiece.model, whole, workpiece.unlabelled(), adapt=lambda own: own)
        except DwindleError:
            return sets
        ranked = sorted(errors, key=lambda own: own.own_sqnr_db)
        paths = dict.fromkeys(own.weight_name.rpartition(".")[0] for own in ranked)
        layers = [path for path in paths if path not in sets[0]]
        return (*sets, *((*sets[0], *layers[:more]) for more in range(1, min(2, len(layers)) + 1)))

    def _first_layer(self) -> str | None:
        """Return the path of the first convolution or linear layer that runs."""
        modules = dict(self.workpiece.model.named_modules())
        for node in self.workpiece.variant().analysis.trace.live_nodes():
            if isinstance(modules.get(node.module), nn.Conv1d | nn.Conv2d | nn.Linear):
                return str(node.module)
        return None

    def _ranks(self) -> dict[str, int] | None:
        """Return the layers that may become chains, with their full rank."""
        found = {}
        for path, module in self.workpiece.model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and getattr(module, "groups", 1) == 1:
                rank = min(module.weight.shape[0], module.weight[0].numel())
                if rank >= _SMALLEST_RANK:
                    found[path] = rank
        return found or None
