"""What ``cpd.py`` compares on: a network, its data, and how long everyone trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from cpd_fast.data import climate, fashion_mnist
from cpd_fast.models import EfficientNetLite0FPN, SmallResNet
from cpd_fast.recipes.tasks import Task

SEEDS = (0, 1, 2)
ABLATED_AT = 0.3
SHORT_EPOCH, EPOCH = 143, 429  # of Fashion-MNIST in batches of 128: a third of the pictures, all of them
RIVALS = (
    "uniform width", "released", "Torch-Pruning taylor", "Torch-Pruning hessian", "Torch-Pruning taylor, per layer",
    "Torch-Pruning hessian, per layer",
)  # fmt: skip


@dataclass(frozen=True)
class Study:
    """One network on one data set.

    Attributes:
        task: Makes both.
        batch: Pictures an iteration.
        epoch: Iterations that count as one epoch of fine-tuning.
        teacher: Iterations of the teacher.
        prune: Iterations in which methods that prune while training do so.
        finetune: Iterations after these.
        lr_teacher: Peak learning rate of the teacher.
        lr: Of pruning and fine-tuning.
        keeps: Shares of the MACs that remain.
        rivals: Methods beside ``best`` at each of them.
        losses: Other distillations of ``best``, compared at the share nearest to ``ABLATED_AT``.
        is_ablated: Whether all variants are compared at ``ABLATED_AT``.
        round_to: What kept channels of a layer are a multiple of, for all methods but ``released``.
        temperature: Of the distillation loss.
        weight: Of the distillation loss.
    """

    task: Callable[[], Task]
    batch: int
    epoch: int
    teacher: int
    prune: int
    finetune: int
    lr_teacher: float
    lr: float
    keeps: tuple[float, ...]
    rivals: tuple[str, ...] = RIVALS
    losses: tuple[str, ...] = ()
    is_ablated: bool = False
    round_to: int = 1
    temperature: float = 4.0
    weight: float = 1.0

    @property
    def total(self) -> int:
        """Iterations of a cell."""
        return self.prune + self.finetune

    @property
    def picture(self) -> Tensor:
        """Zeros of the shape of one picture."""
        return self.task().example_inputs()

    @property
    def looks(self) -> dict[int, str]:
        """When the network is looked at, in iterations of fine-tuning."""
        return {0: "removal", self.epoch // 10: "0.1 epochs", 3 * self.epoch // 10: "0.3 epochs", self.epoch: "1 epoch"}


def conv(inp: int, out: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inp, out, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(out), nn.ReLU()
    )


class Residual(nn.Module):
    """Three convolutions, the middle one grouped, with a sum: a ResNeXt's bottleneck or a MobileNet's inverted one."""

    def __init__(self, inp: int, out: int, mid: int, groups: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(inp, mid, 1),
            conv(mid, mid, 3, stride, groups),
            nn.Conv2d(mid, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        changes = inp != out or stride != 1
        self.skip = nn.Conv2d(inp, out, 1, stride, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.skip(x)


class SmallGroupedNet(nn.Module):
    """Three stages of two residual blocks for one grey channel, behind a stem that halves the picture."""

    def __init__(
        self, widths: tuple[int, ...], middle: Callable[[int, int], int], groups: Callable[[int], int]
    ) -> None:
        super().__init__()
        blocks, inp = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(2):
                mid = middle(inp, width)
                blocks.append(Residual(inp, width, mid, groups(mid), 2 if stage and not block else 1))
                inp = width
        self.stem, self.layers, self.classify = (
            conv(1, widths[0], stride=2),
            nn.Sequential(*blocks),
            nn.Linear(widths[-1], 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.layers(self.stem(x)).mean((2, 3)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet 16/32/64": partial(SmallResNet, 10, (16, 32, 64)),
    "ResNet 32/64/128": partial(SmallResNet, 10, (32, 64, 128)),
    "ResNeXt 16/32/64, 4 groups": partial(SmallGroupedNet, (16, 32, 64), lambda inp, out: out, lambda mid: 4),
    "MobileNet 12/24/48, expansion 3": partial(
        SmallGroupedNet, (12, 24, 48), lambda inp, out: 3 * inp, lambda mid: mid
    ),
}


def pictures(network: str) -> Task:
    """Fashion-MNIST."""
    return Task("fashion-mnist", network, fashion_mnist(), NETWORKS[network])


def landscape() -> Task:
    """Climate zones from satellite pictures, with the encoder that was trained on ImageNet."""
    data = climate()
    name = "EfficientNet-Lite0 (ImageNet) + FPN"
    return Task("climate", name, data, lambda: EfficientNetLite0FPN(len(data.classes)), distill_at="classify")


SHORT = dict(batch=128, epoch=SHORT_EPOCH, teacher=9 * SHORT_EPOCH, prune=60, finetune=SHORT_EPOCH, lr_teacher=4e-3,
             lr=2e-3)  # fmt: skip
LONG = {**SHORT, "epoch": EPOCH, "teacher": 4 * EPOCH, "prune": 140, "finetune": EPOCH}
STUDIES: dict[str, Study] = {
    "small": Study(partial(pictures, "ResNet 16/32/64"), **SHORT, keeps=(0.7, 0.5, 0.3, 0.2, 0.1, 0.05),
        losses=("none", "features", "logits+features", "logits, fine-tuning only"), is_ablated=True),
    "large": Study(
        partial(pictures, "ResNet 32/64/128"), **LONG, keeps=(0.465, 0.2325), rivals=("uniform width", *RIVALS[2:])
    ),
    "resnext": Study(partial(pictures, "ResNeXt 16/32/64, 4 groups"), **SHORT, keeps=(0.3,)),
    "mobilenet": Study(partial(pictures, "MobileNet 12/24/48, expansion 3"), **SHORT, keeps=(0.3,)),
    "climate": Study(
        landscape, batch=16, epoch=100, teacher=200, prune=60, finetune=100, lr_teacher=1.5e-3, lr=8e-4,
        keeps=(0.3, 0.5), rivals=("uniform width", *RIVALS[2:]), losses=("none", "pixel KL", "CIRKD"), round_to=8,
        temperature=1.0, weight=3.0,
    ),
}  # fmt: skip
