"""The page is well formed, asks nothing of a network, and shows the values of the records."""

from __future__ import annotations

import html.parser
import json
import re

import pytest

from dwindle.config.errors import FileFormatError
from dwindle.report import Figure, RunSummary, render_page
from dwindle.report.journey import journey_plot
from dwindle.report.notes import notes_of
from dwindle.report.wording import bytes_text, count_text, milliseconds_text, percent_text, points_text

_VOID = {"meta", "link", "rect", "line", "polyline", "br"}


class _Reader(html.parser.HTMLParser):
    """Collects tables and checks that every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.cell = False

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.rows[-1][-1] += " " + data.strip()


def _read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_table_shows_the_records(summary: RunSummary) -> None:
    rows = {
        row[0].split()[0] + row[0].split()[-1]: row
        for row in _read(render_page(summary)).rows
        if len(row) == 4
    }
    assert [cell.split() for cell in rows["ParametersParameters"][1:]] == [
        ["1.00", "k"], ["400", "40.0", "%"], ["100", "10.0", "%"],
    ]  # fmt: skip
    assert "97.50 %" in rows["Accuracydata"][1]
    assert "97.25 %" in rows["Accuracydata"][3]
    assert "−0.25 points" in rows["Accuracydata"][3]
    assert "2.00× as fast" in rows["Latency,p50"][3]
    assert "simulated" in " ".join(cell for row in _read(render_page(summary)).rows for cell in row)


def test_nothing_comes_from_outside(summary: RunSummary) -> None:
    page = render_page(summary)
    assert not re.search(r"https?:|//[a-z]|@import|<script|url\(", page)
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["data:,"]


def test_text_is_escaped(summary: RunSummary) -> None:
    page = render_page(summary)
    assert "A &lt;test&gt; &amp; more" in page
    assert "name: &lt;r&gt;" in page
    assert "<test>" not in page


def test_proof_widths_and_cuts(summary: RunSummary) -> None:
    page = render_page(summary)
    assert "3.5e-15" in page
    assert "64 → <b>24</b>" in page
    assert "body.first.weight[0], head.weight[1]" in page
    assert "10.0 %" in page  # zeros of the head


def test_pictures_have_words(summary: RunSummary) -> None:
    assert (
        'aria-label="Accuracy after every stage: train 97.50 %, prune 39.50 %, quantize 97.25 %"'
        in journey_plot(summary)
    )
    assert page_images_without_words(render_page(summary)) == []


def page_images_without_words(page: str) -> list[str]:
    return [tag for tag in re.findall(r'<[^>]*role="img"[^>]*>', page) if "aria-label" not in tag]


def test_honest_notes(summary: RunSummary) -> None:
    notes = " ".join(notes_of(summary))
    assert "gives up 0.25 points" in notes
    assert "In the worst of 2 seeds it gives up 0.50 points" in notes
    assert "In onnxruntime, “int8” is no faster than “pruned”: 0.500 ms before, 1.00 ms after." in notes
    assert "99.50 % of the final model's answers" in notes


def test_without_labels(unlabelled: RunSummary) -> None:
    page = render_page(unlabelled)
    _read(page)
    assert "same answers" in page
    assert "Accuracy" not in page
    assert "no labels" in " ".join(notes_of(unlabelled))
    assert "Latency" not in page


def test_one_seed_and_one_model(summary: RunSummary) -> None:
    values = summary.to_json()
    values["rows"] = values["rows"][:1]
    values["seeds"] = values["seeds"][:1]
    values["seeds"][0]["stages"] = values["seeds"][0]["stages"][:1]
    page = render_page(RunSummary.from_json(values))
    _read(page)
    assert "Each seed" not in page


def test_summary_round_trip(summary: RunSummary) -> None:
    values = json.loads(json.dumps(summary.to_json()))
    assert RunSummary.from_json(values) == summary
    assert "p50" not in json.dumps(summary.table())
    with pytest.raises(FileFormatError, match="not the summary"):
        RunSummary.from_json({"format": "x"})
    del values["rows"][0]["macs"]
    with pytest.raises(FileFormatError, match="damaged"):
        RunSummary.from_json(values)


def test_figure() -> None:
    assert Figure.of([1.0, None]) is None
    figure = Figure.of([1.0, 2.0])
    assert figure is not None
    assert figure.mean == 1.5


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (count_text(308074), "308 k"), (count_text(94007), "94.0 k"), (count_text(999.9), "1.00 k"),
        (count_text(7), "7.00"),
        (bytes_text(116908), "117 kB"), (bytes_text(512), "512 B"),
        (milliseconds_text(0.1552), "0.155 ms"), (milliseconds_text(12.34), "12.3 ms"),
        (milliseconds_text(0.0123), "0.0123 ms"),
        (percent_text(1.0), "100 %"), (percent_text(0.99999), "99.99 %"), (percent_text(0.98889), "98.89 %"),
        (points_text(-0.0022), "−0.22 points"), (points_text(0.0), "±0.00 points"), (points_text(0.01), "+1.00 points"),
    ],
)  # fmt: skip
def test_wording(written: str, expected: str) -> None:
    assert written == expected
