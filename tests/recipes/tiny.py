"""A task of a second, and a process that dies in the middle of it: ``tiny.py RUN_DIR WRITE_TO_DIE_AT NAME=N``.

``python -m tests.recipes.tiny serve`` does it again and again: see ``tests/forks.py``.
"""

import os
import signal
import sys
from unittest import mock

import torch

from cpd_fast import recipes
from cpd_fast.data import DataSplits, Split
from cpd_fast.errors import BackendError
from cpd_fast.models import SmallResNet
from cpd_fast.recipes import outcome

STEPS = {"teacher_steps": 6, "prune_steps": 6, "prune_events": 2, "finetune_steps": 5, "checkpoint_every": 2}
SETTINGS = {**STEPS, "batch_size": 8, "round_to": 2, "score_batches": 1, "latency_runs": 3}


def segmentation():
    """A task with a label for every pixel: which quarter of the grey scale it lies in."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (40, 1, 8, 8), generator=generator, dtype=torch.uint8)
    split = Split(images, images[:, 0] // 64)
    palette = ((0, 0, 0), (80, 80, 80), (160, 160, 160), (255, 255, 255))
    data = DataSplits("quarters", ("a", "b", "c", "d"), palette, 127.0, 128.0, split, split, split)
    net = lambda: torch.nn.Sequential(  # noqa: E731
        torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.Conv2d(16, 4, 1)
    )
    return recipes.Task("quarters", "tiny", data, net, distill_at="3")


def classification():
    """Two classes that differ in brightness, ten names."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(64, dtype=torch.uint8) % 2
    images = (torch.rand(64, 1, 16, 16, generator=generator) * 100 + labels[:, None, None, None] * 100).to(torch.uint8)
    split = Split(images, labels)
    data = DataSplits("brightness", ("dark", "bright"), (), 127.0, 128.0, split, split, split, shift=1, flips="h")
    return recipes.Task("brightness", "tiny", data, lambda: SmallResNet(2, widths=(8, 16)))


def no_onnx(*_):
    raise BackendError("left out in this test")


def run(folder, task=None, quiet=True, recipe="cpd", **settings):
    with mock.patch.object(outcome, "export_onnx", no_onnx):
        talk = recipes.Talk(quiet=quiet)
        run = getattr(recipes, recipe)
        return run(task or classification(), run_dir=folder, talk=talk, **{**SETTINGS, **settings})


def die_at_write(die_at):
    """From now on ``kill -9`` this process at its n-th write: odd n before the file is in place, even n after."""
    seen, replace = 0, os.replace

    def dying_replace(source, target):
        nonlocal seen
        seen += 1
        if seen == die_at and die_at % 2:
            os.kill(os.getpid(), signal.SIGKILL)  # the file is complete, but not in place
        replace(source, target)
        if seen == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = dying_replace


def dying_run(folder, die_at, **settings):
    die_at_write(die_at)
    run(folder, **settings)


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        from tests.forks import serve

        sys.exit(serve(dying_run))
    die_at_write(int(sys.argv[2]))
    try:
        run(sys.argv[1], quiet=False, **{name: int(n) for name, _, n in (a.partition("=") for a in sys.argv[3:])})
    except KeyboardInterrupt:
        sys.exit(130)
