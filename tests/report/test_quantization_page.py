"""Pictures and the page about a quantized model."""

import base64
import re
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.quantization import ValueHistogram, quantization_report, quantize
from dwindle.report import histogram_figure, save_histograms, write_quantization_page

HISTOGRAM = ValueHistogram(
    "a <b>", "activation", 8, (0.0, 2.0), (-1.0, 3.0), 0.125, -1.0, 1.0, (5, 40, 30, 5)
)


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
    x = torch.randn(60, 6)
    return quantization_report(model, quantize(model, [x]), [x])


def test_bars_stand_where_the_values_are():
    (axes,) = histogram_figure([HISTOGRAM]).axes
    bars = [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in axes.patches]
    assert bars == [(-1.0, 1.0, 5), (0.0, 1.0, 40), (1.0, 1.0, 30), (2.0, 1.0, 5)]
    colours = [bar.get_facecolor() for bar in axes.patches]
    assert colours[0] == colours[3] != colours[1] == colours[2]  # outside of the range, and inside
    assert [float(line.get_xdata()[0]) for line in axes.lines] == [0.0, 2.0]
    assert "12.500% clipped" in axes.get_title()


def test_files(tmp_path, report):
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        path = tmp_path / f"picture{suffix}"
        save_histograms(report.histograms, path)
        assert path.read_bytes().startswith(start)
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(ConfigError, match=r"did you mean '\.png'"):
        save_histograms(report.histograms, tmp_path / "picture.pgn")
    with pytest.raises(ConfigError, match="no histogram"):
        save_histograms([], tmp_path / "picture.png")


def test_page_is_whole_and_escaped(tmp_path, report):
    record = report.to_json()
    record["histograms"].append(HISTOGRAM.to_json())
    record["layers"][0]["name"] = "<script>"
    record["layers"][1]["sqnr_db"] = None
    path = tmp_path / "page.html"
    write_quantization_page(record, path, title="A & B")
    text = path.read_text()
    assert "<h1>A &amp; B</h1>" in text
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "exact" in text
    assert not re.search(r'(src|href)="http', text)
    (source,) = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    picture = ElementTree.fromstring(base64.b64decode(source))
    words = "".join(picture.itertext())
    assert all(own.name in words for own in report.histograms)
    body = text[text.index("<tbody>") : text.index("</tbody>")]
    assert body.count("<tr>") == len(report.layers)
