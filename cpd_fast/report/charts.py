"""Inline SVG charts of runs: quality over training, classes before and after, quality against cost."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from cpd_fast.report.results import Results, class_rows

WIDTH, HEIGHT = 900, 200
LEFT, BOTTOM = 52, 30  # room for the labels of the axes


def quality_name(r: Results) -> str:
    """What quality is called."""
    return "mIoU" if r.is_segmentation else "accuracy"


def main_quality(r: Results, student: bool) -> float:
    """The figure a run is judged by, of one of its two networks."""
    side = r.student if student else r.teacher
    return side.accuracy if side.miou is None else side.miou


def quality_over_training(r: Results) -> str:
    """Quality on some val pictures (line) and the share of MACs that remains (steps), over all training steps."""
    start: dict[str, int] = {}
    for n, (stage, _, _) in enumerate(r.curve):
        start.setdefault(stage, n)
    total = max(len(r.curve), 1)
    points = [((start.get(s, 0) + step) / total, q, share) for s, step, q, share in r.quality]
    if len(points) < 2:
        return ""
    x = [LEFT + p[0] * (WIDTH - LEFT) for p in points]

    def y(value: float) -> float:
        return HEIGHT - max(0.0, min(value, 1.0)) * (HEIGHT - 10)

    line = "M" + "L".join(f"{a:.1f} {y(p[1]):.1f}" for a, p in zip(x, points, strict=True))
    drops = [((start.get("prune", 0) + n) / total, share) for n, share in r.steps] or [(p[0], p[2]) for p in points]
    steps = f"M{LEFT} {y(1):.1f}" + "".join(f"H{LEFT + a * (WIDTH - LEFT):.1f}V{y(s):.1f}" for a, s in drops)
    grid = "".join(
        f'<path class="axis" d="M{LEFT} {y(v):.1f}H{WIDTH}"/><text x="{LEFT - 6}" y="{y(v) + 4:.1f}" '
        f'text-anchor="end">{v:g}</text>'
        for v in (0, 0.25, 0.5, 0.75, 1)
    )
    dots = "".join(
        f'<circle class="kept" cx="{a:.1f}" cy="{y(p[1]):.1f}" r="3"/>' for a, p in zip(x, points, strict=True)
    )
    name = quality_name(r)
    return (
        f'<div class="legend"><span><i class="kept"></i>{name} on some pictures of the val split</span>'
        '<span><i class="gone"></i>share of MACs that remains</span></div>'
        f'<div class="scroll"><svg class="wide" viewBox="0 0 {WIDTH + 4} {HEIGHT + 8}" role="img" '
        f'aria-label="{name} and MACs over training">{grid}<path class="line prune" d="{steps}H{WIDTH}"/>'
        f'<path class="line finetune" d="{line}"/>{dots}</svg></div>'
    )


def class_changes(r: Results) -> str:
    """IoU or recall of every class before and after, worst change first."""
    ordered = sorted(class_rows(r), key=lambda row: row[2] - row[1])
    bars = "".join(
        f'<div class="bar" title="{escape(name)}: {a:.3f} to {b:.3f}"><span><bdi>{escape(name)}</bdi></span>'
        f'<span class="track"><i class="dense" style="width:{100 * a:.2f}%"></i>'
        f'<i class="{"kept" if b >= a else "gone"} thin" style="width:{100 * b:.2f}%"></i></span>'
        f"<span>{(b - a) * 100:+.1f} pts</span></div>"
        for name, a, b in ordered
    )
    return f'<div class="bars">{bars}</div>'


def against(runs: Sequence[tuple[str, Results]], cost: str, numbers: Sequence[int] | None = None) -> str:
    """Quality against ``"macs"`` (millions) or ``"latency_ms"``, a mark a network: rings before, dots after."""
    unit = {"macs": (1e6, "million MACs"), "latency_ms": (1.0, "milliseconds")}[cost]
    dots = []
    for n, (name, r) in enumerate(runs):
        for student in (False, True):
            value = getattr(r.student if student else r.teacher, cost)
            if value is not None:
                number = n + 1 if numbers is None else numbers[n]
                dots.append((value / unit[0], main_quality(r, student), student, number, name))
    if not dots:
        return ""
    top_x = max(d[0] for d in dots) * 1.08
    low, high = min(d[1] for d in dots), max(d[1] for d in dots)
    pad = max((high - low) * 0.15, 0.01)
    low, high = max(0.0, low - pad), min(1.0, high + pad)
    width, height = 460, 260

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + x / top_x * (width - LEFT - 12), 8 + (high - y) / (high - low) * (height - 16)

    marks = []
    for x, y, student, n, name in dots:
        px, py = place(x, y)
        text = f"{name}, {'after' if student else 'before'}: {x:.3g} {unit[1]}, {y:.3f}"
        kind = "kept" if student else "ring"
        marks.append(
            f'<circle class="{kind}" cx="{px:.1f}" cy="{py:.1f}" r="5"><title>{escape(text)}</title></circle>'
            + (f'<text class="small" x="{px + 7:.1f}" y="{py - 5:.1f}">{n}</text>' if student else "")
        )
    for r_name, r in runs:  # from before to after
        a, b = getattr(r.teacher, cost), getattr(r.student, cost)
        if a is not None and b is not None:
            (x0, y0), (x1, y1) = place(a / unit[0], main_quality(r, False)), place(b / unit[0], main_quality(r, True))
            marks.insert(
                0,
                f'<path class="event" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"><title>{escape(r_name)}</title></path>',
            )
    labels = "".join(
        f'<text x="{LEFT - 6}" y="{place(0, v)[1] + 4:.1f}" text-anchor="end">{v:.3f}</text>'
        f'<path class="axis" d="M{LEFT} {place(0, v)[1]:.1f}H{width}"/>'
        for v in (low, (low + high) / 2, high)
    ) + "".join(
        f'<text x="{place(v, low)[0]:.1f}" y="{height + 12}" text-anchor="middle">{v:.3g}</text>'
        for v in (0, top_x / 2, top_x / 1.08)
    )
    return (
        f'<figure class="chart"><figcaption>{quality_name(runs[0][1])}, test, against {unit[1]}</figcaption>'
        f'<svg viewBox="0 0 {width} {height + 18}" role="img" aria-label="quality against {unit[1]}">'
        f"{labels}{''.join(marks)}</svg></figure>"
    )
