"""Makes the page: one HTML file with everything in it, which asks nothing of any network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dwindle.config.errors import require
from dwindle.report import wording
from dwindle.report.journey import journey_plot
from dwindle.report.notes import notes_of, runtime_names
from dwindle.report.quantization_page import quantization_section
from dwindle.report.summary import Figure, Row, RunSummary
from dwindle.report.views import latency_views, layer_views, parity_views, proof_views

__all__ = ["render_page", "write_page"]


def write_page(summary: RunSummary, path: Path, title: str | None = None) -> None:
    """Write the page, atomically.

    Args:
        summary: What the run found.
        path: The HTML file.
        title: Heading; the summary's title when left out.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    text = render_page(summary, title)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def render_page(summary: RunSummary, title: str | None = None) -> str:
    """Return the page as text.

    Args:
        summary: What the run found.
        title: Heading; the summary's title when left out.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    jinja2 = require("jinja2", "report")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    for name in wording.__all__:
        environment.filters[name] = getattr(wording, name)
    style = (Path(__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    return environment.get_template("page.html.j2").render(
        summary=summary,
        title=title or summary.title,
        style=style,
        several=len(summary.seeds) > 1,
        sentence=sentence(summary),
        heroes=heroes(summary),
        table=figure_rows(summary),
        journey=journey_plot(summary),
        latency=latency_views(summary),
        layers=layer_views(summary),
        proofs=proof_views(summary),
        parity=parity_views(summary),
        quantized=quantization_sections(summary),
        notes=notes_of(summary),
    )


def quantization_sections(summary: RunSummary) -> list[tuple[str, str]]:
    """Return the label and the HTML of each stage that quantized, for the first seed."""
    return [
        (record["label"], quantization_section(record["result"]["quantization"]))
        for record in summary.seeds[0].stages
        if record["result"].get("quantization")
    ]


@dataclass(frozen=True)
class Hero:
    """One of the large figures at the top.

    Attributes:
        name: What it is.
        value: The figure.
        before: What it was.
        after: What it is now.
        share: After as a share of before (0 to 1), for the bar; None draws no bar.
        good: Whether it got better.
    """

    name: str
    value: str
    before: str
    after: str
    share: float | None
    good: bool


def heroes(summary: RunSummary) -> list[Hero]:
    """The large figures: operations, bytes, time, score; those that were measured."""
    first, last = summary.original, summary.final
    found = []
    for name, before, after, show in (
        ("smaller file", first.bytes, last.bytes, wording.bytes_text),
        ("fewer operations", first.macs, last.macs, wording.count_text),
    ):
        # What was not meant to change (operations, by int8 alone) is no headline.
        if before is not None and after is not None and after.mean and after.mean != before.mean:
            ratio = before.mean / after.mean
            share = min(after.mean / before.mean, 1.0)
            found.append(
                Hero(name, wording.times_text(ratio), show(before.mean), show(after.mean), share, ratio > 1.0)
            )
    speed = fastest(summary)
    if speed is not None:
        runtime, start, now = speed
        text = f"faster, torch float to {runtime}"
        found.append(
            Hero(
                text,
                wording.times_text(start / now),
                wording.milliseconds_text(start),
                wording.milliseconds_text(now),
                min(now / start, 1.0),
                start > now,
            )
        )
    score_before, score_after = first.score(summary.metric), last.score(summary.metric)
    if score_before is not None and score_after is not None:
        change = score_after.mean - score_before.mean
        if summary.metric == "agreement":
            found.append(
                Hero(
                    "same answers",
                    wording.percent_text(score_after.mean),
                    "original",
                    "final",
                    score_after.mean,
                    True,
                )
            )
        else:
            found.append(
                Hero(
                    "points of accuracy",
                    wording.points_text(change).replace(" points", ""),
                    wording.percent_text(score_before.mean),
                    wording.percent_text(score_after.mean),
                    score_after.mean,
                    change >= -0.01,
                )
            )
    return found


def fastest(summary: RunSummary) -> tuple[str, float, float] | None:
    """The runtime in which the final model is fastest, the original's time in torch, and the final time there."""
    start = summary.original.runtimes.get("torch")
    times = {
        name: figures.p50.mean
        for name, figures in summary.final.runtimes.items()
        if figures.p50 is not None and not figures.simulated
    }
    if start is None or start.p50 is None or not times:
        return None
    best = min(times, key=lambda name: times[name])
    return best, start.p50.mean, times[best]


