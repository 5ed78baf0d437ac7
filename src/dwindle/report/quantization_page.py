"""The section and the page about a quantized model: layers worst first, and what their quantizers see."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dwindle.quantization.value_histograms import ValueHistogram
from dwindle.report.histogram_pictures import picture_source

__all__ = ["quantization_section", "write_quantization_page"]

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<title>{title}</title><style>{style}</style></head><body><main>
<h1>{title}</h1><section>{section}</section></main></body></html>
"""

_HEAD = (
    ("Layer", "the call"),
    ("Bits", "of the weight / of the activation that it reads"),
    ("SQNR", "signal to noise of the output, with all that was lost before"),
    ("Alone", "the same when this layer alone is quantized"),
    ("Weight", "signal to noise of the weight"),
    ("Range", "what the activation's levels stand for"),
    ("Clipped", "values of the activation outside of the range"),
)


def write_quantization_page(
    record: Mapping[str, Any], path: str | os.PathLike[str], title: str = "Quantization"
) -> None:
    """Write one self-contained HTML page about a quantized model, atomically.

    Args:
        record: What ``QuantizationReport.to_json()`` gave.
        path: The HTML file.
        title: Heading.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    style = (Path(__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    text = _PAGE.format(title=escape(title), style=style, section=quantization_section(record))
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, target)


def quantization_section(record: Mapping[str, Any]) -> str:
    """Return the HTML of the layers and their pictures.

    Args:
        record: What ``QuantizationReport.to_json()`` gave.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    layers = record["layers"]
    head = "".join(f'<th scope="col" title="{escape(hint)}">{name}</th>' for name, hint in _HEAD)
    rows = "".join(_row(layer) for layer in layers)
    table = (
        '<div class="scroll" tabindex="0" role="region" aria-label="Quantized layers">'
        f'<table class="figures plain"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )
    if len(layers) > 24:
        table = f"<details open><summary>{len(layers)} layers</summary>{table}</details>"
    return f'<p class="hint">{escape(_sentence(record))}</p>{table}{_pictures(record.get("histograms", ()))}'


def _sentence(record: Mapping[str, Any]) -> str:
    output = record["output"]
    ratio = "exact" if output["sqnr_db"] is None else f"at {output['sqnr_db']:.1f} dB signal to noise"
    return (
        f"The simulated output is {ratio}, with {output['equal_predictions']:.2%} equal predictions in "
        f"{output['samples']} rows. The layer that is worst off stands on top."
    )


def _row(layer: Mapping[str, Any]) -> str:
    low, high = layer["input_range"]
    cells = [
        f"{layer['weight_bits']} / {layer['input_bits']}",
        *(_decibels(layer[name]) for name in ("sqnr_db", "own_sqnr_db", "weight_sqnr_db")),
        f"{low:.3g} to {high:.3g}",
        f"{layer['clipped']:.3%}",
    ]
    columns = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr><th scope="row">{escape(layer["name"])}</th>{columns}</tr>'


def _decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"


def _pictures(records: Sequence[Mapping[str, Any]]) -> str:
    if not records:
        return ""
    histograms = [ValueHistogram.from_json(dict(record)) for record in records]
    words = "; ".join(f"{own.name}: {own.clipped:.3%} clipped" for own in histograms)
    return (
        "<h3>What the quantizers of the worst layers see</h3>"
        '<p class="hint">Counts on a logarithmic scale; dashed: the range of the levels; red: clipped.</p>'
        f'<img style="width:100%" alt="{escape(words)}" src="{picture_source(histograms)}">'
    )
