"""The picture of a choice of bits. Imports matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dwindle.quantization.mixed_precision.layer_bits import LayerBits

Point = tuple[float, float]
"""Compression ratio and expected harm."""


def draw(
    layers: Sequence[LayerBits],
    title: str,
    chosen: Point | None,
    frontier: Sequence[Point],
    path: str | os.PathLike[str],
) -> None:
    """Write the picture of a choice to a file.

    Args:
        layers: In the order of use.
        title: What the choice compresses.
        chosen: Where it stands on the frontier; None where that is not known.
        frontier: Its corners; empty where it is not known.
        path: The ending says the kind of file.
    """
    knows = any(own.trace is not None for own in layers)
    count = 1 + knows + bool(frontier)
    figure = Figure(figsize=(max(6.0, 0.28 * len(layers) + 2), 2.6 * count), layout="constrained")
    axes = list(figure.subplots(count, 1, squeeze=False)[:, 0])
    _bits(axes[0], layers, title)
    if knows:
        _traces(axes[1], layers)
    if frontier:
        _frontier(axes[-1], chosen, frontier)
    figure.savefig(path, dpi=120)


def _names(axes: Any, layers: Sequence[LayerBits]) -> None:
    names = [own.name.removesuffix(".weight") for own in layers]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.margins(x=0.01)


def _bits(axes: Any, layers: Sequence[LayerBits], title: str) -> None:
    places = range(len(layers))
    axes.bar([own - 0.2 for own in places], [own.weight_bits for own in layers], 0.4, label="weight")
    axes.bar([own + 0.2 for own in places], [own.activation_bits for own in layers], 0.4, label="input")
    axes.set_ylabel("bits")
    axes.set_title(title, fontsize=10)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)
    _names(axes, layers)


def _traces(axes: Any, layers: Sequence[LayerBits]) -> None:
    means = [abs(own.trace or 0.0) / own.size for own in layers]
    errors = [(own.trace_error or 0.0) / own.size for own in layers]
    axes.errorbar(range(len(means)), means, yerr=errors, fmt="o-", markersize=3)
    if all(mean > 0 for mean in means):
        axes.set_yscale("log")
    axes.set_ylabel("mean trace")
    _names(axes, layers)


def _frontier(axes: Any, chosen: Point | None, frontier: Sequence[Point]) -> None:
    axes.plot([ratio for ratio, _ in frontier], [harm for _, harm in frontier], "-", linewidth=1)
    if chosen is not None:
        axes.plot([chosen[0]], [chosen[1]], "o", label="chosen")
        axes.legend(fontsize=8)
    if all(harm > 0 for _, harm in frontier):
        axes.set_yscale("log")
    axes.set_xlabel("compression ratio")
    axes.set_ylabel("expected harm")


__all__ = ["draw"]
