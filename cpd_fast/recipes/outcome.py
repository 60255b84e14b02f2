"""The end of a run: measure both networks, export them, and write results and report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cpd_fast.config import CompressConfig
from cpd_fast.errors import BackendError
from cpd_fast.export import export_onnx
from cpd_fast.machine import peak_memory_mib
from cpd_fast.recipes.environment import environment
from cpd_fast.recipes.evaluate import Quality, evaluate
from cpd_fast.recipes.pictures import write_tiles
from cpd_fast.recipes.progress import Talk
from cpd_fast.recipes.run_folder import RunFolder
from cpd_fast.recipes.target import latency_notes
from cpd_fast.recipes.tasks import Task
from cpd_fast.report import Histogram, Results, Side, write_report
from cpd_fast.schedule import plan_cost
from cpd_fast.timing import Latency, compare_latency
from cpd_fast.types import ChannelGraph, Cost, PrunePlan, Scores

MIB = 2**20
BINS = 32
LATENCY_SECONDS = 15.0  # a network; slow machines time fewer runs, and the report says how many


def finish(
    task: Task,
    config: CompressConfig,
    folder: RunFolder,
    talk: Talk,
    graph: ChannelGraph,
    plan: PrunePlan,
    teacher: nn.Module,
    student: nn.Module,
    scores: Scores | None,
    curve: list[tuple[str, int, float]],
    events: list[tuple[int, float]],
    quality_over_time: list[tuple[str, int, float, float]],
    seconds: dict[str, float],
    command: str,
    remarks: tuple[str, ...],
    device: torch.device,
) -> Results:
    """Evaluate on the test split, export, time, and write ``results.json`` and ``report.html``.

    ``remarks`` say how the two networks were trained. Latency is that of ``device``, or of the CPU where it was planned
    for; the networks are on the CPU afterwards.
    """
    device = device if config.target().latency_ms is None else torch.device("cpu")
    data, names, notes = task.data, ("teacher", "student"), []
    networks = dict(zip(names, (teacher, student), strict=True))
    costs = dict(zip(names, (plan_cost(graph, None), plan_cost(graph, plan)), strict=True))
    limits = (config.latency_runs, config.latency_threads, LATENCY_SECONDS)
    with talk.bar("Measure and export", 4) as bar:
        bar.advance(0, "test split")
        quality = {n: evaluate(m, data, data.test) for n, m in networks.items()}
        bar.advance(1, "export ONNX")
        try:
            errors = {n: _export(m.cpu(), task, folder, n) for n, m in networks.items()}
            notes.append(f"ONNX Runtime equals PyTorch to {max(errors.values()):.1e} of the largest output.")
        except BackendError as e:
            errors = {}
            notes.append(f"No ONNX files: {e}")
        bar.advance(1, "latency")
        timed = None
        if errors and config.latency_backend != "eager":
            files = [folder.path / f"{n}.onnx" for n in names]
            backend = "onnxruntime" if device.type == "cpu" else "onnxruntime-cuda"
            try:
                timed = compare_latency(files, task.example_inputs(), backend, *limits)
            except BackendError as e:
                notes.append(f"Latency in eager PyTorch: {e}")
        if timed is None:
            timed = compare_latency(
                [m.to(device) for m in networks.values()], task.example_inputs().to(device), "eager", *limits
            )
        teacher, student = teacher.cpu(), student.cpu()
        latency = dict(zip(names, timed, strict=True))
        notes += latency_notes(config.target(), *timed)
        bar.advance(1, "pictures and report")
        results = Results(
            task=task.name,
            model=task.model_name,
            is_segmentation=data.is_segmentation,
            classes=data.classes,
            palette=data.palette,
            input_shape=tuple(task.example_inputs().shape),
            teacher=_side(costs["teacher"], quality["teacher"], latency["teacher"], folder.path / "teacher.onnx"),
            student=_side(costs["student"], quality["student"], latency["student"], folder.path / "student.onnx"),
            widths=_widths(teacher, student),
            histograms=() if scores is None else _histograms(graph, plan, scores),
            curve=tuple(curve),
            steps=tuple(events),
            tiles=write_tiles(folder, teacher, student, data),
            latency={
                "backend": "ONNX Runtime" if timed[0].backend.startswith("onnxruntime") else "eager PyTorch",
                "threads": timed[0].threads,
                "runs": timed[0].runs,
                "left_out": sum(t.left_out for t in timed),
            },
            settings=folder.read_json("run.json")["settings"],
            command=command,
            environment=environment(),
            notes=(*_data_notes(task), *_absent(data.classes, quality["teacher"]), *remarks, *notes),
            seconds=seconds,
            quality=tuple(quality_over_time),
            memory_mib=peak_memory_mib(),
        )
        folder.write("results.json", results.to_json())
        write_report(results, folder.path, folder.write)
        bar.advance(1, "done")
    return results


def _absent(classes: tuple[str, ...], quality: Quality) -> list[str]:
    """Classes without labels, for the report."""
    missing = [name for name, score in zip(classes, quality.class_scores, strict=True) if score is None]
    if not missing:
        return []
    named = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    return [f"No label of the test split is of {named}: no score{'' if quality.miou is None else ', not in the mIoU'}."]


def _export(model: nn.Module, task: Task, folder: RunFolder, name: str) -> float:
    try:
        return export_onnx(model, task.example_inputs(), folder.path / f"{name}.onnx")
    except OSError as e:
        raise folder.error(f"{name}.onnx cannot be written", e) from e


def _side(cost: Cost, quality: Quality, latency: Latency, file: Path) -> Side:
    return Side(
        params=cost.params,
        macs=cost.macs,
        activation_mib=cost.activation_bytes / MIB,
        file_mib=file.stat().st_size / MIB if file.is_file() else None,
        latency_ms=latency.median_ms,
        latency_low_ms=latency.low_ms,
        latency_high_ms=latency.high_ms,
        accuracy=quality.accuracy,
        miou=quality.miou,
        class_scores=quality.class_scores,
    )


def _widths(teacher: nn.Module, student: nn.Module) -> tuple[tuple[str, int, int], ...]:
    """Output channels of every layer whose weight is a matrix or a kernel."""
    after = dict(student.named_modules())
    rows = []
    for name, module in teacher.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() > 1:
            rows.append((name, int(weight.shape[0]), int(after[name].weight.shape[0])))  # type: ignore[union-attr, arg-type]
    return tuple(rows)


def _histograms(graph: ChannelGraph, plan: PrunePlan, scores: Scores) -> tuple[Histogram, ...]:
    """Scores of the first scoring, over all prunable channels and for the groups that lose most and least."""
    groups = [g for g in graph.prunable_groups if g.name in scores]
    lost = {g.name: 1 - len(plan.get(g.name, range(g.n_channels))) / g.n_channels for g in groups}
    alive = graph.alive(plan)

    def of(title: str, names: set[str]) -> Histogram:
        chosen = [g for g in groups if g.name in names]
        value = torch.cat([scores[g.name] for g in chosen]).double().numpy()
        kept = np.concatenate([alive[g.offset : g.offset + g.n_channels] for g in chosen])
        positive = value[value > 0]
        floor = float(np.quantile(positive, 0.005)) if len(positive) else 1e-12  # scores of 0 or less: first bin
        log = np.log10(np.maximum(value, floor))
        top = max(float(log.max()), float(np.log10(floor)) + 1e-6)
        edges = np.linspace(np.log10(floor), top, BINS + 1)
        count = [np.histogram(log[m], edges)[0].tolist() for m in (kept, ~kept)]
        return Histogram(title, tuple(edges.round(4).tolist()), tuple(count[0]), tuple(count[1]))

    by_loss = sorted(groups, key=lambda g: lost[g.name])
    picked = list(dict.fromkeys(g.name for g in (*by_loss[:2], *by_loss[-3:])))
    everything = of(f"all {len(groups)} groups", {g.name for g in groups})
    return (everything, *(of(f"{name} ({lost[name]:.0%} removed)", {name}) for name in picked))


def training_note(config: CompressConfig) -> str:
    """How long the two networks of :func:`recipes.cpd` were trained."""
    more = config.prune_steps + config.finetune_steps
    return (
        f"One seed. The teacher was trained for {config.teacher_steps} steps, the student for {more} more from there: "
        "a gain over the teacher comes from these steps, not from removing channels."
    )


def _data_notes(task: Task) -> list[str]:
    if "note" in task.data.source:
        return [f"Data: {task.data.source['note']}."]
    if task.name == "climate":
        return [
            "Labels are Koeppen-Geiger climate zones, not land cover; forests of different climates look alike, so "
            "that the mIoU that any network can reach is limited: compare the two networks with each other.",
        ]
    return []
