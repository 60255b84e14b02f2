"""DeiT-S with the UPerNet head: the segmentation network that the CPD paper prunes, in mmseg's architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpd_fast.errors import ShapeError
from cpd_fast.models.blocks import ConvModule, DropPath, enlarge

TAPS = (3, 6, 9, 12)  # the head reads after these blocks, counted from 1


class DeiTUPerNet(nn.Module):
    """Plain ViT encoder (DeiT-S by default), UPerNet head (PSP + FPN) and auxiliary FCN head, all at stride 16.

    Takes images ``(N, 3, H, W)``, returns logits ``(N, num_classes, H / 16, W / 16)``, and with the auxiliary head the
    tuple (logits, auxiliary logits), in either mode. Set ``auxiliary_head = None`` to leave it out of what is deployed.

    The defaults are mmseg's ``vit_deit-s16_upernet_8xb2-80k_ade20k-512x512``: 52.1 M parameters with the auxiliary
    head. :func:`from_mmseg` renames its checkpoints.

    Args:
        num_classes: Classes.
        image_size: Height and width that the position embedding is made for; others are interpolated.
        width: Of the tokens.
        depth: Blocks.
        heads: Of the attention.
        head_width: Channels of the UPerNet head.
        auxiliary: Whether there is an auxiliary head.
        auxiliary_width: Its channels.
        taps: Blocks, counted from 1, after which the head reads.
        drop_path: Stochastic depth of the last block; falls linearly to 0 at the first.

    Source: Touvron et al., arXiv:2012.12877; Xiao et al., arXiv:1807.10221; built as in mmsegmentation 1.2.2.

    Example:
        >>> net = DeiTUPerNet(5, image_size=(64, 64), width=24, depth=4, heads=3, head_width=16, taps=(1, 2, 3, 4))
        >>> [tuple(y.shape) for y in net.eval()(torch.zeros(1, 3, 64, 64))]
        [(1, 5, 4, 4), (1, 5, 4, 4)]
    """

    def __init__(
        self,
        num_classes: int = 150,
        image_size: tuple[int, int] = (512, 512),
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        head_width: int = 512,
        auxiliary: bool = True,
        auxiliary_width: int = 256,
        taps: Sequence[int] = TAPS,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        self.backbone = _ViT(image_size, width, depth, heads, taps, drop_path)
        self.decode_head = UPerHead([width] * len(taps), head_width, num_classes)
        self.auxiliary_head = FCNHead(width, auxiliary_width, num_classes) if auxiliary else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images ``(N, 3, H, W)`` -> logits, or (logits, auxiliary logits)."""
        maps = self.backbone(x)
        logits = self.decode_head(maps)
        return logits if self.auxiliary_head is None else (logits, self.auxiliary_head(maps[-1]))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)  # (N, heads, tokens, head dim)
        return self.proj(y.transpose(1, 2).reshape(n, tokens, -1))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))  # mmseg drops paths of the feed-forward branch only
        return x + self.drop_path(self.fc2(self.act(self.fc1(self.norm2(x)))))


class _ViT(nn.Module):
    """Maps ``(N, width, H / 16, W / 16)`` after the tapped blocks; no norm behind the last block, as in mmseg."""

    def __init__(
        self, image_size: tuple[int, int], width: int, depth: int, heads: int, taps: Sequence[int], drop_path: float
    ) -> None:
        super().__init__()
        self.grid, self.taps = (image_size[0] // 16, image_size[1] // 16), tuple(taps)
        self.patch_embed = nn.Conv2d(3, width, 16, stride=16, bias=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1] + 1, width))
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(_Block(width, heads, rate) for rate in rates)
        for embedding in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(embedding, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> list[Tensor]:
        if x.shape[2] % 16 or x.shape[3] % 16:
            raise ShapeError(f"DeiTUPerNet: expected height and width that 16 divides, got {tuple(x.shape[2:])}")
        x = self.patch_embed(x)
        n, _, h, w = x.shape
        x = torch.cat([self.cls_token.expand(n, -1, -1), x.flatten(2).transpose(1, 2)], 1) + self._positions(h, w)
        maps = []
        for number, block in enumerate(self.blocks, 1):
            x = block(x)
            if number in self.taps:
                maps.append(x[:, 1:].transpose(1, 2).reshape(n, -1, h, w))
        return maps

    def _positions(self, h: int, w: int) -> Tensor:
        if (h, w) == self.grid:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, self.grid)
        grid = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)


