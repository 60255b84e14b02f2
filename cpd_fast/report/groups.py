"""A drawing of coupled groups over the module tree: one lane a group, from the first layer it runs through to the last.

A filled dot is a layer that produces the group's channels (or norms, biases that go with them), a ring one that reads
them. Inline SVG and CSS, no scripts and no network; names stay readable on a phone, wide drawings scroll.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

from cpd_fast.describe import layer_of, layers, state
from cpd_fast.types import ChannelGraph, CoupledGroup

PAGE = Path(__file__).with_name("page.css")
ROW, TOP, LEFT, INDENT = 19, 14, 8, 11  # pixels
HUES = 8  # colours of lanes, in page.css


@dataclass(frozen=True)
class _Row:
    name: str  # qualified; a heading where ``depth`` ends above it
    text: str
    depth: int
    heading: bool


def render_groups(graph: ChannelGraph, title: str) -> str:
    """A whole HTML page about the groups of a model.

    Args:
        graph: The model's channel graph.
        title: Name of the model.
    """
    shrinking = graph.prunable_groups
    owned = {s.param for g in shrinking for s in g.slices}
    total = sum(_size(t.shape) for t in graph.tensors.values() if t.is_parameter) + graph.untouched
    share = sum(_size(t.shape) for t in graph.tensors.values() if t.is_parameter and t.name in owned) / max(total, 1)
    channels = sum(g.n_channels for g in shrinking)
    cards = (
        ("groups that can shrink", f"{len(shrinking)}", f"of {len(graph.groups)}"),
        ("channels that can go", f"{channels:,}", f"of {graph.n_channels:,}"),
        ("parameters they reach", f"{share:.1%}", f"of {total:,}"),
    )
    boxes = "".join(
        f'<div class="card"><span>{escape(n)}</span><strong>{escape(v)}</strong><small>{escape(d)}</small></div>'
        for n, v, d in cards
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}: coupled groups</title><style>{PAGE.read_text()}</style></head>\n"
        f'<body><main><header><p class="eyebrow">cpd_fast &middot; comb</p><h1>{escape(title)}</h1>'
        f'<p class="lead">Channels that can only go together</p><div class="cards">{boxes}</div></header>\n'
        f"<section><h2>Groups over the module tree</h2>{groups_figure(graph)}</section>\n"
        f"<section><h2>Every group</h2>{_groups_table(graph)}</section></main></body></html>\n"
    )


def groups_figure(graph: ChannelGraph) -> str:
    """The drawing with its legend, as a piece of HTML."""
    rows = _rows(graph)
    y = {r.name: TOP + i * ROW for i, r in enumerate(rows) if not r.heading}
    spans = {g.name: _span(g, y) for g in graph.groups}
    lanes, count = _lanes(graph, spans)
    names = min(420, max(LEFT + r.depth * INDENT + 6.7 * len(r.text) for r in rows) + 16) if rows else 0
    step = max(9.0, min(24.0, 560 / max(count, 1)))
    x = {name: names + 12 + lane * step for name, lane in lanes.items()}
    sizes = _sizes(graph)
    right = names + 14 + count * step
    width, height = (
        right + 7.3 * max((len(v.replace("&#215;", "x")) for v in sizes.values()), default=0) + 8,
        TOP + len(rows) * ROW,
    )
    shapes = [_text(r, TOP + i * ROW) for i, r in enumerate(rows)]
    shapes += [f'<text class="size" x="{right:.1f}" y="{y[n] + 4}">{sizes[n]}</text>' for n in y if n in sizes]
    shapes += [_across(graph, name, y[name], x) for name in y]
    shapes += [_lane(g, i, x[g.name], y) for i, g in enumerate(graph.groups) if spans[g.name]]
    svg = (
        f'<svg class="lanes" style="width:{width:.0f}px;height:{height}px" role="img" '
        f'aria-label="coupled groups over the module tree">{"".join(shapes)}</svg>'
    )
    legend = (
        '<div class="legend"><span><i class="dot makes"></i>produces, or goes with</span>'
        '<span><i class="dot reads"></i>reads</span><span><i class="dash"></i>frozen</span></div>'
    )
    note = '<p class="fine">A line is a group; hover over it for its name and state.</p>'
    return f'{legend}<div class="scroll">{svg}</div>{note}'


def _sizes(graph: ChannelGraph) -> dict[str, str]:
    """Shape of the first tensor of a layer that is no vector."""
    found: dict[str, str] = {}
    for name, t in graph.tensors.items():
        if len(t.shape) > 1:
            found.setdefault(layer_of(name), " &#215; ".join(map(str, t.shape)))
    return found


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for s in shape:
        size *= s
    return size


def _rows(graph: ChannelGraph) -> list[_Row]:
    """Modules with channels in the order of use, below headings for what holds them."""
    used = dict.fromkeys(layer_of(s) for s in graph.tensors)
    owners = {layer_of(s.param) for g in graph.groups for s in g.slices}
    rows: list[_Row] = []
    above: list[str] = []
    for name in used:
        if name not in owners:
            continue
        path = name.split(".")[:-1]
        same = 0
        while same < min(len(path), len(above)) and path[same] == above[same]:
            same += 1
        if len(path) > same:
            rows.append(_Row(".".join(path), ".".join(path), same, True))
        above = path
        rows.append(_Row(name, name.rsplit(".", 1)[-1], len(path), False))
    return rows


def _span(g: CoupledGroup, y: dict[str, int]) -> tuple[int, int] | None:
    hit = [y[layer_of(s.param)] for s in g.slices]
    return (min(hit), max(hit)) if hit else None


def _lanes(graph: ChannelGraph, spans: dict[str, tuple[int, int] | None]) -> tuple[dict[str, int], int]:
    """A lane a group, such that groups in one lane do not overlap; what runs longest comes first."""
    free: list[list[tuple[int, int]]] = []
    lanes = {}
    for g in sorted(graph.groups, key=lambda g: -_length(spans[g.name])):
        span = spans[g.name]
        if span is None:
            continue
        lane = next((i for i, taken in enumerate(free) if all(span[1] < a or span[0] > b for a, b in taken)), len(free))
        free[lane:] = free[lane:] or [[]]
        free[lane].append(span)
        lanes[g.name] = lane
    return lanes, len(free)


def _length(span: tuple[int, int] | None) -> int:
    return span[1] - span[0] if span else 0


def _text(row: _Row, y: int) -> str:
    kind = "above" if row.heading else "layer"
    x = LEFT + row.depth * INDENT
    return f'<text class="{kind}" x="{x}" y="{y + 4}">{escape(row.text)}</text>'


def _across(graph: ChannelGraph, name: str, y: int, x: dict[str, float]) -> str:
    """A faint line through the lanes that a layer touches."""
    hit = [x[g.name] for g in graph.groups if any(layer_of(s.param) == name for s in g.slices)]
    return f'<path class="across" d="M{min(hit):.1f} {y}H{max(hit):.1f}"/>' if len(hit) > 1 else ""


def _lane(g: CoupledGroup, number: int, x: float, y: dict[str, int]) -> str:
    makes = {y[name] for name in layers(g, True)}
    reads = {y[name] for name in layers(g, False)} - makes
    ends = makes | reads
    kind = f"hue{number % HUES}" if g.prunable else "frozen"
    dots = "".join(f'<circle class="makes" cx="{x:.1f}" cy="{v}" r="3.6"/>' for v in sorted(makes))
    dots += "".join(f'<circle class="reads" cx="{x:.1f}" cy="{v}" r="3.2"/>' for v in sorted(reads))
    told = f"{g.name}: {g.n_channels} channels, {state(g)}"
    return f'<g class="lane {kind}"><title>{escape(told)}</title><path d="M{x:.1f} {min(ends)}V{max(ends)}"/>{dots}</g>'


def _groups_table(graph: ChannelGraph) -> str:
    body = []
    for i, g in enumerate(graph.groups):
        kind = f"hue{i % HUES}" if g.prunable else "frozen"
        blocks = "" if g.balance is None else f"{len(g.blocks)} &times; {g.n_channels // len(g.blocks)}"
        made, read = (", ".join(layers(g, p)) for p in (True, False))
        told = f"<b>goes with</b> {escape(made)}" if made else ""
        told += f"{'<br>' if told else ''}<b>read by</b> {escape(read)}" if read else ""
        body.append(
            f'<details class="group"><summary><i class="swatch {kind}"></i><span>{escape(g.name)}</span>'
            f'<span class="count">{g.n_channels}</span><span class="soft">{blocks}</span>'
            f'<span class="soft state">{"" if g.prunable else escape(state(g))}</span></summary><p>{told}</p></details>'
        )
    head = "Channels, blocks that must keep equally many, and why a group stays. Open one for its layers."
    return f'<p class="fine">{head}</p>{"".join(body)}'
