"""SeaFormer-L with its light head: the mobile segmentation network that the CPD paper prunes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpd_fast.models.blocks import ConvModule, DropPath, enlarge

_Blocks = tuple[tuple[int, int, int, int], ...]  # kernel, expansion, channels, stride of each inverted residual


@dataclass(frozen=True)
class SeaFormerConfig:
    """Sizes of a SeaFormer; the defaults are SeaFormer-L for ADE20K.

    Attributes:
        stages: Inverted residuals (kernel, expansion, channels, stride) of the five stages.
        stem: Channels of the stem.
        depths: Transformer blocks behind the last ``len(depths)`` stages.
        key_dims: Width of a head's keys, a transformer stage.
        mlp_ratios: Hidden channels of the feed-forward part over its width.
        heads: Of the attention.
        value_ratio: Width of a head's values over that of its keys.
        fuse: Channels of the light head's fusion blocks.
        drop_path: Stochastic depth of the last block of each transformer stage.
    """

    stages: tuple[_Blocks, ...] = (
        ((3, 3, 32, 1), (3, 4, 64, 2), (3, 4, 64, 1)),
        ((5, 4, 128, 2), (5, 4, 128, 1)),
        ((3, 4, 192, 2), (3, 4, 192, 1)),
        ((5, 4, 256, 2),),
        ((3, 6, 320, 2),),
    )
    stem: int = 32
    depths: tuple[int, ...] = (3, 3, 3)
    key_dims: tuple[int, ...] = (16, 20, 24)
    mlp_ratios: tuple[int, ...] = (2, 4, 6)
    heads: int = 8
    value_ratio: int = 2
    fuse: tuple[int, ...] = (128, 160, 192)
    drop_path: float = 0.1


class SeaFormer(nn.Module):
    """Inverted residuals, squeeze-enhanced axial attention and the light head; 14.0 M parameters at the defaults.

    Takes images ``(N, 3, H, W)``, returns logits ``(N, num_classes, H / 8, W / 8)``. Names are those of the authors'
    checkpoints (``backbone.smb1 ...``, ``decode_head.fuse1 ...``), which load as they are.

    Args:
        num_classes: Classes.
        config: Sizes; ``None`` is SeaFormer-L.

    Source: Wan et al., arXiv:2301.13156, segmentation network of its release.

    Example:
        >>> small = SeaFormerConfig(stages=(((3, 1, 8, 1),), ((3, 2, 16, 2),), ((3, 2, 16, 2),)), stem=8, depths=(1,),
        ...     key_dims=(4,), mlp_ratios=(2,), heads=2, fuse=(16,))
        >>> SeaFormer(5, small).eval()(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 5, 16, 16])
    """

    def __init__(self, num_classes: int = 150, config: SeaFormerConfig | None = None) -> None:
        super().__init__()
        config = config if config is not None else SeaFormerConfig()
        self.backbone = _Backbone(config)
        widths = [stage[-1][2] for stage in config.stages]
        self.decode_head = _LightHead([widths[1], *widths[-len(config.depths) :]], config.fuse, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, 3, H, W)`` -> logits ``(N, num_classes, H / 8, W / 8)``."""
        return self.decode_head(self.backbone(x))


