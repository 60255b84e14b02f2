"""Tiny nets, one an operator rule, with the coupled groups written out by hand.

``NETS[id] = (build, input shape, groups)`` where groups are ``name: (channels, blocks, {(tensor, dim): indices a
channel})`` for everything that is prunable; a tensor that is missing there must keep its shape.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv2(F.relu_(self.bn1(self.conv1(x))))
        return self.head(x.mean((2, 3)))


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)
        self.bn = nn.BatchNorm2d(10)
        self.out = nn.Conv2d(10, 2, 1)

    def forward(self, x):
        return self.out(self.bn(torch.cat([self.a(x), self.b(x)], 1)))


class Gate(nn.Module):
    """GLU by chunk: halves meet, so index i and i + 6 go together."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 12), nn.Linear(6, 3)

    def forward(self, x):
        a, b = self.fc1(x).chunk(2, -1)
        return self.fc2(a * torch.sigmoid(b))


class SplitBranches(nn.Module):
    """Equal parts that never meet: each must keep as many as the other."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.left, self.right = nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 1)
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        a, b = self.conv(x).chunk(2, 1)
        return self.head(self.left(a) + self.right(b))


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.pw, self.dw = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 3, groups=6, padding=1)
        self.bn, self.out = nn.BatchNorm2d(12), nn.Conv2d(12, 2, 1)

    def forward(self, x):
        return self.out(F.relu6(self.bn(self.dw(self.pw(x)))))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.pw, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=2, padding=1)
        self.out = nn.Conv2d(12, 2, 1)

    def forward(self, x):
        return self.out(self.conv(self.pw(x)).relu())


class Flatten(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 5, 3), nn.Linear(5 * 4 * 4, 3)

    def forward(self, x):
        return self.fc(torch.flatten(F.max_pool2d(self.conv(x), 1), 1))


class FusedAttention(nn.Module):
    """Tokens (N, T, C) with a fused qkv view; the scale follows head_dim, q passes an Identity."""

    def __init__(self, heads: int = 2, head_dim: int = 4):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.proj_in = nn.Linear(3, 6)
        self.norm = nn.LayerNorm(6)
        self.qkv, self.q_norm = nn.Linear(6, 3 * heads * head_dim), nn.Identity()
        self.proj, self.head = nn.Linear(heads * head_dim, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.proj_in(x)
        n, t, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(n, t, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(self.q_norm(q), k, v)
        x = x + self.proj(y.transpose(1, 2).reshape(n, t, -1))
        return self.head(x).mean(1)


class SeparateAttention(nn.Module):
    """q, k, v from their own layers; explicit products, and the default scale folded into rows of q."""

    def __init__(self):
        super().__init__()
        self.head_dim = 4
        self.q, self.k, self.v = nn.Linear(5, 8), nn.Linear(5, 8, bias=False), nn.Linear(5, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.mid, self.dec = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.dec.weight = self.mid.weight
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        return self.out(self.dec(self.mid(self.enc(x)).relu()))


class PixelShuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.out(F.pixel_shuffle(self.conv(x), 2))


class Shuffle(nn.Module):
    """Channel shuffle: position c of both halves goes together."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.conv(x)
        n, c, h, w = x.shape
        return self.out(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.conv(x)
        return self.out(x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid())


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.gn = nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8)
        self.ln, self.fc = nn.LayerNorm(8), nn.Linear(8, 6)
        self.rms, self.out = nn.RMSNorm(6), nn.Linear(6, 2)
        self.gamma = nn.Parameter(torch.ones(8))

    def forward(self, x):
        x = self.gn(self.conv(x)).flatten(2).transpose(1, 2)
        return self.out(self.rms(self.fc(self.ln(x) * self.gamma)))


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.out(self.up(self.conv(x)))


class PaddedShortcut(nn.Module):
    """ResNet option A: zeros are padded onto the shortcut; the padded positions of conv stay."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.out(F.pad(x, (0, 0, 0, 0, 1, 1)) + self.conv(x))


class Tokens(nn.Module):
    """Class token, position table, and patches flattened to tokens."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 6, 2, stride=2)
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 17, 6))
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        return self.out(x[:, 0])


