"""Random small networks out of all rules: masked equals compacted, whatever was drawn."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from cpd_fast.compact import compact
from cpd_fast.pipeline import comb
from cpd_fast.prune import masked
from cpd_fast.schedule import plan_cost, random_plan
from tests.nets import informative, relative_error


class Block(nn.Module):
    """One of the operators that channels run through; (N, C, H, W) in, (N, C', H, W) out."""

    def __init__(self, kind: str, c: int, width: int):
        super().__init__()
        self.kind = kind
        self.out_channels = c
        if kind in ("conv", "residual", "concat", "gate", "shuffle", "split"):
            self.conv = nn.Conv2d(c, width, 3, padding=1)
            self.bn = nn.BatchNorm2d(width)
        if kind == "conv":
            self.out_channels = width
        elif kind in ("residual", "gate"):
            self.back = nn.Conv2d(width, c, 1)
        elif kind == "concat":
            self.out_channels = c + width
        elif kind == "shuffle":
            self.out_channels = width
        elif kind == "split":
            self.left, self.right = nn.Conv2d(width // 2, c, 1), nn.Conv2d(width // 2, c, 1)
        elif kind == "grouped":
            self.groups = 2 if c % 2 == 0 else 1
            self.conv = nn.Conv2d(c, 2 * width, 3, padding=1, groups=self.groups)
            self.out_channels = 2 * width
        elif kind == "depthwise":
            self.conv = nn.Conv2d(c, 2 * c, 3, padding=1, groups=c)
            self.out_channels = 2 * c
        elif kind == "layer_norm":
            self.norm, self.fc = nn.LayerNorm(c), nn.Linear(c, width)
            self.out_channels = width
        elif kind == "group_norm":
            self.norm = nn.GroupNorm(2 if c % 2 == 0 else 1, c)
        elif kind in ("attention", "rooted_attention"):
            self.heads, self.head_dim = 2, width
            self.qkv, self.proj = nn.Linear(c, 6 * width), nn.Linear(2 * width, c)
        elif kind == "evolved":
            self.groups, self.conv = 2 if c % 2 == 0 else 1, nn.Conv2d(c, c, 1)
        elif kind == "paths":
            self.other, self.select = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, 2 * c, 1)
        elif kind == "extremes":
            self.mix, self.conv = nn.Conv2d(2, 1, 3, padding=1), nn.Conv2d(c, c, 1)
        elif kind in ("softmax", "routed", "sized"):
            self.fc = nn.Linear(c, c)

    def forward(self, x):
        if self.kind == "conv":
            return F.relu(self.bn(self.conv(x)))
        if self.kind == "residual":
            return x + self.back(F.relu(self.bn(self.conv(x))))
        if self.kind == "concat":
            return torch.cat([x, self.bn(self.conv(x))], 1)
        if self.kind == "gate":
            squeezed = F.adaptive_avg_pool2d(self.bn(self.conv(x)), 1)
            return x * torch.sigmoid(self.back(squeezed))
        if self.kind == "shuffle":
            y = self.bn(self.conv(x))
            n, c, h, w = y.shape
            return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        if self.kind == "split":
            a, b = self.bn(self.conv(x)).chunk(2, 1)
            return self.left(a) + self.right(b)
        if self.kind in ("grouped", "depthwise"):
            return F.silu(self.conv(x))
        if self.kind == "layer_norm":
            return self.fc(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        if self.kind == "group_norm":
            return self.norm(x)
        if self.kind == "evolved":  # statistics of groups of channels, expanded over the group
            x = self.conv(x)
            n, c, h, w = x.shape
            y = x.reshape(n, self.groups, c // self.groups, h, w)
            std = y.var((2, 3, 4), keepdim=True).add(1e-5).sqrt().expand(y.shape).reshape(x.shape)
            return x * x.sigmoid() / std
        if self.kind == "paths":  # selective kernels
            y = torch.stack([x, self.other(x)], 1)
            weight = self.select(y.sum(1).mean((2, 3), keepdim=True))
            return (y * weight.view(len(x), 2, -1, 1, 1).softmax(1)).sum(1)
        if self.kind == "extremes":  # CBAM
            x = self.conv(x)
            seen = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
            return x * self.mix(seen).sigmoid()
        if self.kind in ("softmax", "routed", "sized"):
            t = x.flatten(2).transpose(1, 2)
            if self.kind == "softmax":
                t = t + self.fc(t).softmax(-1) * F.normalize(t, dim=-1)
            elif self.kind == "routed":
                token = torch.where(self.fc(t).mean((0, 2)) > 0)[0]
                t = t.index_add(1, token, self.fc(t[:, token]))
            else:
                t = t + self.fc(t) * torch.tensor(1 / t.shape[-1], device=t.device)
            return t.transpose(1, 2).reshape(x.shape)
        if self.kind == "rooted_attention":
            n, c, h, w = x.shape
            t = x.flatten(2).transpose(1, 2)
            q, k, v = self.qkv(t).view(n, h * w, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
            y = (q @ k.transpose(-2, -1) / self.head_dim**0.5).softmax(-1) @ v
            return x + self.proj(y.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)
        if self.kind == "attention":
            n, c, h, w = x.shape
            t = x.flatten(2).transpose(1, 2)
            q, k, v = self.qkv(t).view(n, h * w, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return x + self.proj(y).transpose(1, 2).reshape(x.shape)
        raise AssertionError(self.kind)


KINDS = "conv residual concat gate shuffle split grouped depthwise layer_norm group_norm attention".split()
KINDS += "rooted_attention evolved paths extremes softmax routed sized".split()


def build(specs):
    c, blocks = 3, []
    for kind, width in [("conv", 6), *specs]:
        blocks.append(Block(kind, c, 2 * width))
        c = blocks[-1].out_channels
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * c, 3))


@settings(max_examples=150, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    specs=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(2, 4)), min_size=1, max_size=5),
    keep=st.sampled_from([0.9, 0.5, 0.2]),
    seed=st.integers(0, 2**16),
)
def test_masked_equals_compacted(specs, keep, seed):
    torch.manual_seed(seed)
    model = informative(build(specs), seed).double()
    x = torch.randn(2, 3, 4, 4).double()
    graph = comb(model, x)
    frozen = [g for g in graph.groups if not g.prunable and "repaired" in (g.reason or "")]
    assert not frozen, f"a size could not be repaired: {frozen[0].reason}"
    assume(graph.prunable_groups)  # channels that fill whole norm groups may hang together, all of them
    plan = random_plan(graph, keep=keep, generator=torch.Generator().manual_seed(seed))
    small = compact(model, graph, plan)
    with torch.no_grad(), masked(model, graph, plan) as m:
        assert relative_error(m(x), small(x)) < 1e-9
    assert plan_cost(graph, plan).params == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.2])
@pytest.mark.parametrize("specs", [
    [("shuffle", 2), ("group_norm", 2)],  # shuffled pairs fill whole norm groups: none of them may go
    [("shuffle", 2), ("split", 2)],
    [("shuffle", 4), ("grouped", 2)],
    [("split", 2), ("group_norm", 2), ("grouped", 3)],
], ids=str)  # fmt: skip
def test_rows_of_grids_that_are_one_channel(specs, keep):
    model, x = informative(build(specs)).double(), torch.randn(2, 3, 4, 4).double()
    graph = comb(model, x)
    plan = random_plan(graph, keep=keep, generator=torch.Generator().manual_seed(0))
    small = compact(model, graph, plan)
    with torch.no_grad(), masked(model, graph, plan) as m:
        assert relative_error(m(x), small(x)) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_loses_channels(kind):
    model = informative(build([(kind, 3)])).double()
    graph = comb(model, torch.randn(2, 3, 4, 4).double())
    inside = [g for g in graph.prunable_groups if any(s.param.startswith("1.") for s in g.slices)]
    assert inside, f"nothing of {kind} is prunable"
