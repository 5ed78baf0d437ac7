"""The proof in training mode: a model without blocks computes what it computes with their branches at zero.

Random operators (dropout, stochastic depth) are made still for both sides: nothing is dropped, and noise is a
constant. Where a model stays random all the same, or does not run in training mode, nothing is shown and the
result says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dwindle.config.errors import RealizeError
from dwindle.graph.analysis import Analysis
from dwindle.graph.blocks import Block
from dwindle.realize.depth import zero_branches
from dwindle.realize.depth_plan import write_blocks
from dwindle.realize.plan import Plan
from dwindle.realize.precision import proof_dtype, widened_copy
from dwindle.realize.surgery import apply_plan
from dwindle.realize.verify import TOLERANCE, Verification, difference, outputs_of, random_inputs

_DROPOUTS = frozenset({"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"})
#: Operators with a dropout of their own, and the position of its probability.
_INNER_DROPOUT = {
    "scaled_dot_product_attention": 4,
    "lstm": 5,
    "gru": 5,
    "rnn_tanh": 5,
    "rnn_relu": 5,
}
_NOISE = 0.5


class StillRandomness(TorchDispatchMode):
    """Makes random operators constant: dropout keeps everything, Bernoulli gives ones, noise is one half."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.split("::")[1].removesuffix("_")
        if name in _DROPOUTS:
            return args[0]
        place = _INNER_DROPOUT.get(name)
        if place is not None:
            if len(args) > place:
                args = (*args[:place], 0.0, *args[place + 1 :])
            if "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    tensor.fill_(1.0 if name == "bernoulli" else _NOISE)
        return result


def prove_depth(
    model: nn.Module,
    analysis: Analysis,
    plan: Plan,
    depth: Plan,
    blocks: Sequence[Block],
    prove: Callable[[], Verification],
    notes: list[str],
) -> Verification:
    """Prove a plan; where blocks go, in training mode as well, and with stand-ins where lists cannot be shortened.

    Args:
        model: The user's model.
        analysis: What was recorded of it.
        plan: The plan of everything; the way in which blocks go may be changed in it.
        depth: The plan of the blocks alone; likewise.
        blocks: The blocks that go.
        prove: Proves ``plan`` in evaluation mode.
        notes: What the user should know is added here.

    Raises:
        RealizeError: The small model is not equal to the masked one.
    """

    def both() -> Verification:
        verification = prove()
        if blocks:
            note = _prove_in_training(
                model,
                analysis,
                lambda copy: zero_branches(copy, depth.blocks),
                lambda copy: apply_plan(copy, depth),
            )
            notes.extend([note] if note else [])
        return verification

    try:
        return both()
    except RealizeError:
        replaceable = all(block.source is not None and block.structure is not None for block in blocks)
        if not replaceable or not any(removal.deleted for removal in depth.blocks):
            raise
    plan.attributes = [change for change in plan.attributes if change not in depth.attributes]
    other = write_blocks(plan, model, analysis, blocks, delete=False)
    depth.blocks, depth.lists, depth.attributes = other.blocks, other.lists, other.attributes
    return both()


def _prove_in_training(
    model: nn.Module,
    analysis: Analysis,
    mask: Callable[[nn.Module], None],
    remove: Callable[[nn.Module], Any],
    *,
    seed: int = 1,
) -> str | None:
    """Show in training mode that removing blocks equals masking them.

    Args:
        model: The user's model; copies of it are used.
        analysis: What was recorded of it.
        mask: Masks the blocks of a copy.
        remove: Removes them from a copy.
        seed: Of the random inputs.

    Returns:
        None when it was shown; otherwise why nothing could be shown.

    Raises:
        RealizeError: The two differ, or the small model does not run.
    """
    if len(analysis.traces) < 2:
        return "the model could not be run in training mode, so nothing was proven for it"
    dtype = proof_dtype(model)
    masked = widened_copy(model, dtype)
    mask(masked)
    masked.train()
    small = copy.deepcopy(masked)
    variants = random_inputs(analysis, dtype, seed)
    try:
        expected = _run(copy.deepcopy(masked), variants, dtype, 1)
        again = _run(masked, variants, dtype, 2)
    except Exception as error:
        return f"in training mode nothing was proven: the model fails there ({type(error).__name__}: {error})"
    if difference(expected, again) > TOLERANCE[dtype]:
        return "in training mode nothing was proven: the model gives other results at every call there"
    try:
        remove(small)
        actual = _run(small, variants, dtype, 1)
    except RealizeError:
        raise
    except Exception as error:
        raise RealizeError(
            f"the small model does not run in training mode ({type(error).__name__}: {error}); "
            "the model was left as it was"
        ) from error
    gap = difference(expected, actual)
    if gap > TOLERANCE[dtype]:
        raise RealizeError(
            f"in training mode the model without the blocks is not equal to the masked one: the largest difference "
            f"is {gap:.3g} (allowed {TOLERANCE[dtype]:g}); the model was left as it was"
        )
    return None


def _run(model: nn.Module, variants: Any, dtype: torch.dtype, seed: int) -> list[list[torch.Tensor] | None]:
    with torch.random.fork_rng(devices=[]), StillRandomness():
        torch.manual_seed(seed)
        return outputs_of(model, variants, dtype)
