"""Several runs side by side: a table, and quality against cost; HTML, Markdown and JSON are views of the same rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape

from cpd_fast.report.charts import against, main_quality, quality_name
from cpd_fast.report.html import document
from cpd_fast.report.results import Results

HEAD = ("run", "model", "data", "MACs left", "parameters left", "speed", "before", "after", "change")


@dataclass(frozen=True)
class Row:
    """One run of a comparison.

    Attributes:
        run: Name of its folder.
        model: Name of the network.
        task: Name of the data.
        macs_left: Share of the MACs that remains.
        params_left: Share of the parameters that remains.
        speed: Latency before over latency after; None where it was not measured.
        before: mIoU or accuracy of the original, test split.
        after: Of the compressed network.
        quality: What these two are: ``"mIoU"`` or ``"accuracy"``.
        macs: Multiply-accumulates of the compressed network.
        params: Its parameters.
        latency_ms: Its latency, milliseconds; None where it was not measured.
    """

    run: str
    model: str
    task: str
    macs_left: float
    params_left: float
    speed: float | None
    before: float
    after: float
    quality: str
    macs: int
    params: int
    latency_ms: float | None


def rows_of(runs: Sequence[tuple[str, Results]]) -> list[Row]:
    """The comparison as data; runs are ``(name, results)``."""
    rows = []
    for name, r in runs:
        a, b = r.teacher, r.student
        speed = a.latency_ms / b.latency_ms if a.latency_ms and b.latency_ms else None
        rows.append(
            Row(name, r.model, r.task, b.macs / a.macs, b.params / a.params, speed,
                main_quality(r, False), main_quality(r, True), quality_name(r), b.macs, b.params, b.latency_ms)
        )  # fmt: skip
    return rows


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The rows as text, under ``HEAD``."""
    return [
        (
            r.run,
            r.model,
            r.task,
            f"{r.macs_left:.1%}",
            f"{r.params_left:.1%}",
            "" if r.speed is None else f"{r.speed:.2f}x",
            f"{r.before:.3f} {r.quality}",
            f"{r.after:.3f}",
            f"{(r.after - r.before) * 100:+.1f} points",
        )
        for r in rows
    ]


def comparison_json(runs: Sequence[tuple[str, Results]]) -> str:
    """The comparison as JSON."""
    return json.dumps([asdict(r) for r in rows_of(runs)], indent=1)


def _charts(some: Sequence[tuple[str, Results]], numbers: Sequence[int]) -> str:
    return against(some, "macs", numbers) + against(some, "latency_ms", numbers)


def render_comparison(runs: Sequence[tuple[str, Results]]) -> str:
    """The comparison as one self-contained HTML page."""
    body = "".join(
        f"<tr><th scope=row>{n}. {escape(c[0])}</th>{''.join(f'<td>{escape(v)}</td>' for v in c[1:])}</tr>"
        for n, c in enumerate(cells(rows_of(runs)), 1)
    )
    head = "".join(f"<th>{escape(h)}</th>" for h in HEAD)
    by_task: dict[tuple[str, bool], list[tuple[str, Results]]] = {}
    for name, r in runs:
        by_task.setdefault((r.task, r.is_segmentation), []).append((name, r))
    numbers = {id(r): n for n, (_, r) in enumerate(runs, 1)}
    charts = "".join(
        f'<section><h2>{escape(task)}</h2><p class="fine">Rings: before; dots: after. '
        + ", ".join(f"{numbers[id(r)]}: {escape(name)}" for name, r in some)
        + f'</p><div class="grid two">{_charts(some, [numbers[id(r)] for _, r in some])}</div></section>\n'
        for (task, _), some in by_task.items()
    )
    machines = {", ".join(r.environment.get(k, "") for k in ("device", "torch", "threads")) for _, r in runs}
    note = (
        '<p class="fine">Measured on different machines: compare latencies with care.</p>' if len(machines) > 1 else ""
    )
    return document(
        f"{len(runs)} runs of cpd_fast",
        f'<header><p class="eyebrow">cpd_fast &middot; comparison</p><h1>{len(runs)} runs</h1></header>'
        f'<section><h2>Side by side</h2><div class="scroll"><table class="runs"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{note}</section>\n{charts}",
    )
