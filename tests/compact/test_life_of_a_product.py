"""What a compacted network must still be able to do, in six families: train, copy, save, compile, export."""

import copy

import numpy as np
import pytest
import torch

import cpd_fast as cpd
from tests.nets import informative, relative_error

timm = pytest.importorskip("timm", reason="needs timm")


def cnn():
    return timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), 10, channels=(16, 24, 32, 40))


def mobilenet():
    return timm.create_model("test_efficientnet", num_classes=10)


def vit():
    return timm.create_model("test_vit", num_classes=10, img_size=64)


def window():
    kind = timm.models.swin_transformer.SwinTransformer
    return kind(32, 2, num_classes=10, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4))


def convnext():
    return timm.create_model("test_convnext", num_classes=10)


def segmentation():
    smp = pytest.importorskip("segmentation_models_pytorch", reason="needs segmentation_models_pytorch")
    return smp.Unet("resnet18", encoder_weights=None, decoder_channels=(48, 32, 24, 16, 16), classes=5)


FAMILIES = {f.__name__: (f, 32 if f is window else 64) for f in (cnn, mobilenet, vit, window, convnext, segmentation)}


@pytest.fixture(scope="module", params=FAMILIES)
def product(request):
    """A compacted network in eval mode, the dense one it came from, its graph and plan, and an input."""
    build, size = FAMILIES[request.param]
    torch.manual_seed(0)
    dense, x = informative(build()), torch.randn(2, 3, size, size)
    graph = cpd.comb(dense, x)
    plan = cpd.random_plan(graph, keep=0.5, generator=torch.Generator().manual_seed(0))
    small = cpd.compact(dense, graph, plan)
    with torch.no_grad(), cpd.masked(dense, graph, plan, execution="full_width") as as_if_removed:
        assert relative_error(as_if_removed(x), small(x)) < 1e-3
    return small, dense, graph, plan, x


def run(model, x):
    with torch.no_grad():
        return model(x)


def test_it_trains(product):
    small, *_, x = product
    net = copy.deepcopy(small).train()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    losses = []
    for _ in range(4):
        torch.manual_seed(0)
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    still = [n for n, p in net.named_parameters() if torch.equal(p, before[n])]
    assert not still, f"never trained: {still}"


def test_a_copy_is_its_own(product):
    small, *_, x = product
    y, other = run(small, x), copy.deepcopy(small)
    assert type(other) is type(small) and torch.equal(run(other, x), y)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(run(small, x), y) and not torch.equal(run(other, x), y)


def test_state_dict_round_trip(product, tmp_path):
    small, dense, graph, plan, x = product
    torch.save(small.state_dict(), tmp_path / "small.pt")
    with torch.no_grad():
        fresh = copy.deepcopy(dense)
        for p in fresh.parameters():
            p.add_(1.0)
        again = cpd.compact(fresh, graph, plan)
    assert not torch.equal(run(again, x), run(small, x))
    again.load_state_dict(torch.load(tmp_path / "small.pt", weights_only=True), strict=True)
    assert torch.equal(run(again, x), run(small, x))


def test_it_compiles(product):
    small, *_, x = product
    torch._dynamo.reset()
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert relative_error(run(small, x), y) < 1e-5
    y.square().mean().backward()
    grads = [p.grad for p in small.parameters()]
    small.zero_grad(set_to_none=True)
    assert all(g is not None for g in grads)


@pytest.mark.slow
def test_it_compiles_with_inductor(product):
    small, *_, x = product
    torch._dynamo.reset()
    assert relative_error(run(small, x), run(torch.compile(small), x)) < 1e-4


def test_it_exports(product, tmp_path):
    small, *_, x = product
    assert cpd.export_pt2(small, x, tmp_path / "small.pt2") < 1e-5
    assert relative_error(run(small, x), run(torch.export.load(tmp_path / "small.pt2").module(), x)) < 1e-5


def test_onnx_runtime_agrees(product, tmp_path):
    ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    small, *_, x = product
    cpd.export_onnx(small, x, tmp_path / "small.onnx")
    session = ort.InferenceSession(str(tmp_path / "small.onnx"))
    x = torch.cat([x, x.flip(0)])[:3]  # another batch size
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(got, run(small, x).numpy(), rtol=1e-3, atol=1e-4)
