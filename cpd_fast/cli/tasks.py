"""From names of a model and of data to a task that a recipe can run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from cpd_fast.cli.models import ModelError, Source, from_python, load_weights, model_source
from cpd_fast.cli.recipe import source_faults
from cpd_fast.data import DataSplits, folder_data
from cpd_fast.errors import DataError
from cpd_fast.recipes import TASKS, Task, builtin

STRANGER = {"teacher_steps": 400, "batch_size": 32, "prune_steps": 200, "finetune_steps": 200}  # on data of one's own


def task_of(what: Mapping[str, Any]) -> tuple[Task, dict[str, Any]]:
    """The task, and defaults of its settings.

    Raises:
        DataError: If the data cannot be found or read.
        ModelError: If the model cannot be built, or does not fit the data.
    """
    data, model = what["data"], what["model"]
    if data in TASKS and model is None:
        if what["weights"] is not None:
            raise ModelError(f"weights: give the model too; {data} has a network of its own")
        return builtin(data, what["data_dir"]), {}
    for fault in source_faults(what):
        raise DataError(fault)
    source = model_source(model)
    splits = _data(what, what["size"] or source.size or 224)
    if source.mean is not None and source.std is not None and len(source.mean) == splits.train.images.shape[1]:
        splits = dataclasses.replace(splits, mean=source.mean, std=source.std)
    _check(source, splits, what["weights"])
    origin = {k: str(v) for k, v in what.items() if k not in ("recipe", "minutes", "run_dir") and v is not None}
    defaults = dict(STRANGER) | ({"teacher_steps": 0} if what["weights"] is not None else {})
    if what["weights"] is None and model.startswith("hf/"):
        defaults["teacher_steps"] = 0  # such a folder holds trained weights
    build = lambda: _built(source, splits, what["weights"])  # noqa: E731
    return Task(splits.name, model, splits, build, origin=origin), defaults


def build_alone(what: Mapping[str, Any], classes: int) -> nn.Module:
    """The network of a run as it was before training, without its data."""
    return model_source(what["model"] or what["data"]).build(classes)


def _data(what: Mapping[str, Any], size: int) -> DataSplits:
    name = what["data"]
    if name in TASKS:
        return builtin(name, what["data_dir"]).data
    if ":" in name and not Path(name).exists():
        made = from_python(name)()
        if not isinstance(made, DataSplits):
            raise DataError(f"{name}: returned a {type(made).__name__}, expected a cpd_fast.data.DataSplits")
        return made
    return folder_data(name, size, what["layout"])


def _built(source: Source, data: DataSplits, weights: Path | None) -> nn.Module:
    model = source.build(len(data.classes))
    if weights is not None:
        load_weights(model, weights, len(data.classes))
    return model


def _check(source: Source, data: DataSplits, weights: Path | None) -> None:
    """One forward without memory: does the network give logits for these pictures and classes?

    Raises:
        ModelError: If it does not.
    """
    import torch

    model = _built(source, data, weights).eval()
    shape = tuple(data.train.images.shape[1:])
    wanted = (2, len(data.classes), *(shape[1:] if data.is_segmentation else ()))
    try:
        with torch.no_grad():
            out = model(torch.zeros(2, *shape))
    except Exception as e:
        raise ModelError(f"{source.name}: its forward fails on pictures of shape {shape}: {e}; try another size") from e
    got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
    if got != wanted:
        raise ModelError(
            f"{source.name}: expected logits of shape {wanted} for {len(data.classes)} classes, got {got}; "
            + ("segmentation needs a network with a map a class" if data.is_segmentation else "a classifier is needed")
        )
