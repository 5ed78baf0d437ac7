"""Pictures of what quantizers see: a histogram each, with the range of the levels and what lies outside of it."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dwindle.config.errors import ConfigError, did_you_mean, require
from dwindle.quantization.value_histograms import ValueHistogram

__all__ = ["histogram_figure", "picture_source", "save_histograms"]

_INSIDE, _OUTSIDE, _EDGE, _INK = "#4f83c4", "#d9534f", "#8a8a8a", "#808080"
"""Colours that are readable on white and on black."""

SUFFIXES = (".png", ".svg", ".pdf")


def histogram_figure(histograms: Sequence[ValueHistogram], columns: int = 2) -> Any:
    """Return a matplotlib figure with a picture for each histogram, counts on a logarithmic scale.

    Args:
        histograms: What to draw, in rows from the left.
        columns: Pictures in a row.

    Raises:
        ConfigError: There is nothing to draw.
        MissingDependencyError: matplotlib is not installed.
    """
    if not histograms:
        raise ConfigError("there is no histogram to draw")
    require("matplotlib", "report")
    from matplotlib.figure import Figure

    rows = -(-len(histograms) // columns)
    figure = Figure(figsize=(4.6 * columns, 1.9 * rows), layout="constrained")
    figure.patch.set_alpha(0.0)
    for index, histogram in enumerate(histograms):
        _draw(figure.add_subplot(rows, columns, index + 1), histogram)
    return figure


def _draw(axes: Any, histogram: ValueHistogram) -> None:
    """Draw one histogram: bars within the range, bars outside of it, the edges of the range."""
    low, high = histogram.range
    lefts = [histogram.first + histogram.width * index for index in range(len(histogram.counts))]
    middles = [left + histogram.width / 2 for left in lefts]
    colours = [_INSIDE if low <= middle <= high else _OUTSIDE for middle in middles]
    axes.bar(lefts, histogram.counts, histogram.width, align="edge", color=colours, log=True)
    for edge in (low, high):
        axes.axvline(edge, color=_EDGE, linewidth=1.0, linestyle="--")
    axes.set_title(
        f"{histogram.name}\n{histogram.kind}, {histogram.bits} bits, {histogram.clipped:.3%} clipped",
        fontsize=7,
        color=_INK,
    )
    axes.patch.set_alpha(0.0)
    axes.tick_params(labelsize=6, colors=_INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def save_histograms(
    histograms: Sequence[ValueHistogram], path: str | os.PathLike[str], columns: int = 2
) -> None:
    """Write the pictures as one file, atomically.

    Args:
        histograms: What to draw.
        path: A ``.png``, ``.svg`` or ``.pdf``.
        columns: Pictures in a row.

    Raises:
        ConfigError: The suffix is another one, or there is nothing to draw.
        MissingDependencyError: matplotlib is not installed.
    """
    target = Path(path)
    if target.suffix not in SUFFIXES:
        raise ConfigError(
            f"{target.name!r} must end in {', '.join(SUFFIXES)}{did_you_mean(target.suffix, SUFFIXES)}"
        )
    figure = histogram_figure(histograms, columns)
    part = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        figure.savefig(part, dpi=150)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def picture_source(histograms: Sequence[ValueHistogram], columns: int = 2) -> str:
    """Return the pictures as the ``src`` of an HTML image, which needs no file beside the page.

    Args:
        histograms: What to draw.
        columns: Pictures in a row.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dwindle"}):
        histogram_figure(histograms, columns).savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
