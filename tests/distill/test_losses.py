"""The loss modules: the values of the originals, finite where those are not, and their messages."""

from __future__ import annotations

import copy
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cpd_fast import losses
from cpd_fast.errors import ShapeError
from cpd_fast.losses import ChannelWiseDivergence, ChannelWiseKL, CriterionCWD, LogitKL


def logits(*shape: int, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, dtype=dtype) * scale, torch.randn(shape, dtype=dtype) * scale


def mmrazor_value(student: Tensor, teacher: Tensor, tau: float, weight: float) -> Tensor:
    """tau^2 / (N C) sum p_t (log p_t - log p_s), written from the formula."""
    n, c = student.shape[:2]
    log_s, log_t = (F.log_softmax(x.reshape(n * c, -1) / tau, dim=1) for x in (student, teacher))
    return weight * tau**2 / (n * c) * (log_t.exp() * (log_t - log_s)).sum()


def torchdistiller_value(student: Tensor, teacher: Tensor, norm: str, divergence: str, temperature: float) -> Tensor:
    n, c, h, w = student.shape
    t = temperature if divergence == "kl" else 1.0
    normalize = {
        "channel": lambda x: (x / t).reshape(n, c, -1).softmax(-1),
        "spatial": lambda x: (x / t).softmax(1),
        "channel_mean": lambda x: (x / t).mean((2, 3)),
        "none": lambda x: x[0],
    }[norm]
    s, p = normalize(student), normalize(teacher)
    terms = F.kl_div(s.log(), p, reduction="none") if divergence == "kl" else (s - p) ** 2
    return terms.sum() / (n * c if norm.startswith("channel") else n * h * w) * t**2


@pytest.mark.parametrize("loss", [ChannelWiseKL, ChannelWiseDivergence])
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_cwd_equals_the_formula_in_value_and_gradient(loss, tau):
    student, teacher = logits(2, 3, 5, 7)
    student.requires_grad_()
    expected = mmrazor_value(student, teacher, tau, 5.0)
    (gradient,) = torch.autograd.grad(expected, student)
    value = loss(tau=tau, loss_weight=5.0)(student, teacher)
    value.backward()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(student.grad, gradient, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("divergence", ["kl", "mse"])
@pytest.mark.parametrize("norm", ["channel", "spatial", "channel_mean", "none"])
def test_criterion_cwd_has_the_values_of_torchdistiller(norm, divergence):
    student, teacher = (x.abs() + 0.1 for x in logits(2, 3, 4, 5))  # "none" and "channel_mean" take logarithms
    student.requires_grad_()
    expected = torchdistiller_value(student, teacher, norm, divergence, 3.0)
    (gradient,) = torch.autograd.grad(expected, student)
    value = CriterionCWD(norm, divergence, 3.0)(student, teacher)
    value.backward()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(student.grad, gradient, rtol=1e-9, atol=1e-14)


def test_finite_where_softmax_then_log_is_not():
    student, teacher = logits(1, 2, 16, 16, scale=50.0, dtype=torch.float32)
    assert not torchdistiller_value(student, teacher, "channel", "kl", 1.0).isfinite()
    value = CriterionCWD("channel", "kl", 1.0)(student, teacher)
    assert value.item() == pytest.approx(mmrazor_value(student.double(), teacher.double(), 1.0, 1.0).item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(8, 10), (2, 5, 3, 4)])
def test_logit_kl_is_hintons_mean(shape):
    student, teacher = logits(*shape)
    s, t = (F.log_softmax(x / 4.0, 1) for x in (student, teacher))
    expected = 0.9 * 16 * F.kl_div(s, t, reduction="none", log_target=True).sum(1).mean()
    torch.testing.assert_close(LogitKL(4.0, 0.9)(student, teacher), expected, rtol=1e-10, atol=0)


def test_channels_last_gives_the_same():
    student, teacher = (x.float() for x in logits(2, 3, 8, 8))
    expected = ChannelWiseKL()(student, teacher)
    last = [x.contiguous(memory_format=torch.channels_last) for x in (student, teacher)]
    torch.testing.assert_close(ChannelWiseKL()(*last), expected)


def test_teacher_is_detached_and_an_empty_batch_is_zero():
    student, teacher = (x.requires_grad_() for x in logits(2, 3, 4, 4))
    for loss in (ChannelWiseKL(), LogitKL(), CriterionCWD("channel", "kl"), CriterionCWD("spatial", "mse")):
        loss(student, teacher).backward()
    assert teacher.grad is None
    assert ChannelWiseKL()(torch.zeros(0, 3, 4, 4), torch.zeros(0, 3, 4, 4)).item() == 0.0


