"""The report of a run: numbers as data, and one self-contained HTML page made of them."""

from cpd_fast.report.compare import comparison_json, render_comparison
from cpd_fast.report.groups import groups_figure, render_groups
from cpd_fast.report.html import GROUPS, render, write_report
from cpd_fast.report.markdown import comparison_markdown, to_markdown
from cpd_fast.report.results import Histogram, Results, Side, table

__all__ = [
    "GROUPS",
    "Histogram",
    "Results",
    "Side",
    "comparison_json",
    "comparison_markdown",
    "groups_figure",
    "render",
    "render_comparison",
    "render_groups",
    "table",
    "to_markdown",
    "write_report",
]
