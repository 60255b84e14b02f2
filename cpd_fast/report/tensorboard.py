"""The numbers of a run as scalars for TensorBoard."""

from __future__ import annotations

from pathlib import Path

from cpd_fast.packages import SCALARS, require
from cpd_fast.report.results import Results


def write_scalars(results: Results, folder: Path) -> None:
    """Write loss, quality and the share of MACs over all steps of a run, one after the other.

    Args:
        results: The numbers.
        folder: Where the event file goes; older ones are replaced.

    Raises:
        BackendError: If TensorBoard is not installed.
    """
    require(SCALARS)
    from torch.utils.tensorboard import SummaryWriter

    for old in folder.glob("events.out.tfevents.*") if folder.is_dir() else ():
        old.unlink()
    start: dict[str, int] = {}
    for n, (stage, _, _) in enumerate(results.curve):
        start.setdefault(stage, n)
    writer = SummaryWriter(str(folder))
    for n, (stage, _, loss) in enumerate(results.curve):
        writer.add_scalar(f"loss/{stage}", loss, n)
    for stage, step, value, share in results.quality:
        at = start.get(stage, 0) + step - 1
        writer.add_scalar("val/" + ("miou" if results.is_segmentation else "accuracy"), value, at)
        writer.add_scalar("share of MACs", share, at)
    writer.close()
