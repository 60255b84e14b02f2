"""Reports as Markdown: the same numbers as the page, for issues and READMEs."""

from __future__ import annotations

from collections.abc import Sequence

from cpd_fast.report.compare import HEAD, cells, rows_of
from cpd_fast.report.results import Results, table


def to_markdown(r: Results) -> str:
    """One run as Markdown."""
    lines = [f"# {r.model} on {r.task}", "", *_table(("", "before", "after", "change"), table(r))]
    if r.latency:
        threads = r.latency["threads"]
        lines += [
            "",
            f"Latency: {r.latency['backend']}, input {'x'.join(map(str, r.input_shape))}, {threads} CPU "
            f"thread{'s' if threads != 1 else ''}, {r.latency['runs']} runs of each network in turns, median.",
        ]
    lines += ["", "## Widths", "", *_table(("layer", "before", "after"), [(n, str(a), str(b)) for n, a, b in r.widths])]
    lines += ["", "## How it was made", "", f"    {r.command}", ""]
    lines += [f"- {k}: {v}" for k, v in r.environment.items()]
    if r.memory_mib is not None:
        lines.append(f"- peak memory: {r.memory_mib:.0f} MiB")
    lines += [f"- {n}" for n in r.notes]
    return "\n".join(lines) + "\n"


def comparison_markdown(runs: Sequence[tuple[str, Results]]) -> str:
    """Several runs as one Markdown table."""
    return "\n".join(_table(HEAD, cells(rows_of(runs)))) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(parts: Sequence[str]) -> str:
        return "| " + " | ".join(p.replace("|", r"\|") for p in parts) + " |"

    return [line(head), "|---" + "|---:" * (len(head) - 1) + "|", *map(line, rows)]
