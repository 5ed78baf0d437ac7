"""The report: one self-contained HTML page that shows what a run did, from its records."""

from dwindle.report.page import render_page, write_page
from dwindle.report.search_page import search_plot, sensitivity_plot, write_search_page
from dwindle.report.summary import Figure, Row, RunSummary, RuntimeFigures, SeedRun

__all__ = [
    "Figure",
    "Row",
    "RunSummary",
    "RuntimeFigures",
    "SeedRun",
    "render_page",
    "search_plot",
    "sensitivity_plot",
    "write_page",
    "write_search_page",
]
