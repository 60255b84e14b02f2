"""DeiT + UPerNet and SeaFormer: sizes of the papers, mmseg's values and names, exact compaction with both heads."""

import sys
import types

import pytest
import torch
from torch import nn

import cpd_fast as cpd
from cpd_fast.errors import ShapeError
from cpd_fast.models import DeiTUPerNet, SeaFormer, SeaFormerConfig, from_mmseg

TINY_DEIT = {"image_size": (64, 48), "width": 24, "depth": 4, "heads": 3, "head_width": 16, "taps": (1, 2, 3, 4)}
TINY_SEA = SeaFormerConfig(
    stages=(((3, 1, 8, 1), (3, 2, 8, 1)), ((5, 2, 12, 2),), ((3, 2, 16, 2),), ((3, 2, 24, 2),)),
    stem=8,
    depths=(1, 2),
    key_dims=(4, 6),
    mlp_ratios=(2, 3),
    heads=2,
    fuse=(10, 14),
)


def deit(**options):
    return DeiTUPerNet(5, auxiliary_width=12, **{**TINY_DEIT, **options})


def lively(model):
    """Norms and embeddings that make a difference."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return model


def test_sizes_are_those_of_the_papers():
    with torch.device("meta"):
        both, alone, sea = DeiTUPerNet(), DeiTUPerNet(auxiliary=False), SeaFormer()
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(both) == 52_093_484 and count(both) - count(alone) == 923_798
    assert count(sea) == 13_951_510


@pytest.mark.parametrize(
    ("make", "shape"),
    [(deit, (2, 3, 64, 48)), (lambda: SeaFormer(5, TINY_SEA), (2, 3, 64, 96))],
    ids=["deit", "seaformer"],
)
def test_masked_equals_compacted_in_double_precision(make, shape):
    model = lively(make()).double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    graph = cpd.comb(model, x)
    plan = cpd.random_plan(graph, keep=0.6, generator=torch.Generator().manual_seed(3))
    small = cpd.compact(model, graph, plan)
    dense, less = cpd.cost(model, x, graph=graph), cpd.cost(model, x, plan, graph)
    assert sum(p.numel() for p in small.parameters()) == less.params < 0.6 * dense.params
    heads = {"decode_head", "auxiliary_head"} & {n for n, _ in model.named_children()}
    for head in heads:  # both are cut, inputs and inner channels
        assert sum(p.numel() for p in getattr(small, head).parameters()) < 0.7 * sum(
            p.numel() for p in getattr(model, head).parameters()
        )
    with torch.no_grad(), cpd.masked(model, graph, plan, execution="full_width") as masked:
        for ours, theirs in zip(as_list(small(x)), as_list(masked(x)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def as_list(out):
    return [out] if isinstance(out, torch.Tensor) else list(out)


def test_other_sizes_interpolate_the_positions():
    model = deit(auxiliary=False).eval()
    assert model(torch.zeros(1, 3, 96, 64)).shape == (1, 5, 6, 4)
    with pytest.raises(ShapeError, match=r"expected height and width that 16 divides, got \(70, 64\)"):
        model(torch.zeros(1, 3, 70, 64))


def test_without_its_auxiliary_head_the_main_output_stays():
    model = deit().eval()
    x = torch.randn(1, 3, 64, 48)
    logits, _ = model(x)
    model.auxiliary_head = None
    assert torch.equal(model(x), logits)


@pytest.fixture
def mmseg(monkeypatch):
    """The real mmsegmentation; its compiled operators are not needed, and are refused."""
    pytest.importorskip("mmcv", reason="needs mmcv-lite (tried with 2.1.0)")

    def refuse(*_args, **_kwargs):
        raise RuntimeError("mmcv-lite has no compiled operators")

    stub = types.ModuleType("mmcv._ext")
    stub.__file__ = __file__
    stub.__getattr__ = lambda name: refuse if not name.startswith("__") else getattr(types, name)
    monkeypatch.setitem(sys.modules, "mmcv._ext", stub)
    return pytest.importorskip("mmseg.models", reason="needs mmsegmentation (tried with 1.2.2) and ftfy")


def test_deit_upernet_is_mmsegs(mmseg):
    heads = {"num_classes": 5, "norm_cfg": {"type": "BN"}, "align_corners": False}
    backbone = mmseg.VisionTransformer(
        img_size=(64, 48), patch_size=16, embed_dims=24, num_layers=4, num_heads=3, out_indices=(0, 1, 2, 3),
        norm_cfg={"type": "LN", "eps": 1e-6}, drop_path_rate=0.1,
    )  # fmt: skip
    upper = mmseg.UPerHead(in_channels=[24] * 4, in_index=[0, 1, 2, 3], channels=16, **heads)
    lower = mmseg.FCNHead(in_channels=24, in_index=3, channels=12, num_convs=1, concat_input=False, **heads)
    theirs = nn.ModuleDict({"backbone": backbone, "decode_head": upper, "auxiliary_head": lower})
    backbone.init_weights()
    lively(theirs).eval()
    ours = deit().eval()
    ours.load_state_dict(from_mmseg(theirs.state_dict()))  # strict: every name has its place
    for size in ((64, 48), (96, 64)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            maps = backbone(x)
            for a, b in zip(ours(x), (upper(maps), lower(maps)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "heads"), [(DeiTUPerNet, 2), (SeaFormer, 1)])
def test_full_size_compacts_exactly(make, heads):
    model = lively(make()).double().eval()
    x = torch.randn(1, 3, 512, 512, dtype=torch.float64)
    graph = cpd.comb(model, x)
    plan = cpd.random_plan(graph, keep=0.5)
    small = cpd.compact(model, graph, plan)
    with torch.no_grad(), cpd.masked(model, graph, plan, execution="full_width") as masked:
        pairs = list(zip(as_list(small(x)), as_list(masked(x)), strict=True))
    assert len(pairs) == heads
    for ours, theirs in pairs:
        assert (ours - theirs).norm() <= 1e-10 * theirs.norm()