def test_modules_copy_and_print():
    assert repr(copy.deepcopy(ChannelWiseDivergence(4.0, 3.0))) == "ChannelWiseDivergence(tau=4.0, loss_weight=3.0)"
    assert repr(LogitKL()) == "LogitKL(temperature=4.0, loss_weight=1.0)"
    assert "norm_type='channel'" in repr(CriterionCWD("channel", "kl"))


def test_messages():
    flat = torch.zeros(4, 10)
    for loss in (ChannelWiseKL(), ChannelWiseDivergence()):
        with pytest.raises(ShapeError, match=r"\(4, 10\): there is no space to compare; use class_kl \(LogitKL\)"):
            loss(flat, flat)
    with pytest.raises(ShapeError, match=r"CriterionCWD: expected activations .*use LogitKL"):
        CriterionCWD("channel", "kl")(flat, flat)
    with pytest.raises(ShapeError, match="must have the same shape"):
        ChannelWiseKL()(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, 4))
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="ChannelWiseKL: tau must be a positive"):
            ChannelWiseKL(tau=bad)
        with pytest.raises(ValueError, match="LogitKL: temperature must be a positive"):
            LogitKL(temperature=bad)
        with pytest.raises(ValueError, match="CriterionCWD: temperature must be a positive"):
            CriterionCWD(temperature=bad)
    with pytest.raises(ValueError, match="norm_type must be one of none, channel, spatial, channel_mean, got 'batch'"):
        CriterionCWD("batch")
    with pytest.raises(ValueError, match="divergence must be one of mse, kl, got 'js'"):
        CriterionCWD("channel", "js")


def test_register_all_replaces_the_originals(monkeypatch):
    for package in ("mmengine", "mmseg", "mmrazor"):
        for name in (package, f"{package}.registry"):  # as if none were installed
            monkeypatch.setitem(sys.modules, name, None)
    assert losses.register_all() == []
    registered = {}

    class Registry:
        def register_module(self, module: type, force: bool) -> None:
            assert force
            registered[module.__name__] = module

    package, registry = types.ModuleType("mmengine"), types.ModuleType("mmengine.registry")
    registry.MODELS = Registry()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mmengine", package)
    monkeypatch.setitem(sys.modules, "mmengine.registry", registry)
    assert losses.register_all() == ["mmengine"]
    assert registered["ChannelWiseDivergence"] is ChannelWiseDivergence
    assert registered["CriterionCWD"] is CriterionCWD


def test_a_config_builds_ours_with_the_real_mmengine():
    registry = pytest.importorskip("mmengine.registry", reason="needs mmengine (tried with 0.10.7)")
    before = dict(registry.MODELS.module_dict)
    try:
        assert "mmengine" in losses.register_all()
        loss = registry.MODELS.build({"type": "ChannelWiseDivergence", "tau": 1, "loss_weight": 5})
        assert type(loss) is ChannelWiseDivergence and loss.loss_weight == 5
        student, teacher = logits(2, 3, 5, 7)
        torch.testing.assert_close(loss(student, teacher), mmrazor_value(student, teacher, 1.0, 5.0))
        cwd = registry.MODELS.build({"type": "CriterionCWD", "norm_type": "channel", "divergence": "kl"})
        assert type(cwd) is CriterionCWD
        losses.register_all()  # twice is no error
    finally:
        registry.MODELS.module_dict.clear()
        registry.MODELS.module_dict.update(before)


def test_one_line_of_a_config_file_registers_ours(tmp_path):
    config = pytest.importorskip("mmengine.config", reason="needs mmengine (tried with 0.10.7)")
    from mmengine.registry import MODELS

    before = dict(MODELS.module_dict)
    sys.modules.pop("cpd_fast.mmlab", None)
    file = tmp_path / "config.py"
    file.write_text(
        'custom_imports = dict(imports=["cpd_fast.mmlab"], allow_failed_imports=False)\n'
        'loss = dict(type="ChannelWiseDivergence", tau=1, loss_weight=5)\n'
    )
    try:
        MODELS.module_dict.clear()
        assert type(MODELS.build(config.Config.fromfile(file).loss)) is ChannelWiseDivergence
    finally:
        MODELS.module_dict.clear()
        MODELS.module_dict.update(before)
