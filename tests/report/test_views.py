"""Comparisons, Markdown, charts and TensorBoard are views of the same numbers; pages hold in a real browser."""

import dataclasses
import html
import json
import re
import shutil
import subprocess

import pytest

from cpd_fast.report import Results, comparison_json, comparison_markdown, render, render_comparison, to_markdown
from cpd_fast.report.charts import against, class_changes, quality_over_training
from tests.report.sample import RESULTS

TRAINED = dataclasses.replace(
    RESULTS,
    curve=tuple(("teacher", n, 2.0) for n in range(10)) + tuple(("prune", n, 1.0) for n in range(10)),
    quality=(("teacher", 10, 0.75, 1.0), ("prune", 5, 0.5, 0.7), ("prune", 10, 0.74, 0.5)),
    memory_mib=812.4,
)
OTHER = dataclasses.replace(
    RESULTS, model="a | b", student=dataclasses.replace(RESULTS.student, macs=500_000, miou=0.6, latency_ms=None)
)
RUNS = [("one", TRAINED), ("two <x>", OTHER)]


def test_new_numbers_survive_json_and_old_files_have_none():
    assert Results.from_json(TRAINED.to_json()) == TRAINED
    old = json.loads(TRAINED.to_json())
    del old["quality"], old["memory_mib"]
    again = Results.from_json(json.dumps(old))
    assert again.quality == () and again.memory_mib is None


def test_comparison_by_hand():
    first, second = json.loads(comparison_json(RUNS))
    assert first == {
        "run": "one", "model": "net & co", "task": "climate <b>", "macs_left": 0.5, "params_left": 0.4, "speed": 2.0,
        "before": 0.75, "after": 0.74, "quality": "mIoU", "macs": 1_000_000, "params": 400, "latency_ms": 4.0,
    }  # fmt: skip
    assert (second["macs_left"], second["after"], second["speed"]) == (0.25, 0.6, None)


def test_comparison_as_markdown():
    lines = comparison_markdown(RUNS).splitlines()
    assert lines[2] == ("| one | net & co | climate <b> | 50.0% | 40.0% | 2.00x | 0.750 mIoU | 0.740 | -1.0 points |")
    assert r"a \| b" in lines[3] and all(line.count("|") - line.count(r"\|") == 10 for line in lines)


def test_run_as_markdown():
    text = to_markdown(TRAINED)
    for part in ("# net & co on climate <b>", "| MACs at 1x3x96x96 | 2.0 M | 1.0 M | -50% |", "| conv1 | 8 | 4 |"):
        assert part in text
    assert "    cpd-fast compress --demo" in text and "- peak memory: 812 MiB" in text and "- a note" in text


def test_classes_are_ordered_by_what_they_lose():
    chart = class_changes(RESULTS)
    assert re.findall(r"<bdi>(\w+)</bdi>", chart) == ["land", "sea"] and "-4.0 pts" in chart and "+2.0 pts" in chart


def test_quality_lies_where_it_was_measured():
    chart = quality_over_training(TRAINED)
    xs = [float(v) for v in re.findall(r'cx="([\d.]+)"', chart)]
    assert [round((x - 44) / (900 - 44), 2) for x in xs] == [0.5, 0.75, 1.0]
    ys = [float(v) for v in re.findall(r'cy="([\d.]+)"', chart)]
    assert ys[0] < ys[2] < ys[1]  # the best is on top
    assert quality_over_training(RESULTS) == ""


def test_macs_fall_where_channels_went():
    pruned = dataclasses.replace(TRAINED, steps=((0, 0.75), (5, 0.5)))  # of the prune stage, which begins halfway
    path = re.search(r'class="line prune" d="([^"]+)"', quality_over_training(pruned))[1]
    assert [round((float(v) - 44) / (900 - 44), 2) for v in re.findall(r"H([\d.]+)", path)] == [0.5, 0.75, 1.0]


def test_dots_stand_at_cost_and_quality():
    chart = against(RUNS, "macs")
    assert "one, after: 1 million MACs, 0.740" in chart and "two &lt;x&gt;, after: 0.5 million MACs, 0.600" in chart
    assert against(RUNS, "latency_ms").count("<circle") == 3  # the latency of one network is not known


def test_tensorboard_scalars(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from cpd_fast.report.tensorboard import write_scalars

    write_scalars(TRAINED, tmp_path)
    write_scalars(TRAINED, tmp_path)  # again: replaced, not doubled
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(s.step, round(s.value, 3)) for s in events.Scalars("val/miou")] == [(9, 0.75), (14, 0.5), (19, 0.74)]
    assert len(events.Scalars("loss/teacher")) == 10


# ----------------------------------------------------------------------------------------------------- in a browser
CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--virtual-time-budget=3000",
]  # fmt: skip
MEASURE = """<pre id=out></pre><script>
addEventListener('load', () => {
  out.textContent = JSON.stringify([...document.querySelectorAll('iframe')].map(f => {
    const d = f.contentDocument, w = f.clientWidth, wide = [...d.querySelectorAll('body *')].filter(e => {
      const r = e.getBoundingClientRect();
      return r.right > w + 1 && !e.closest('.scroll') && r.width > 0;
    });
    return {width: w, scroll: d.documentElement.scrollWidth, over: wide.slice(0, 3).map(e => e.outerHTML.slice(0, 90))};
  }));
});</script>"""


def in_browser(page, folder):
    """Widths of a page in frames of 375 and 1440 pixels, and what the console said."""
    frames = "".join(
        f'<iframe style="width:{w}px;height:900px;border:0" srcdoc="{html.escape(page, quote=True)}"></iframe>'
        for w in (375, 1440)
    )
    (folder / "frames.html").write_text(f"<!doctype html><title>frames</title>{frames}{MEASURE}")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}/profile", "--dump-dom", (folder / "frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    found = re.search(r'<pre id="out">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_pages_fit_a_phone_and_a_desk(kind, tmp_path):
    page = render(TRAINED) if kind == "run" else render_comparison(RUNS)
    frames, said = in_browser(page, tmp_path)
    assert said == []
    assert [f["width"] for f in frames] == [375, 1440]
    for f in frames:
        assert f["scroll"] <= f["width"] and f["over"] == [], f


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_browser_sees_overflow_and_console_errors(tmp_path):
    """The oracle itself."""
    frames, said = in_browser("<body><div style='width:600px'>x</div><script>nothing()</script>", tmp_path)
    assert frames[0]["scroll"] > 375 and frames[0]["over"] and frames[1]["over"] == [] and said