class _ConvBN(nn.Sequential):
    def __init__(self, a: int, b: int, kernel: int = 1, stride: int = 1, groups: int = 1, zero: bool = False) -> None:
        super().__init__()
        self.add_module("c", nn.Conv2d(a, b, kernel, stride, kernel // 2, groups=groups, bias=False))
        norm = nn.BatchNorm2d(b)
        self.add_module("bn", norm)
        if zero:  # a residual branch begins as nothing
            nn.init.zeros_(norm.weight)


class _InvertedResidual(nn.Module):
    def __init__(self, a: int, b: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = a * expansion
        layers: list[nn.Module] = [_ConvBN(a, wide), nn.ReLU()] if expansion != 1 else []
        layers += [_ConvBN(wide, wide, kernel, stride, groups=wide), nn.ReLU(), _ConvBN(wide, b)]
        self.conv = nn.Sequential(*layers)
        self.is_residual = stride == 1 and a == b

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.is_residual else self.conv(x)


class _Stage(nn.Module):
    def __init__(self, width: int, blocks: _Blocks, stem: bool) -> None:
        super().__init__()
        self.stem_block = nn.Sequential(_ConvBN(3, width, 3, 2), nn.ReLU()) if stem else nn.Identity()
        self.count = len(blocks)
        for i, (kernel, expansion, channels, stride) in enumerate(blocks, 1):
            self.add_module(f"layer{i}", _InvertedResidual(width, channels, kernel, stride, expansion))
            width = channels

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_block(x)
        for i in range(1, self.count + 1):
            x = self.get_submodule(f"layer{i}")(x)
        return x


class _AxialPosition(nn.Module):
    """A learnt position embedding of 16 places, interpolated to as many as there are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, width, 16))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, width, places)`` -> the same."""
        return x + F.interpolate(self.pos_embed, size=x.shape[-1], mode="linear", align_corners=False)


class _SeaAttention(nn.Module):
    """Attention over rows and over columns, each squeezed to a line, beside a convolution that keeps the detail."""

    def __init__(self, width: int, key_dim: int, heads: int, value_ratio: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, key_dim**-0.5
        keys, values = key_dim * heads, key_dim * heads * value_ratio
        self.to_q, self.to_k, self.to_v = _ConvBN(width, keys), _ConvBN(width, keys), _ConvBN(width, values)
        self.proj = nn.Sequential(nn.ReLU6(), _ConvBN(values, width, zero=True))
        self.proj_encode_row = nn.Sequential(nn.ReLU6(), _ConvBN(values, values, zero=True))
        self.proj_encode_column = nn.Sequential(nn.ReLU6(), _ConvBN(values, values, zero=True))
        self.pos_emb_rowq, self.pos_emb_rowk = _AxialPosition(keys), _AxialPosition(keys)
        self.pos_emb_columnq, self.pos_emb_columnk = _AxialPosition(keys), _AxialPosition(keys)
        every = 2 * keys + values
        self.dwconv, self.act = _ConvBN(every, every, 3, groups=every), nn.ReLU6()
        self.pwconv = _ConvBN(every, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        detail = self.pwconv(self.act(self.dwconv(torch.cat([q, k, v], 1))))
        rows = self._attend(self.pos_emb_rowq(q.mean(-1)), self.pos_emb_rowk(k.mean(-1)), v.mean(-1))
        columns = self._attend(self.pos_emb_columnq(q.mean(-2)), self.pos_emb_columnk(k.mean(-2)), v.mean(-2))
        lines = self.proj_encode_row(rows.unsqueeze(-1)) + self.proj_encode_column(columns.unsqueeze(-2))
        gate = F.relu6(self.proj(v + lines) + 3) / 6
        return gate * detail

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries, keys and values ``(N, heads * d, places)`` -> values ``(N, heads * d, places)``."""
        n, _, places = q.shape
        q, k, v = (t.reshape(n, self.heads, -1, places) for t in (q, k, v))
        weights = (q.transpose(2, 3) @ k * self.scale).softmax(-1)  # (N, heads, places, places)
        return (weights @ v.transpose(2, 3)).transpose(2, 3).reshape(n, -1, places)


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = _ConvBN(width, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.ReLU6()
        self.fc2 = _ConvBN(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.dwconv(self.fc1(x))))


class _Block(nn.Module):
    def __init__(self, width: int, key_dim: int, heads: int, value_ratio: int, mlp_ratio: int, rate: float) -> None:
        super().__init__()
        self.attn = _SeaAttention(width, key_dim, heads, value_ratio)
        self.drop_path = DropPath(rate)
        self.mlp = _Mlp(width, width * mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(x))
        return x + self.drop_path(self.mlp(x))


class _Transformer(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            x = block(x)
        return x


class _Backbone(nn.Module):
    """Maps at stride 8 (the detail) and behind each transformer stage."""

    def __init__(self, c: SeaFormerConfig) -> None:
        super().__init__()
        self.stages, self.transformers = len(c.stages), len(c.depths)
        width = c.stem
        for i, blocks in enumerate(c.stages, 1):
            self.add_module(f"smb{i}", _Stage(width, blocks, stem=i == 1))
            width = blocks[-1][2]
        for i, depth in enumerate(c.depths, 1):
            width = c.stages[i - 1 - len(c.depths)][-1][2]
            rates = [c.drop_path * n / max(depth - 1, 1) for n in range(depth)]
            sizes = (width, c.key_dims[i - 1], c.heads, c.value_ratio, c.mlp_ratios[i - 1])
            self.add_module(f"trans{i}", _Transformer([_Block(*sizes, rate) for rate in rates]))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for i in range(1, self.stages + 1):
            x = self.get_submodule(f"smb{i}")(x)
            if i == 2:
                maps.append(x)
            number = i - self.stages + self.transformers
            if number > 0:
                x = self.get_submodule(f"trans{number}")(x)
                maps.append(x)
        return maps


class _Fusion(nn.Module):
    """Detail weighted by where the coarse map looks."""

    def __init__(self, detail: int, coarse: int, width: int) -> None:
        super().__init__()
        self.local_embedding = ConvModule(detail, width, act=False)
        self.global_act = ConvModule(coarse, width, act=False)

    def forward(self, detail: Tensor, coarse: Tensor) -> Tensor:
        gate = F.relu6(self.global_act(coarse) + 3) / 6
        return self.local_embedding(detail) * enlarge(gate, detail)


class _LightHead(nn.Module):
    def __init__(self, inputs: Sequence[int], fuse: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.count = len(fuse)
        for i, width in enumerate(fuse, 1):
            self.add_module(f"fuse{i}", _Fusion(inputs[0] if i == 1 else fuse[i - 2], inputs[i], width))
        self.linear_fuse = ConvModule(fuse[-1], fuse[-1], groups=fuse[-1])
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(fuse[-1], num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = maps[0]
        for i in range(1, self.count + 1):
            x = self.get_submodule(f"fuse{i}")(x, maps[i])
        return self.conv_seg(self.dropout(self.linear_fuse(x)))
