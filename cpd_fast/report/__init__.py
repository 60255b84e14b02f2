"""The report of a run: numbers as data, and one self-contained HTML page made of them."""

from cpd_fast.report.groups import groups_figure, render_groups
from cpd_fast.report.html import GROUPS, render, write_report
from cpd_fast.report.results import Histogram, Results, Side, table

__all__ = [
    "GROUPS",
    "Histogram",
    "Results",
    "Side",
    "groups_figure",
    "render",
    "render_groups",
    "table",
    "write_report",
]
