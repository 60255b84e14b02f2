"""The numbers of a run that never was."""

from cpd_fast.report import Histogram, Results, Side

BEFORE = Side(1000, 2_000_000, 2.0, 4.0, 8.0, 7.9, 8.1, 0.9, 0.75, (0.5, 1.0))
AFTER = Side(400, 1_000_000, 1.5, 2.0, 4.0, 3.9, 4.1, 0.88, 0.74, (0.52, 0.96))
RESULTS = Results(
    task="climate <b>",
    model="net & co",
    is_segmentation=True,
    classes=("sea", "land"),
    palette=((1, 2, 3), (4, 5, 6)),
    input_shape=(1, 3, 96, 96),
    teacher=BEFORE,
    student=AFTER,
    widths=(("conv1", 8, 4), ("conv2", 8, 8)),
    histograms=(Histogram("all", (0.0, 1.0, 2.0), (1, 5), (3, 0)),),
    curve=(("teacher", 0, 2.0), ("prune", 0, 1.0), ("finetune", 0, 0.5)),
    steps=((0, 0.5),),
    tiles=({"picture": "a.png", "label": "b.png", "teacher": "c.png", "student": "missing.png"},),
    latency={"backend": "ONNX Runtime", "threads": 2, "runs": 1000},
    settings={"seed": 7},
    command="cpd-fast compress --demo",
    environment={"torch": "2.13.0", "device": "a CPU"},
    notes=("a note",),
    seconds={"teacher": 12.0},
)
