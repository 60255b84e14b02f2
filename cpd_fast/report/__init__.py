"""The report of a run: numbers as data, and one self-contained HTML page made of them."""

from cpd_fast.report.html import render, write_report
from cpd_fast.report.results import Histogram, Results, Side, table

__all__ = ["Histogram", "Results", "Side", "render", "table", "write_report"]
