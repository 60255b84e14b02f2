"""The page is self-contained, complete and safe; the numbers survive JSON."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest

from cpd_fast.errors import FileFormatError
from cpd_fast.report import Results, render, table, write_report
from tests.report.sample import AFTER, RESULTS


def test_table_by_hand():
    assert table(RESULTS) == [
        ("Parameters", "1,000", "400", "-60%"),
        ("MACs at 1x3x96x96", "2.0 M", "1.0 M", "-50%"),
        ("Activations", "2.00 MiB", "1.50 MiB", "-25%"),
        ("ONNX file", "4.00 MiB", "2.00 MiB", "-50%"),
        ("Latency, ONNX Runtime", "8.00 ms", "4.00 ms", "2.00x faster"),
        ("mIoU, test", "0.750", "0.740", "-1.0 points"),
        ("Pixel accuracy, test", "0.900", "0.880", "-2.0 points"),
        ("IoU sea", "0.500", "0.520", "+2.0 points"),
        ("IoU land", "1.000", "0.960", "-4.0 points"),
    ]


def test_slower_is_not_called_faster():
    slower = dataclasses.replace(RESULTS, student=dataclasses.replace(AFTER, latency_ms=10.0))
    assert ("Latency, ONNX Runtime", "8.00 ms", "10.00 ms", "+25%") in table(slower)


def test_classification_shows_accuracy_and_recall():
    sides = {k: dataclasses.replace(getattr(RESULTS, k), miou=None) for k in ("teacher", "student")}
    tile = {"picture": "a.png", "label": "sea", "teacher": "sea", "student": "land"}
    r = dataclasses.replace(RESULTS, is_segmentation=False, palette=(), tiles=(tile,), **sides)
    assert ("Accuracy, test", "90.00%", "88.00%", "-2.0 points") in table(r) and table(r)[-1][0] == "Recall land"
    assert '<span class="bad">after: land</span>' in render(r)


def scored(before, after):
    """The sample with these scores of its classes."""
    sides = {"teacher": before, "student": after}
    sides = {k: dataclasses.replace(getattr(RESULTS, k), class_scores=tuple(v)) for k, v in sides.items()}
    names = tuple(f"class {n}" for n in range(len(before)))
    return dataclasses.replace(RESULTS, classes=names, palette=((0, 0, 0),) * len(names), **sides)


def test_classes_without_labels_have_no_row():
    r = scored((0.5, None, 0.25), (0.5, None, 0.5))
    assert [row[0] for row in table(r)][-2:] == ["IoU class 0", "IoU class 2"]
    assert 'title="class 2: 0.250' in render(r) and 'title="class 1' not in render(r)
    assert Results.from_json(r.to_json()) == r


def test_of_many_classes_the_table_has_those_that_lose_most():
    r = scored([0.5] * 150, [0.5 - n / 1000 for n in range(150)])
    assert [row[0] for row in table(r)][-11:] == [f"IoU class {n}" for n in range(149, 139, -1)] + [
        "140 classes that lose less"
    ]


def test_json_round_trip():
    assert Results.from_json(RESULTS.to_json()) == RESULTS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON document"),
        ("[]", "not the results of a cpd_fast run"),
        ('{"format": "cpd_fast.results", "version": 9}', "results version 9, this cpd_fast reads 1; upgrade"),
        ('{"format": "cpd_fast.results", "version": 1}', "incomplete or damaged"),
        ('{"format": "cpd_fast.results", "version": 1, "teacher": 3}', "incomplete or damaged"),
    ],
)
def test_damaged_results(text, message):
    with pytest.raises(FileFormatError, match=message):
        Results.from_json(text)


class Outline(HTMLParser):
    """Checks nesting and collects titles and links."""

    def __init__(self):
        super().__init__()
        self.open, self.titles, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "rect", "path"):
            self.open.append(tag)
        self.links += [v for k, v in attributes if k in ("href", "src")]

    def handle_startendtag(self, tag, attributes):
        """Nothing to close."""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)


def test_page_is_whole_and_needs_no_network(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(b"\x89PNG")
    page = write_report(RESULTS, tmp_path).read_text()
    outline = Outline()
    outline.feed(page)
    assert outline.open == [] or outline.open == ["!doctype"]
    assert outline.titles == [
        "Before and after",
        "Classes, the largest loss first",
        "What it sees",
        "Width of every layer",
        "Scores of the channels",
        "Training",
        "How it was made",
    ]
    assert len(outline.links) == 3 and all(link.startswith("data:image/png;base64,") for link in outline.links)
    assert not re.search(r"https?://|<script|@import", page)
    assert "prefers-color-scheme:dark" in page and "width=device-width" in page
    assert "climate &lt;b&gt;" in page and "net &amp; co" in page  # names are text, never markup
    for text in ("cpd-fast compress --demo", "a note", "2 CPU threads", "1000 runs", "seed 7", "torch 2.13.0", "2.00x"):
        assert text in page


def test_pictures_may_be_missing():
    assert render(RESULTS).count('class="missing"') == 4
