"""Every network of the zoo: combed, pruned to half of each group, masked equals compacted, trains."""

import pytest
import torch

from cpd_fast.compact import compact
from cpd_fast.pipeline import comb
from cpd_fast.prune import masked
from cpd_fast.schedule import plan_cost, random_plan
from tests.nets import relative_error, tensors_of
from tests.zoo.networks import ENTRIES, build, example_input

# one a family, in every run; the others with `make zoo`
ALWAYS = {
    "beit_base_patch16_224",
    "repvgg_a0",
    "coat_lite_tiny",
    "convnextv2_atto",
    "cspnext_tiny",
    "dpn48b",
    "tinynet_e",
    "test_efficientnet_gn",
    "ghostnet_050",
    "hgnetv2_b0",
    "inception_next_atto",
    "mixer_s16_224",
    "mobilenetv3_small_050",
    "nf_resnet26",
    "poolformer_s12",
    "regnety_002",
    "repvit_m1",
    "resnest14d",
    "skresnet18",
    "selecsls42",
    "swin_tiny_patch4_window7_224",
    "eva02_tiny_patch14_224",
    "Qwen3",
    "_base_/models/segformer_mit-b0",
    "pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes",
    "shufflenet_v2_x1_0",
}
# what comb refuses, and why (docs/coverage.md)
REFUSED: dict[str, str] = {}
# cannot run in this environment at all
BROKEN = {
    "PAN:resnet18": "the decoder pools below 1x1 at this input size",
}


def entry_param(entry):
    marks = [] if entry["name"] in ALWAYS else [pytest.mark.slow]
    return pytest.param(entry, id=f"{entry['src']}-{entry['name']}", marks=marks)


@pytest.mark.parametrize("entry", [entry_param(e) for e in ENTRIES])
def test_masked_equals_compacted(entry):
    needs = {"smp": "segmentation_models_pytorch", "hf": "transformers", "mmseg": "mmengine"}
    if entry["src"] in needs:
        pytest.importorskip(needs[entry["src"]])
    if entry["name"] in BROKEN:
        pytest.skip(BROKEN[entry["name"]])
    model, output = build(entry)
    model, x = model.double(), example_input(entry).double()
    graph = comb(model, x)
    plan = random_plan(graph, keep=0.5, generator=torch.Generator().manual_seed(0))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small = compact(model, graph, plan)
    with torch.no_grad(), masked(model, graph, plan) as m:
        assert relative_error(output(m(x)), output(small(x))) < 1e-6
    dense = sum(p.numel() for p in model.parameters())
    left = sum(p.numel() for p in small.parameters())
    assert plan_cost(graph, plan).params == left < 0.9 * dense
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    loss = sum(t.square().mean() for t in tensors_of(output(small.train()(x))))
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in small.parameters())
