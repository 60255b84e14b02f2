"""The drawing of groups: complete, self-contained, and nothing crosses in a lane."""

import re
from xml.etree import ElementTree

import pytest
import torch

from cpd_fast import comb
from cpd_fast.report import groups_figure, render_groups
from tests.nets import Concat, FusedAttention, Residual

INPUTS = {Residual: (2, 3, 8, 8), Concat: (2, 3, 8, 8), FusedAttention: (2, 5, 3)}


def drawn(kind):
    graph = comb(kind().eval(), torch.zeros(INPUTS[kind]))
    svg = re.search(r"<svg.*</svg>", groups_figure(graph), re.S).group()
    return graph, ElementTree.fromstring(svg)


@pytest.mark.parametrize("kind", INPUTS)
def test_every_group_is_a_lane_with_a_dot_a_layer(kind):
    graph, svg = drawn(kind)
    lanes = {g.find("title").text.split(":")[0]: g for g in svg.iter("g")}
    assert set(lanes) == {g.name for g in graph.groups}
    for group in graph.groups:
        owners = {s.param.rpartition(".")[0] for s in group.slices}
        assert len(lanes[group.name].findall("circle")) == len(owners)
        assert ("frozen" in lanes[group.name].get("class")) == (not group.prunable)


@pytest.mark.parametrize("kind", INPUTS)
def test_lanes_do_not_overlap_and_lie_inside(kind):
    _, svg = drawn(kind)
    width = float(re.search(r"width:(\d+)px", svg.get("style")).group(1))
    spans = []
    for lane in svg.iter("g"):
        x, a, b = map(float, re.match(r"M([\d.]+) (\d+)V(\d+)", lane.find("path").get("d")).groups())
        assert 0 < x < width
        assert all(x != other or b < low or a > high for other, low, high in spans)
        spans.append((x, a, b))


def test_the_page_is_self_contained_and_escapes():
    graph = comb(Residual().eval(), torch.zeros(2, 3, 8, 8))
    page = render_groups(graph, "a <b> & c")
    assert "a &lt;b&gt; &amp; c" in page and "<b> & c" not in page
    assert not re.search(r"(https?:)?//|<script|<link|@import|url\(", page)
    assert "prefers-color-scheme:dark" in page and "width=device-width" in page
    for group in graph.groups:
        assert group.name in page