class UPerHead(nn.Module):
    """Pyramid pooling over the last map, a feature pyramid over all, and a classifier.

    Source: Xiao et al., arXiv:1807.10221, as in mmsegmentation.

    Example:
        >>> head = UPerHead([8, 8], 16, 5).eval()
        >>> head([torch.zeros(1, 8, 8, 8), torch.zeros(1, 8, 4, 4)]).shape
        torch.Size([1, 5, 8, 8])
    """

    def __init__(
        self, inputs: Sequence[int], width: int, num_classes: int, pools: Sequence[int] = (1, 2, 3, 6)
    ) -> None:
        super().__init__()
        top = inputs[-1]
        self.psp_modules = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(p), ConvModule(top, width)) for p in pools)
        self.bottleneck = ConvModule(top + len(pools) * width, width, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(c, width) for c in inputs[:-1])
        self.fpn_convs = nn.ModuleList(ConvModule(width, width, 3) for _ in inputs[:-1])
        self.fpn_bottleneck = ConvModule(len(inputs) * width, width, 3)
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps, finest first -> logits at the finest map's size."""
        top = maps[-1]
        pooled = [enlarge(module(top), top) for module in self.psp_modules]
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=False)]
        levels.append(self.bottleneck(torch.cat([top, *pooled], 1)))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + enlarge(levels[i], levels[i - 1])
        outs = [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=False)] + [levels[-1]]
        merged = torch.cat([outs[0], *(enlarge(x, outs[0]) for x in outs[1:])], 1)
        return self.conv_seg(self.dropout(self.fpn_bottleneck(merged)))


class FCNHead(nn.Module):
    """One 3x3 convolution and a classifier: mmseg's auxiliary head.

    Source: Long et al., arXiv:1411.4038, as in mmsegmentation.

    Example:
        >>> FCNHead(8, 16, 5).eval()(torch.zeros(1, 8, 4, 4)).shape
        torch.Size([1, 5, 4, 4])
    """

    def __init__(self, inputs: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvModule(inputs, width, 3))
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, inputs, H, W)`` -> logits ``(N, num_classes, H, W)``."""
        return self.conv_seg(self.dropout(self.convs(x)))


def from_mmseg(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename an mmseg 1.x checkpoint of DeiT + UPerNet for :class:`DeiTUPerNet`; other names go through as they are.

    ``layers.N.ln1`` -> ``blocks.N.norm1``, ``attn.attn.in_proj_`` -> ``attn.qkv.``, ``attn.attn.out_proj`` ->
    ``attn.proj``, ``ffn.layers.0.0`` and ``.1`` -> ``fc1`` and ``fc2``, ``patch_embed.projection`` -> ``patch_embed``.
    The heads have mmseg's names.

    Example:
        >>> list(from_mmseg({"backbone.layers.0.attn.attn.in_proj_weight": torch.zeros(1)}))
        ['backbone.blocks.0.attn.qkv.weight']
    """
    renames = {
        "backbone.layers.": "backbone.blocks.",
        ".ln1.": ".norm1.",
        ".ln2.": ".norm2.",
        ".attn.attn.in_proj_": ".attn.qkv.",
        ".attn.attn.out_proj.": ".attn.proj.",
        ".ffn.layers.0.0.": ".fc1.",
        ".ffn.layers.1.": ".fc2.",
        "patch_embed.projection.": "patch_embed.",
    }
    result = {}
    for name, value in state.items():
        if name.startswith("backbone."):
            for old, new in renames.items():
                name = name.replace(old, new)
        result[name] = value
    return result
