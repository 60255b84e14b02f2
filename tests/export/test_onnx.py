"""ONNX export is checked against PyTorch before anything is kept."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

import cpd_fast as cpd
from cpd_fast.errors import BackendError, ShapeError
from cpd_fast.export import OPSET, export_onnx
from cpd_fast.export import onnx as export

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


X = torch.zeros(1, 3, 8, 8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    model = net()
    error = export_onnx(model, X, path)
    return model, path, error


def test_batch_is_dynamic_and_outputs_agree(exported):
    model, path, error = exported
    assert error < 1e-5 and model.training  # left in the mode it was in
    assert [o.version for o in onnx.load(path).opset_import if o.domain == ""] == [OPSET]
    session = ort.InferenceSession(str(path))
    x = torch.randn(5, 3, 8, 8)
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(got, model.eval()(x).numpy(), rtol=1e-4, atol=1e-5)
    assert [p.name for p in path.parent.iterdir()] == ["net.onnx"]  # weights inside, no leftovers


def test_wrong_outputs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "difference", lambda *_: 1e-2)
    with pytest.raises(
        BackendError, match=r"differs from PyTorch by 1\.00e-02.*allowed are 0\.0001; nothing was written"
    ):
        export_onnx(net(), X, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_model_that_cannot_be_exported_is_named(tmp_path):
    class Loop(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(BackendError, match="Loop cannot be exported to ONNX: "):
        export_onnx(Loop(), X, tmp_path / "loop.onnx")


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(BackendError, match="onnxscript is not installed; install it with: pip install onnxscript"):
        export_onnx(net(), X, tmp_path / "net.onnx")


def test_wrong_inputs_are_named(tmp_path):
    with pytest.raises(ShapeError, match=r"Sequential: the forward fails on example inputs of shape \(1, 4, 8, 8\)"):
        export_onnx(net(), torch.zeros(1, 4, 8, 8), tmp_path / "net.onnx")


class FixedBatch(nn.Module):
    """A forward that only takes batches of 2."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(x.reshape(2, 8))


def test_batch_may_be_fixed(tmp_path):
    with pytest.raises(BackendError, match="the forward holds its batch size; pass dynamic_batch=False"):
        export_onnx(FixedBatch(), torch.zeros(2, 8), tmp_path / "net.onnx")
    assert export_onnx(FixedBatch(), torch.zeros(2, 8), tmp_path / "net.onnx", dynamic_batch=False) < 1e-5
    assert onnx.load(tmp_path / "net.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2


FAMILIES = {  # one a family; bench/zoo_export.py does all of the zoo
    "resnet": ("resnet18", {}, 64),
    "mobilenet": ("mobilenetv3_small_050", {}, 64),
    "vit": ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}, 64),
    "convnext": ("convnext_atto", {}, 64),
}


@pytest.mark.parametrize(
    "family", ["resnet", "vit", *(pytest.param(f, marks=pytest.mark.slow) for f in ("mobilenet", "convnext"))]
)
def test_compacted_networks_export(family, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    name, options, size = FAMILIES[family]
    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=5, **options).eval(), torch.randn(2, 3, size, size)
    graph = cpd.comb(model, x)
    small = cpd.compact(model, graph, cpd.random_plan(graph, keep=0.5))
    assert export_onnx(small, x, tmp_path / "small.onnx") < 1e-4
    weights = onnx.load(tmp_path / "small.onnx").graph.initializer
    stored = sum(int(np.prod(w.dims)) for w in weights if w.data_type == onnx.TensorProto.FLOAT)
    assert stored < 1.1 * sum(p.numel() for p in small.parameters())  # the small weights, not the original's