class Twice(nn.Module):
    """A module called twice, dict output, integer input beside the picture."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.out = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.block(self.block(self.stem(x)).relu())
        return {"logits": self.out(x), "size": torch.tensor(x.shape[-1])}


IMAGE = (2, 3, 6, 6)
NETS: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, tuple[int, int, dict[tuple[str, int], int]]]]] = {
    "residual": (
        Residual,
        IMAGE,
        {
            "stem": (
                6,
                1,
                {
                    ("stem.weight", 0): 1,
                    ("stem.bias", 0): 1,
                    ("conv1.weight", 1): 1,
                    ("conv2.weight", 0): 1,
                    ("conv2.bias", 0): 1,
                    ("head.weight", 1): 1,
                },
            ),
            "conv1": (
                8,
                1,
                {
                    ("conv1.weight", 0): 1,
                    ("bn1.weight", 0): 1,
                    ("bn1.bias", 0): 1,
                    ("bn1.running_mean", 0): 1,
                    ("bn1.running_var", 0): 1,
                    ("conv2.weight", 1): 1,
                },
            ),
        },
    ),
    "concat": (
        Concat,
        IMAGE,
        {
            name: (
                n,
                1,
                {(f"{name}.weight", 0): 1, (f"{name}.bias", 0): 1, ("out.weight", 1): 1}
                | {(f"bn.{t}", 0): 1 for t in ("weight", "bias", "running_mean", "running_var")},
            )
            for name, n in (("a", 4), ("b", 6))
        },
    ),
    "gate": (Gate, (2, 5), {"fc1": (6, 1, {("fc1.weight", 0): 2, ("fc1.bias", 0): 2, ("fc2.weight", 1): 1})}),
    "split": (
        SplitBranches,
        IMAGE,
        {
            "conv": (4, 1, {("conv.weight", 0): 1, ("conv.bias", 0): 1, ("left.weight", 1): 1}),
            "conv#2": (4, 1, {("conv.weight", 0): 1, ("conv.bias", 0): 1, ("right.weight", 1): 1}),
            "left": (
                5,
                1,
                {(f"{m}.{t}", 0): 1 for m in ("left", "right") for t in ("weight", "bias")} | {("head.weight", 1): 1},
            ),
        },
    ),
    "depthwise": (
        Depthwise,
        IMAGE,
        {
            "pw": (
                6,
                1,
                {("pw.weight", 0): 1, ("pw.bias", 0): 1, ("dw.weight", 0): 2, ("dw.bias", 0): 2, ("out.weight", 1): 2}
                | {(f"bn.{t}", 0): 2 for t in ("weight", "bias", "running_mean", "running_var")},
            )
        },
    ),
    "grouped": (
        Grouped,
        IMAGE,
        {
            "pw": (8, 2, {("pw.weight", 0): 1, ("pw.bias", 0): 1, ("conv.weight", 1): 6}),
            "conv": (12, 2, {("conv.weight", 0): 1, ("conv.bias", 0): 1, ("out.weight", 1): 1}),
        },
    ),
    "flatten": (
        Flatten,
        IMAGE,
        {"conv": (5, 1, {("conv.weight", 0): 1, ("conv.bias", 0): 1, ("fc.weight", 1): 16})},
    ),
    "fused_attention": (
        FusedAttention,
        (2, 5, 3),
        {
            "proj_in": (
                6,
                1,
                {(f"{m}.{t}", 0): 1 for m in ("proj_in", "norm", "proj") for t in ("weight", "bias")}
                | {("qkv.weight", 1): 1, ("head.weight", 1): 1},
            ),
            "qkv": (8, 2, {("qkv.weight", 0): 2, ("qkv.bias", 0): 2}),
            "qkv#2": (8, 2, {("qkv.weight", 0): 1, ("qkv.bias", 0): 1, ("proj.weight", 1): 1}),
        },
    ),
    "separate_attention": (
        SeparateAttention,
        (2, 5, 5),
        {
            "q": (8, 2, {("q.weight", 0): 1, ("q.bias", 0): 1, ("k.weight", 0): 1}),
            "v": (8, 2, {("v.weight", 0): 1, ("v.bias", 0): 1, ("out.weight", 1): 1}),
        },
    ),
    "tied": (
        Tied,
        (2, 4),
        {
            "enc": (
                6,
                1,
                {
                    ("enc.weight", 0): 1,
                    ("enc.bias", 0): 1,
                    ("mid.weight", 0): 1,
                    ("mid.weight", 1): 1,
                    ("mid.bias", 0): 1,
                    ("dec.bias", 0): 1,
                    ("out.weight", 1): 1,
                },
            )
        },
    ),
    "pixel_shuffle": (
        PixelShuffle,
        IMAGE,
        {"conv": (3, 1, {("conv.weight", 0): 4, ("conv.bias", 0): 4, ("out.weight", 1): 1})},
    ),
    "shuffle": (
        Shuffle,
        IMAGE,
        {"conv": (4, 1, {("conv.weight", 0): 2, ("conv.bias", 0): 2, ("out.weight", 1): 2})},
    ),
    "squeeze_excite": (
        SqueezeExcite,
        IMAGE,
        {
            "conv": (
                8,
                1,
                {
                    ("conv.weight", 0): 1,
                    ("conv.bias", 0): 1,
                    ("down.weight", 1): 1,
                    ("up.weight", 0): 1,
                    ("up.bias", 0): 1,
                    ("out.weight", 1): 1,
                },
            ),
            "down": (4, 1, {("down.weight", 0): 1, ("down.bias", 0): 1, ("up.weight", 1): 1}),
        },
    ),
    "norms": (
        Norms,
        IMAGE,
        {
            "conv": (
                8,
                2,
                {(f"{m}.{t}", 0): 1 for m in ("conv", "gn", "ln") for t in ("weight", "bias")}
                | {("gamma", 0): 1, ("fc.weight", 1): 1},
            ),
            "fc": (6, 1, {("fc.weight", 0): 1, ("fc.bias", 0): 1, ("rms.weight", 0): 1, ("out.weight", 1): 1}),
        },
    ),
    "transposed": (
        Transposed,
        IMAGE,
        {
            "conv": (6, 1, {("conv.weight", 0): 1, ("conv.bias", 0): 1, ("up.weight", 0): 1}),
            "up": (4, 1, {("up.weight", 1): 1, ("up.bias", 0): 1, ("out.weight", 1): 1}),
        },
    ),
    "padded_shortcut": (
        PaddedShortcut,
        IMAGE,
        {
            "stem": (
                4,
                1,
                {
                    ("stem.weight", 0): 1,
                    ("stem.bias", 0): 1,
                    ("conv.weight", 1): 1,
                    ("conv.weight", 0): 1,
                    ("conv.bias", 0): 1,
                    ("out.weight", 1): 1,
                },
            )
        },
    ),
    "tokens": (
        Tokens,
        (2, 3, 8, 8),
        {
            "patch": (
                6,
                1,
                {("patch.weight", 0): 1, ("patch.bias", 0): 1, ("cls", 2): 1, ("pos", 2): 1, ("out.weight", 1): 1},
            )
        },
    ),
    "twice": (
        Twice,
        IMAGE,
        {
            "stem": (
                6,
                1,
                {
                    ("stem.weight", 0): 1,
                    ("stem.bias", 0): 1,
                    ("block.weight", 0): 1,
                    ("block.weight", 1): 1,
                    ("block.bias", 0): 1,
                    ("out.weight", 1): 1,
                },
            )
        },
    ),
}


def informative(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and random statistics, so that a wrong coupling shows in the output."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if not t.is_floating_point():
                continue
            if name.endswith("running_var") or (t.dim() == 1 and name.endswith("weight")):
                t.copy_(0.5 + torch.rand(t.shape, generator=g))
            elif t.dim() <= 1:
                t.copy_(torch.randn(t.shape, generator=g) * 0.3)
            elif float(t.abs().max()) == 0 or t.numel() < 1000:
                t.copy_(torch.randn(t.shape, generator=g) * 0.3)
    return model.eval()


def tensors_of(out: object) -> list[Tensor]:
    """The floating point tensors of an output."""
    from torch.utils._pytree import tree_leaves

    return [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]


def relative_error(a: object, b: object) -> float:
    """Largest difference of two outputs, relative to the largest entry."""
    pairs = list(zip(tensors_of(a), tensors_of(b), strict=True))
    assert pairs
    errors = [((p - q).abs().max() / p.abs().max().clamp_min(1e-30)).detach().double() for p, q in pairs]
    return float(torch.stack(errors).max())  # NaN where any is
