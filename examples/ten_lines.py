"""Make a timm model half as expensive in ten lines (then train it on: compaction alone loses accuracy)."""

import timm
import torch

import cpd_fast as cpd

model = timm.create_model("resnet18", pretrained=False).eval()
x = torch.randn(1, 3, 224, 224)
graph = cpd.comb(model, x)  # which channels belong together
scores = cpd.score(model, graph, [x], lambda m, batch: m(batch).logsumexp(1).mean(), cpd.Magnitude())
plan = cpd.plan(graph, scores, cpd.Target(macs=0.5))  # which channels stay
small = cpd.compact(model, graph, plan)  # a smaller nn.Module, proven equal to the masked model
print(cpd.cost(model, x), cpd.cost(small, x), sep="\n")
cpd.save("small.safetensors", small, graph, plan)
again = cpd.load("small.safetensors", timm.create_model("resnet18"))
assert torch.equal(again.eval()(x), small(x))
