"""One self-contained HTML page: inline CSS, inline SVG, pictures as data, no network; for phone and desk."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from html import escape
from pathlib import Path

from cpd_fast.report.charts import LEFT, WIDTH, class_changes, quality_over_training
from cpd_fast.report.results import MOST_CLASSES, Histogram, Results, Side, class_rows, millions, table

PAGE = Path(__file__).with_name("page.css")
GROUPS = "groups.html"  # in a run folder: the drawing of the groups, a piece of HTML
MAX_POINTS = 240  # of a curve


def write_report(
    results: Results, folder: str | os.PathLike[str], write: Callable[[str, str], object] | None = None
) -> Path:
    """Write ``report.html`` into a run folder.

    Args:
        results: The numbers.
        folder: Where the pictures that ``results.tiles`` names are, and where the report goes.
        write: ``write(name, text)`` that puts a file into the folder; default: plain writing.

    Returns:
        Path of the report.
    """
    folder = Path(folder)
    page = render(results, folder)
    if write is None:
        (folder / "report.html").write_text(page)
    else:
        write("report.html", page)
    return folder / "report.html"


def render(results: Results, folder: str | os.PathLike[str] | None = None) -> str:
    """The report as one HTML document.

    Args:
        results: The numbers.
        folder: Where its pictures are; without it, or where a picture is missing, pictures are left out.
    """
    r = results
    parts = [
        _headline(r),
        _section("Before and after", _table(r), _latency_text(r)),
        _section(
            "Classes, the largest loss first",
            _legend(("before", "dense"), ("after, not worse", "kept"), ("after, worse", "gone")),
            class_changes(r),
        )
        if 1 < len(class_rows(r)) <= MOST_CLASSES
        else "",
        _section("What it sees", *_tiles(r, folder)) if r.tiles else "",
        _section("Width of every layer", _legend(("before", "dense"), ("after", "kept")), _widths(r)),
        _section(
            "Scores of the channels",
            "<p>Magnitude of the scores at the first scoring, logarithmic; further right is more important. "
            "Later scorings see the network as it is by then, so that the two colours overlap.</p>",
            _legend(("stay", "kept"), ("go", "gone")),
            f'<div class="grid">{"".join(_histogram(h) for h in r.histograms)}</div>',
        )
        if r.histograms
        else "",
        _section("Channels that only go together", figure) if (figure := _groups(folder)) else "",
        _section("Training", quality_over_training(r), _curve(r)) if r.curve else "",
        _section("How it was made", *_made(r)),
    ]
    title = f"{r.model} on {r.task}: {_times(r.teacher.macs, r.student.macs)} fewer MACs"
    return document(title, "".join(parts))


def document(title: str, body: str) -> str:
    """A self-contained page: inline styles, no network."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{PAGE.read_text()}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )


# ------------------------------------------------------------------------------------------------------- sections
def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>\n"


def _headline(r: Results) -> str:
    a, b = r.teacher, r.student
    quality = (
        ("mIoU", a.miou, b.miou) if a.miou is not None and b.miou is not None else ("accuracy", a.accuracy, b.accuracy)
    )
    cards = [
        _card("MACs", f"{b.macs / a.macs:.0%}", f"{millions(a.macs)} to {millions(b.macs)}"),
        _card("parameters", f"{b.params / a.params:.0%}", f"{millions(a.params, 2)} to {millions(b.params, 2)}"),
    ]
    if a.latency_ms and b.latency_ms:
        cards.append(
            _card("speed", _times(a.latency_ms, b.latency_ms), f"{a.latency_ms:.2f} ms to {b.latency_ms:.2f} ms")
        )
    name, before, after = quality
    cards.append(_card(f"{name}, test", f"{after:.3f}", f"was {before:.3f} ({(after - before) * 100:+.1f} points)"))
    return (
        f'<header><p class="eyebrow">cpd_fast &middot; comb, prune, distill</p><h1>{escape(r.model)}</h1>'
        f'<p class="lead">on {escape(r.task)}, physically smaller</p>'
        f'<div class="cards">{"".join(cards)}</div></header>\n'
    )


def _card(name: str, value: str, detail: str) -> str:
    parts = f"<span>{escape(name)}</span><strong>{escape(value)}</strong><small>{escape(detail)}</small>"
    return f'<div class="card">{parts}</div>'


