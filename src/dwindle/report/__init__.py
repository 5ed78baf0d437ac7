"""The report: one self-contained HTML page that shows what a run did, from its records."""

from dwindle.report.histogram_pictures import histogram_figure, save_histograms
from dwindle.report.page import render_page, write_page
from dwindle.report.quantization_page import quantization_section, write_quantization_page
from dwindle.report.search_page import search_plot, sensitivity_plot, write_search_page
from dwindle.report.sensitivity_page import curves_plot, write_sensitivity_page
from dwindle.report.study_page import front_plot, history_plot, write_study_page
from dwindle.report.summary import Figure, Row, RunSummary, RuntimeFigures, SeedRun

__all__ = [
    "Figure",
    "Row",
    "RunSummary",
    "RuntimeFigures",
    "SeedRun",
    "curves_plot",
    "front_plot",
    "histogram_figure",
    "history_plot",
    "quantization_section",
    "render_page",
    "save_histograms",
    "search_plot",
    "sensitivity_plot",
    "write_page",
    "write_quantization_page",
    "write_search_page",
    "write_sensitivity_page",
    "write_study_page",
]
