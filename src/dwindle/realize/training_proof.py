"""The proof in training mode, for models that compute something else there (auxiliary heads, own branches).

Where both modes run the same operators, the proof in evaluation mode shows all there is to show. Otherwise the small
and the masked model are compared in training mode too, with random operators made still; where a norm or the like
runs over a cut axis, the reference is the recording of training mode with the mask inside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from dwindle import simulate
from dwindle.config.errors import RealizeError
from dwindle.graph.analysis import Analysis
from dwindle.graph.axes import Axis
from dwindle.graph.stand_ins import copied
from dwindle.graph.trace import Trace
from dwindle.realize.depth_proof import StillRandomness
from dwindle.realize.verify import TOLERANCE, difference, masked_inside, outputs_of, random_inputs, replayed

_DROPPED = frozenset({"dropout", "feature_dropout", "alpha_dropout", "native_dropout", "bernoulli"})


def computes_otherwise(evaluation: Trace, training: Trace) -> bool:
    """Whether the two recordings differ in more than dropout and the counters of batch norms."""
    first, second = (
        Counter(
            node.name.removesuffix("_")
            for node in trace.live_nodes()
            if node.outputs and node.output.is_floating and node.name.removesuffix("_") not in _DROPPED
        )
        for trace in (evaluation, training)
    )
    return first != second


def prove_in_training(
    analysis: Analysis,
    keep: dict[Axis, torch.Tensor],
    masked: nn.Module,
    make_small: Callable[[nn.Module], nn.Module],
    *,
    seed: int = 2,
) -> str | None:
    """Show in training mode that the small model equals the masked one.

    Args:
        analysis: The axes.
        keep: What is cut.
        masked: A copy of the model in the precision of the proof, with its masked parameters. It is consumed.
        make_small: Cuts a copy of it and returns the small model.
        seed: Of the random inputs.

    Returns:
        None when it was shown, or there is nothing to show; otherwise why nothing could be shown.

    Raises:
        RealizeError: The two differ, or the small model does not run.
    """
    recorded = len(analysis.traces) > 1
    if not keep or (recorded and not computes_otherwise(*analysis.traces[:2])):
        return None
    dtype = next((p.dtype for p in masked.parameters() if p.is_floating_point()), torch.float32)
    masked.train()
    variants = random_inputs(analysis, dtype, seed)
    try:
        expected = _run(copied(masked), variants, dtype)
        again = _run(copied(masked), variants, dtype)  # noise of Python's own would show
    except Exception as error:
        return f"in training mode nothing was proven: the model fails there ({type(error).__name__}: {error})"
    if difference(expected, again) > TOLERANCE[dtype]:
        return "in training mode nothing was proven: the model gives other results at every call there"
    twin = copied(masked)
    simulate.detach(twin, keep_values=True)
    try:
        actual = _run(make_small(masked).train(), variants, dtype)
    except RealizeError:
        raise
    except Exception as error:
        raise RealizeError(
            f"the small model does not run in training mode ({type(error).__name__}: {error}); "
            "the model was left as it was"
        ) from error
    # after one step of batch statistics values are less exact than in evaluation mode
    tolerance = max(TOLERANCE[dtype], 1e-7)
    gap = difference(expected, actual)
    if gap > tolerance and any(
        leaf in keep for mixing in analysis.scope.mixings for axis in mixing.axes for leaf in axis.leaves()
    ):
        if not recorded:
            return "in training mode nothing was proven: the model could not be recorded there"
        ran = [variant for variant, output in zip(variants, expected, strict=True) if output is not None]
        shown = [output for output, wanted in zip(actual, expected, strict=True) if wanted is not None]
        # where the model skips layers at random, no recording tells what it does
        references = (partial(replayed, trace=analysis.traces[1]), masked_inside)
        for reference in references:
            with suppress(Exception), StillRandomness():
                gap = min(gap, difference(reference(analysis, twin, keep, ran, dtype), shown))
            if gap <= tolerance:
                break
    if gap > tolerance:
        raise RealizeError(
            f"in training mode the small model is not equal to the masked one: the largest difference is {gap:.3g} "
            f"(allowed {tolerance:g}, {str(dtype).removeprefix('torch.')}); the model was left as it was"
        )
    return None


def _run(model: nn.Module, variants: Any, dtype: torch.dtype) -> list[list[torch.Tensor] | None]:
    with torch.random.fork_rng(devices=[]), StillRandomness():
        return outputs_of(model, variants, dtype)