def _table(r: Results) -> str:
    rows = "".join(
        f"<tr><th scope=row>{escape(what)}</th><td>{escape(before)}</td><td><b>{escape(after)}</b></td>"
        f'<td class="change">{escape(change)}</td></tr>'
        for what, before, after, change in table(r)
    )
    head = "<thead><tr><th></th><th>before</th><th>after</th><th>change</th></tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'


def _latency_text(r: Results) -> str:
    if not r.latency:
        return ""

    def one(s: Side) -> str:
        return f"{s.latency_ms:.3f} ms [{s.latency_low_ms:.3f}, {s.latency_high_ms:.3f}]"

    shape = "x".join(map(str, r.input_shape))
    threads = r.latency["threads"]
    left_out = int(r.latency.get("left_out", 0))
    busy = f" ({left_out} of all left out: another process took the core)" if left_out else ""
    return (
        f'<p class="fine">Latency: {escape(str(r.latency["backend"]))}, input {shape}, '
        f"{threads} CPU thread{'s' if threads != 1 else ''}, {r.latency['runs']} runs of each network in turns{busy}, "
        f"median and its 95 % interval: {one(r.teacher)} before, {one(r.student)} after.</p>"
    )


def _tiles(r: Results, folder: str | os.PathLike[str] | None) -> list[str]:
    if not r.is_segmentation:
        return [f'<div class="shots">{"".join(_shot(t, folder) for t in r.tiles)}</div>']
    swatches = "".join(
        f'<span><i style="background:rgb({c[0]},{c[1]},{c[2]})"></i>{escape(n)}</span>'
        for n, c in zip(r.classes, r.palette, strict=True)
    )
    kinds = (("picture", "picture"), ("label", "label"), ("teacher", "before"), ("student", "after"))
    head = "".join(f"<span>{title}</span>" for _, title in kinds)
    rows = "".join(
        _picture(folder, t.get(kind, ""), f"{title} {n}") for n, t in enumerate(r.tiles, 1) for kind, title in kinds
    )
    return [
        "<p>Pictures of the test split, chosen by their labels alone: those with many classes.</p>",
        f'<div class="legend">{swatches}</div><div class="tiles"><div class="head">{head}</div>{rows}</div>',
    ]


def _shot(t: dict[str, str], folder: str | os.PathLike[str] | None) -> str:
    def mark(kind: str, title: str) -> str:
        ok = t[kind] == t["label"]
        return f'<span class="{"ok" if ok else "bad"}">{title}: {escape(t[kind])}</span>'

    picture = _picture(folder, t["picture"], t["label"])
    caption = f"<b>{escape(t['label'])}</b>{mark('teacher', 'before')}{mark('student', 'after')}"
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _picture(folder: str | os.PathLike[str] | None, name: str, alt: str) -> str:
    path = Path(folder) / name if folder is not None and name else None
    if path is None or not path.is_file():
        return f'<span class="missing">{escape(alt)}</span>'
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def _groups(folder: str | os.PathLike[str] | None) -> str:
    """The drawing of coupled groups that the run left in its folder."""
    path = None if folder is None else Path(folder) / GROUPS
    return path.read_text() if path is not None and path.is_file() else ""


def _legend(*items: tuple[str, str]) -> str:
    spans = "".join(f'<span><i class="{kind}"></i>{escape(text)}</span>' for text, kind in items)
    return f'<div class="legend">{spans}</div>'


def _widths(r: Results) -> str:
    widest = max((before for _, before, _ in r.widths), default=1)
    rows = "".join(
        f'<div class="bar" title="{escape(name)}: {before} to {after}"><span><bdi>{escape(name)}</bdi></span>'
        f'<span class="track"><i class="dense" style="width:{100 * before / widest:.2f}%"></i>'
        f'<i class="kept" style="width:{100 * after / widest:.2f}%"></i></span>'
        f"<span>{before}{f' &rarr; <b>{after}</b>' if after != before else ''}</span></div>"
        for name, before, after in r.widths
    )
    return f'<div class="bars">{rows}</div>'


