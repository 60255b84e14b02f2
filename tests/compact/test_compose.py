"""A compacted network that is pruned again: one plan for the original, and one file."""

import pytest
import timm
import torch

import cpd_fast as cpd
from cpd_fast.errors import FileFormatError, PlanError
from cpd_fast.store import FORMAT, VERSION, pack_tensors, read_tensors
from tests.nets import NETS, informative, relative_error


def generator(seed):
    return torch.Generator().manual_seed(seed)


def twice(model, x, keep=0.6):
    """The original's graph and plan, the compacted one's graph and plan, and what both compactions leave."""
    first = cpd.comb(model, x)
    plan = cpd.random_plan(first, keep, generator(1))
    small = cpd.compact(model, first, plan)
    second = cpd.comb(small, x)
    then = cpd.random_plan(second, keep, generator(2))
    return (first, plan, second, then), cpd.compact(small, second, then)


def built(name):
    torch.manual_seed(0)
    if name in NETS:
        make, shape, _ = NETS[name]
        return informative(make()), torch.randn(shape)
    size = {"swin_tiny_patch4_window7_224": 224}.get(name, 64)
    small = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3} if name == "vit" else {}
    name = "vit_tiny_patch16_224" if name == "vit" else name
    return informative(timm.create_model(name, num_classes=5, **small)), torch.randn(1, 3, size, size)


@pytest.mark.parametrize(
    "name",
    [
        *NETS,
        "vit",
        pytest.param("resnext50_32x4d", marks=pytest.mark.slow),
        pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow),
    ],
)
def test_one_plan_does_what_two_did(name):
    model, x = built(name)
    plans, smaller = twice(model, x)
    once = cpd.compact(model, plans[0], cpd.compose_plans(*plans))
    assert {k: v.shape for k, v in once.state_dict().items()} == {k: v.shape for k, v in smaller.state_dict().items()}
    with torch.no_grad():
        assert relative_error(once(x), smaller(x)) < 1e-5
        once.load_state_dict(smaller.state_dict())  # as a file does: nothing that counts lies outside the state dict
        assert relative_error(once(x), smaller(x)) < 1e-6


@pytest.mark.parametrize("name", ["fused_attention", "vit"])
def test_one_file_for_the_fresh_original(name, tmp_path):
    model, x = built(name)
    plans, smaller = twice(model, x)
    with torch.no_grad():
        for p in smaller.parameters():  # as if trained further
            p.mul_(1.01)
    cpd.save(tmp_path / "smaller", smaller, plans[0], cpd.compose_plans(*plans))
    fresh, _ = built(name)
    again = cpd.load(tmp_path / "smaller", fresh)
    with torch.no_grad():
        assert relative_error(again(x), smaller(x)) < 1e-6


def test_scale_of_another_compaction_is_noticed(tmp_path):
    """A factor that is no tensor: a file that disagrees with what its plan gives must not load."""
    model, x = built("vit")
    plans, smaller = twice(model, x)
    path = tmp_path / "smaller"
    cpd.save(path, smaller, plans[0], cpd.compose_plans(*plans))
    tensors, head = read_tensors(path, FORMAT, VERSION)
    name = next(iter(head["scales"]))
    head["scales"][name] *= 1.5
    path.write_bytes(pack_tensors(tensors, head, FORMAT, VERSION))
    with pytest.raises(FileFormatError, match=r"attn\.q_norm: its attention scale is .*, the plan gives"):
        cpd.load(path, built("vit")[0])


def test_graph_of_another_network_is_refused():
    model, x = built("residual")
    first = cpd.comb(model, x)
    plan = cpd.random_plan(first, 0.5, generator(0))
    with pytest.raises(PlanError, match="the first plan leaves shape .*, the second graph has .*; comb the network"):
        cpd.compose_plans(first, plan, first, plan)


def test_plans_must_fit_their_graphs():
    model, x = built("residual")
    (first, plan, second, then), _ = twice(model, x)
    with pytest.raises(PlanError, match="plan of another model"):
        cpd.compose_plans(first, then, second, plan)


def test_what_the_original_had_frozen_is_refused():
    """Combed with ``ignore``, the original's plan may not touch what the second compaction cut."""
    model, x = built("concat")
    first = cpd.comb(model, x, ignore=["a"])
    plan = cpd.random_plan(first, 0.5, generator(0))
    second = cpd.comb(cpd.compact(model, first, plan), x)
    then = cpd.random_plan(second, 0.5, generator(0))
    with pytest.raises(PlanError, match="a: 2 channels removed but frozen: ignored on request"):
        cpd.compose_plans(first, plan, second, then)
