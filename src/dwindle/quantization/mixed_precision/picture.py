"""The picture of a choice of bits. Imports matplotlib."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from dwindle.quantization.mixed_precision.result import MixedPrecision


def draw(result: MixedPrecision, path: str | os.PathLike[str]) -> None:
    """Write the picture of a choice to a file.

    Args:
        result: The choice.
        path: The ending says the kind of file.
    """
    knows = any(own.trace is not None for own in result.layers)
    count = 1 + knows + bool(result.frontier)
    figure = Figure(figsize=(max(6.0, 0.28 * len(result.layers) + 2), 2.6 * count), layout="constrained")
    axes = list(figure.subplots(count, 1, squeeze=False)[:, 0])
    _bits(axes[0], result)
    if knows:
        _traces(axes[1], result)
    if result.frontier:
        _frontier(axes[-1], result)
    figure.savefig(path, dpi=120)


def _names(axes: Any, result: MixedPrecision) -> None:
    names = [own.name.removesuffix(".weight") for own in result.layers]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.margins(x=0.01)


def _bits(axes: Any, result: MixedPrecision) -> None:
    places = range(len(result.layers))
    axes.bar([own - 0.2 for own in places], [own.weight_bits for own in result.layers], 0.4, label="weight")
    axes.bar(
        [own + 0.2 for own in places], [own.activation_bits for own in result.layers], 0.4, label="input"
    )
    axes.set_ylabel("bits")
    axes.set_title(f"compression {result.ratio:.2f}x ({result.cost.replace('_', ' ')})", fontsize=10)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)
    _names(axes, result)


def _traces(axes: Any, result: MixedPrecision) -> None:
    means = [abs(own.trace or 0.0) / own.size for own in result.layers]
    errors = [(own.trace_error or 0.0) / own.size for own in result.layers]
    axes.errorbar(range(len(means)), means, yerr=errors, fmt="o-", markersize=3)
    if all(mean > 0 for mean in means):
        axes.set_yscale("log")
    axes.set_ylabel("mean trace")
    _names(axes, result)


def _frontier(axes: Any, result: MixedPrecision) -> None:
    axes.plot(
        [ratio for ratio, _ in result.frontier], [harm for _, harm in result.frontier], "-", linewidth=1
    )
    if result.harm is not None:
        axes.plot([result.ratio], [result.harm], "o", label="chosen")
        axes.legend(fontsize=8)
    if all(harm > 0 for _, harm in result.frontier):
        axes.set_yscale("log")
    axes.set_xlabel(f"compression ratio ({result.cost.replace('_', ' ')})")
    axes.set_ylabel("expected harm")


__all__ = ["draw"]
