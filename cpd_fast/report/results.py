"""The numbers of one run: plain data, JSON first. Text and HTML are views of it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from cpd_fast.errors import FileFormatError

FORMAT, VERSION = "cpd_fast.results", 1
MOST_CLASSES = 40  # that are shown one by one; of more, those that lose most
WORST = 10


@dataclass(frozen=True)
class Side:
    """One of the two networks.

    Attributes:
        params: Parameters.
        macs: Multiply-accumulates of one forward, batch 1.
        activation_mib: MiB of all results of computing ops, batch 1.
        file_mib: MiB of its ONNX file.
        latency_ms: Median latency, milliseconds; None where it was not measured.
        latency_low_ms: Lower end of its 95 % interval.
        latency_high_ms: Upper end.
        accuracy: Pixel accuracy (segmentation) or accuracy, test split, in [0, 1].
        miou: Mean intersection over union, test split, in [0, 1]; None for classification.
        class_scores: IoU (segmentation) or recall (classification) of each class, in [0, 1]; None for a class that no
            label of the test split is of.
    """

    params: int
    macs: int
    activation_mib: float
    file_mib: float | None
    latency_ms: float | None
    latency_low_ms: float | None
    latency_high_ms: float | None
    accuracy: float
    miou: float | None
    class_scores: tuple[float | None, ...]


@dataclass(frozen=True)
class Histogram:
    """Scores of the channels that stay and of those that go, counted in bins.

    Attributes:
        title: Name of a group, or "all groups".
        edges: Bin edges, log10 of the score; ``len(kept) + 1`` of them.
        kept: Channels of each bin that stay.
        removed: Channels of each bin that go.
    """

    title: str
    edges: tuple[float, ...]
    kept: tuple[int, ...]
    removed: tuple[int, ...]


@dataclass(frozen=True)
class Results:
    """Everything that a report shows of one run.

    Attributes:
        task: Name of the data.
        model: Name of the network.
        is_segmentation: Whether quality is mIoU.
        classes: Class names.
        palette: ``(r, g, b)`` of each class; empty for classification.
        input_shape: Shape of the example input of MACs and latency.
        teacher: The network before.
        student: The network after.
        widths: ``(layer, channels before, channels after)`` of every layer with weights, in order of the network.
        histograms: Score histograms, the one over all groups first.
        curve: ``(stage, step, loss)`` of every training step that was logged.
        steps: ``(step, share of MACs that remains)`` after each pruning event.
        tiles: One dict a picture: file names of ``picture``, ``label``, ``teacher``, ``student`` (segmentation), or
            ``picture`` and the class names (classification).
        latency: Backend, threads and runs of the latency figures; empty where it was not measured.
        settings: What the run was asked to do.
        command: The command that repeats it.
        environment: Versions and device.
        notes: Remarks, one a line.
        seconds: Wall time of each stage; parts done before an interruption included.
        quality: ``(stage, step, mIoU or accuracy on some pictures of val, share of MACs that remains)`` now and then.
        memory_mib: Peak of the process's memory in MiB, of the last start where the run was interrupted; on a GPU, of
            the GPU's memory.
    """

    task: str
    model: str
    is_segmentation: bool
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    input_shape: tuple[int, ...]
    teacher: Side
    student: Side
    widths: tuple[tuple[str, int, int], ...]
    histograms: tuple[Histogram, ...]
    curve: tuple[tuple[str, int, float], ...]
    steps: tuple[tuple[int, float], ...]
    tiles: tuple[dict[str, str], ...]
    latency: dict[str, Any]
    settings: dict[str, Any]
    command: str
    environment: dict[str, str]
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    quality: tuple[tuple[str, int, float, float], ...] = ()
    memory_mib: float | None = None

    def to_json(self) -> str:
        """The numbers as a JSON document."""
        return json.dumps({"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str, where: str = "results") -> Results:
        """Parse what :meth:`to_json` wrote.

        Raises:
            FileFormatError: If it is something else, or from a future version.
        """
        try:
            doc = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise FileFormatError(f"{where}: not a JSON document ({e})") from e
        if not isinstance(doc, dict) or doc.pop("format", None) != FORMAT:
            raise FileFormatError(f"{where}: not the results of a cpd_fast run (no format {FORMAT!r})")
        if (version := doc.pop("version", None)) != VERSION:
            raise FileFormatError(
                f"{where}: results version {version!r}, this cpd_fast reads {VERSION}; upgrade cpd_fast"
            )
        try:
            for name in ("teacher", "student"):
                doc[name] = Side(**{**doc[name], "class_scores": tuple(doc[name]["class_scores"])})
            doc["histograms"] = tuple(
                Histogram(h["title"], tuple(h["edges"]), tuple(h["kept"]), tuple(h["removed"]))
                for h in doc["histograms"]
            )
            for name in ("palette", "widths", "curve", "steps", "quality"):
                doc[name] = tuple(tuple(row) for row in doc.get(name, ()))
            for name in ("classes", "input_shape", "tiles", "notes"):
                doc[name] = tuple(doc[name])
            return cls(**doc)
        except (KeyError, TypeError, AttributeError) as e:
            raise FileFormatError(f"{where}: results are incomplete or damaged ({e})") from e


def millions(count: int, digits: int = 1) -> str:
    """A count of MACs or parameters; small ones in full.

    Example:
        >>> millions(3_028_165, 2), millions(1450, 2)
        ('3.03 M', '1,450')
    """
    return f"{count / 1e6:.{digits}f} M" if count >= 1e5 else f"{count:,}"


def table(results: Results) -> list[tuple[str, str, str, str]]:
    """The before/after table: ``(what, before, after, change)`` as text, one row a figure."""
    a, b = results.teacher, results.student
    rows = [
        ("Parameters", f"{a.params:,}", f"{b.params:,}", _percent(a.params, b.params)),
        (
            f"MACs at {_shape(results.input_shape)}",
            millions(a.macs),
            millions(b.macs),
            _percent(a.macs, b.macs),
        ),
        (
            "Activations",
            f"{a.activation_mib:.2f} MiB",
            f"{b.activation_mib:.2f} MiB",
            _percent(a.activation_mib, b.activation_mib),
        ),
    ]
    if a.file_mib and b.file_mib:
        rows.append(("ONNX file", f"{a.file_mib:.2f} MiB", f"{b.file_mib:.2f} MiB", _percent(a.file_mib, b.file_mib)))
    if a.latency_ms and b.latency_ms:
        rows.append((
            f"Latency, {results.latency.get('backend', '')}",
            f"{a.latency_ms:.2f} ms",
            f"{b.latency_ms:.2f} ms",
            f"{a.latency_ms / b.latency_ms:.2f}x faster"
            if b.latency_ms < a.latency_ms
            else _percent(a.latency_ms, b.latency_ms),
        ))
    if a.miou is not None and b.miou is not None:
        rows.append(("mIoU, test", f"{a.miou:.3f}", f"{b.miou:.3f}", _points(a.miou, b.miou)))
        rows.append(("Pixel accuracy, test", f"{a.accuracy:.3f}", f"{b.accuracy:.3f}", _points(a.accuracy, b.accuracy)))
    else:
        rows.append(("Accuracy, test", f"{a.accuracy:.2%}", f"{b.accuracy:.2%}", _points(a.accuracy, b.accuracy)))
    kind = "IoU" if results.is_segmentation else "Recall"
    classes = class_rows(results)
    shown = classes
    if len(classes) > MOST_CLASSES:
        shown = sorted(classes, key=lambda row: row[2] - row[1])[:WORST]
    rows += [(f"{kind} {name}", f"{x:.3f}", f"{y:.3f}", _points(x, y)) for name, x, y in shown]
    if len(shown) < len(classes):
        rows.append((f"{len(classes) - len(shown)} classes that lose less", "", "", "in results.json"))
    return rows


def class_rows(results: Results) -> list[tuple[str, float, float]]:
    """Name, score before and score after of every class that the test split has labels of."""
    scores = zip(results.classes, results.teacher.class_scores, results.student.class_scores, strict=True)
    return [(name, x, y) for name, x, y in scores if x is not None and y is not None]


def _percent(before: float, after: float) -> str:
    return f"{after / before - 1:+.0%}" if before else ""


def _points(before: float, after: float) -> str:
    return f"{(after - before) * 100:+.1f} points"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