def _histogram(h: Histogram) -> str:
    width, height = 300, 110
    top = max((k + g for k, g in zip(h.kept, h.removed, strict=True)), default=0) or 1
    step = width / len(h.kept)
    bars = []
    for i, (kept, gone) in enumerate(zip(h.kept, h.removed, strict=True)):
        k, g = kept / top * height, gone / top * height
        x, w = f"{i * step + 0.5:.1f}", f"{step - 1:.1f}"
        if kept:
            bars.append(f'<rect class="kept" x="{x}" y="{height - k:.1f}" width="{w}" height="{k:.1f}"/>')
        if gone:
            bars.append(f'<rect class="gone" x="{x}" y="{height - k - g:.1f}" width="{w}" height="{g:.1f}"/>')
    low, high = f"{10 ** h.edges[0]:.0e}", f"{10 ** h.edges[-1]:.0e}"
    return (
        f"<figure class=chart><figcaption>{escape(h.title)}</figcaption>"
        f'<svg viewBox="0 0 {width} {height + 16}" role="img" aria-label="score histogram of {escape(h.title)}">'
        f'<g>{"".join(bars)}</g><path class="axis" d="M0 {height}.5H{width}"/>'
        f'<text x="0" y="{height + 13}">{low}</text><text x="{width}" y="{height + 13}" text-anchor="end">{high}</text>'
        f"</svg></figure>"
    )


def _curve(r: Results) -> str:
    """Loss over all steps, one stretch a stage, with the pruning events."""
    width, height = WIDTH - LEFT, 220  # the stages are below those of the chart above
    stages = list(dict.fromkeys(s for s, _, _ in r.curve))
    top = sorted(v for _, _, v in r.curve)[int(0.98 * (len(r.curve) - 1))] * 1.05 or 1.0
    n, parts, start = len(r.curve), [], 0
    titles = {"teacher": "teacher", "prune": "prune", "finetune": "fine-tune"}
    for stage in stages:
        values = [v for s, _, v in r.curve if s == stage]
        every = max(1, len(values) * len(stages) // MAX_POINTS)
        x0 = start / n * width
        points = [
            ((start + i) / n * width, height - min(v / top, 1) * (height - 44))
            for i, v in enumerate(values)
            if i % every == 0
        ]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path class="axis" d="M{x0:.1f} 0V{height}"/><path class="line {stage}" d="{path}"/>')
        parts.append(f'<text x="{x0 + 6:.1f}" y="14">{titles.get(stage, escape(stage))}</text>')
        if stage == "prune":
            first = start
            for step, share in r.steps:
                x = (first + step) / n * width
                parts.append(f'<path class="event" d="M{x:.1f} 24V{height}"/>')
                parts.append(f'<text class="small" x="{x + 3:.1f}" y="34">{share:.0%}</text>')
        start += len(values)
    return (
        f'<div class="scroll"><svg class="wide" viewBox="{-LEFT} 0 {WIDTH + 4} {height + 4}" role="img" '
        'aria-label="loss">'
        f"{''.join(parts)}<path class=axis d='M0 {height}.5H{width}'/></svg></div>"
        f'<p class="fine">Loss of every step (0 to {top:.2f}); while distilling, the imitation term is part of it. '
        "Dashed: channels scored and masked, with the share of MACs that remains.</p>"
    )


def _made(r: Results) -> list[str]:
    settings = ", ".join(f"{k} {v}" for k, v in r.settings.items() if v != "")
    facts = {
        "Command": f"<code>{escape(r.command)}</code>",
        "Settings": escape(settings),
        "Time": escape(", ".join(f"{k} {v:.0f} s" for k, v in r.seconds.items())),
        "Memory": "" if r.memory_mib is None else f"peak {r.memory_mib:.0f} MiB, the measurements at the end included",
        "Versions": escape(
            ", ".join(f"{k} {v}" for k, v in r.environment.items() if k not in ("device", "threads", "system"))
        ),
        "Device": escape(
            ", ".join(r.environment.get(k, "") for k in ("device", "system"))
            + f", {r.environment.get('threads')} threads"
        ),
    }
    rows = "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in facts.items() if v)
    notes = "".join(f"<li>{escape(n)}</li>" for n in r.notes)
    return [f"<dl>{rows}</dl>", f"<ul>{notes}</ul>" if notes else ""]


def _times(before: float, after: float) -> str:
    return f"{before / after:.2f}x" if after else ""