def sentence(summary: RunSummary) -> str:
    """One sentence that says what happened to the model."""
    stages = [record["kind"] for record in summary.seeds[0].stages]
    verbs = {
        "train": "trained",
        "prune": "pruned",
        "factorize": "factorized",
        "finetune": "fine-tuned",
        "quantize": "quantized",
    }
    done = list(dict.fromkeys(verbs[kind] for kind in stages if kind in verbs))
    runs = f", {len(summary.seeds)} times over" if len(summary.seeds) > 1 else ""
    if not done:
        return f"{summary.model}, measured on {summary.data}{runs}."
    listed = done[0] if len(done) == 1 else f"{', '.join(done[:-1])} and {done[-1]}"
    return f"{summary.model}, {listed} on {summary.data}{runs}."


@dataclass(frozen=True)
class Cell:
    """A figure in the table.

    Attributes:
        text: The figure.
        note: Its relation to the original.
        title: All seeds, for a hint.
    """

    text: str
    note: str = ""
    title: str = ""


def figure_rows(summary: RunSummary) -> list[tuple[str, str, list[Cell]]]:
    """Rows of the table: name, unit or remark, and a cell a model."""
    rows: list[tuple[str, str, list[Cell]]] = []
    for name, remark, key, show in (
        ("Parameters", "", "parameters", wording.count_text),
        ("Multiply-accumulates", "a sample", "macs", wording.count_text),
        ("File", _file_remark(summary), "bytes", wording.bytes_text),
        ("Peak activations", "a batch", "peak_activation_bytes", wording.bytes_text),
    ):
        figures = [None if _is_simulated(row, key) else getattr(row, key) for row in summary.rows]
        if any(figure is not None for figure in figures):
            rows.append((name, remark, [_share_cell(figure, figures[0], show) for figure in figures]))
    for metric in ("accuracy", "agreement"):
        figures = [getattr(row, metric) for row in summary.rows]
        if any(figure is not None for figure in figures):
            remark = "with the original" if metric == "agreement" else "test data"
            rows.append((metric.capitalize(), remark, [_score_cell(f, figures[0], metric) for f in figures]))
    for runtime in runtime_names(summary):
        for quantile in ("p50", "p90"):
            cells = [_time_cell(row, summary.original, runtime, quantile) for row in summary.rows]
            if any(cell.text not in ("–", "fails") for cell in cells):
                rows.append((f"Latency, {runtime}", f"{quantile}", cells))
    return rows


def _is_simulated(row: Row, key: str) -> bool:
    """Whether a figure is that of torch's simulation rather than of the model that it stands for."""
    return key == "peak_activation_bytes" and any(figures.simulated for figures in row.runtimes.values())


def _file_remark(summary: RunSummary) -> str:
    names = {"onnxruntime": "ONNX", "openvino": "OpenVINO", "safetensors": "safetensors"}
    return names.get(summary.final.bytes_of or "", "")


def _share_cell(figure: Figure | None, first: Figure | None, show: Any) -> Cell:
    if figure is None:
        return Cell("–")
    note = (
        ""
        if first is None or figure is first or not first.mean
        else f"{figure.mean / first.mean * 100:.1f} %"
    )
    return Cell(show(figure.mean), note, _seeds_text(figure.values, show))


def _score_cell(figure: Figure | None, first: Figure | None, metric: str) -> Cell:
    if figure is None:
        return Cell("–")
    note = ""
    if metric == "accuracy" and first is not None and figure is not first:
        note = wording.points_text(figure.mean - first.mean)
    return Cell(wording.percent_text(figure.mean), note, _seeds_text(figure.values, wording.percent_text))


def _time_cell(row: Row, first: Row, runtime: str, quantile: str) -> Cell:
    figures = row.runtimes.get(runtime)
    if figures is None:
        return Cell("–")
    if figures.failure is not None:
        return Cell("fails", "", figures.failure)
    time: Figure | None = getattr(figures, quantile)
    if time is None:
        return Cell("–")
    if figures.simulated:
        return Cell("–", "simulated", "torch only simulates these numbers")
    start: Figure | None = getattr(first.runtimes.get(runtime), quantile, None)
    note = ""
    if start is not None and row is not first:
        ratio = start.mean / time.mean
        note = f"{ratio:.2f}× as fast" if ratio >= 1 else f"{1 / ratio:.2f}× slower"
    return Cell(
        wording.milliseconds_text(time.mean), note, _seeds_text(time.values, wording.milliseconds_text)
    )


def _seeds_text(values: Sequence[float], show: Any) -> str:
    return "" if len(values) < 2 else "each seed: " + ", ".join(show(value) for value in values)
