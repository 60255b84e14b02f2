"""A .pt2 file runs without the class of the model, at any batch size, and computes the same."""

import pytest
import torch
from torch import nn

import cpd_fast as cpd
from cpd_fast.errors import BackendError
from cpd_fast.export import export_pt2, pt2
from tests.nets import FusedAttention, informative


def test_compacted_network_with_attention(tmp_path):
    """Repaired sizes and the constant that keeps the attention's scale go along."""
    torch.manual_seed(0)
    model, x = informative(FusedAttention()), torch.randn(2, 5, 3)
    graph = cpd.comb(model, x)
    small = cpd.compact(model, graph, cpd.random_plan(graph, keep=0.5))
    assert export_pt2(small, x, tmp_path / "small.pt2") < 1e-5
    again = torch.export.load(tmp_path / "small.pt2").module()
    x = torch.randn(7, 5, 3)
    with torch.no_grad():
        torch.testing.assert_close(again(x), small(x))
    assert [p.name for p in tmp_path.iterdir()] == ["small.pt2"]


def test_wrong_outputs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pt2, "difference", lambda *_: 1.0)
    with pytest.raises(BackendError, match=r"differs from the model by 1\.00e\+00.*allowed are 0\.0001; nothing was"):
        export_pt2(nn.Linear(4, 2), torch.zeros(1, 4), tmp_path / "a.pt2")
    assert list(tmp_path.iterdir()) == []


def test_model_that_cannot_be_exported_is_named(tmp_path):
    class Loop(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(BackendError, match="Loop cannot be exported by torch.export: "):
        export_pt2(Loop(), torch.zeros(2, 3), tmp_path / "loop.pt2")


def test_compacted_network_compiles():
    """torch.compile of a compacted network: one graph, the same values."""
    torch.manual_seed(0)
    model, x = informative(FusedAttention()), torch.randn(2, 5, 3)
    graph = cpd.comb(model, x)
    small = cpd.compact(model, graph, cpd.random_plan(graph, keep=0.5))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(small, backend="aot_eager", fullgraph=True)(x), small(x))


def test_sizes_that_compaction_puts_right_follow_a_symbolic_batch(tmp_path):
    """torch.export runs the forward with symbols for sizes; the calls that get other sizes must still be counted."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    model = timm.create_model("beit_base_patch16_224", img_size=32, depth=1, embed_dim=48, num_heads=3, num_classes=4)
    model, x = model.eval(), torch.randn(2, 3, 32, 32)
    graph = cpd.comb(model, x)
    small = cpd.compact(model, graph, cpd.random_plan(graph, keep=0.5))
    assert any(hasattr(m, "resized_calls") for m in small.modules())
    assert export_pt2(small, x, tmp_path / "small.pt2") < 1e-5
