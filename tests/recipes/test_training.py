"""One training step of a recipe: within a memory limit, in half precision, on one device."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cpd_fast.errors import MemoryLimitError, TrainingError
from cpd_fast.memory import parse_bytes
from cpd_fast.recipes.training import Machine, Trainer, adamw, listen


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 4))


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def imitate(model, teacher, batch):
    with torch.no_grad(), listen(teacher, "2") as wanted:
        teacher(batch[0])
    with listen(model, "2") as heard:
        model(batch[0])
    return F.mse_loss(heard[-1], wanted[-1].to(heard[-1].dtype))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(512, 64, generator=generator), torch.randint(4, (512,), generator=generator)


def trained(machine, batch, steps=3, dtype=torch.float64):
    model = net().to(dtype)
    batch = batch[0].to(dtype), batch[1]
    trainer = Trainer(model, adamw(model, 1e-2), loss, machine, batch)
    losses = [trainer.step(batch, 1e-3, step) for step in range(steps)]
    return model, losses, trainer


def test_micro_batches_take_the_steps_of_the_whole_batch(batch):
    whole, losses, plain = trained(Machine(), batch)
    model, parts, trainer = trained(Machine(memory_limit="7MB"), batch)
    assert plain.choice is None and trainer.choice.micro_batch < 512
    assert parts == pytest.approx(losses, rel=1e-9)
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert trainer.choice.predicted_peak <= parse_bytes("7MB")


def test_no_step_fits(batch):
    with pytest.raises(MemoryLimitError, match="one sample needs .* more than"):
        trained(Machine(memory_limit="10kB"), batch)


def test_fp16_scales_losses_and_skips_what_overflows(batch):
    model, losses, trainer = trained(Machine(half=True), batch, steps=8, dtype=torch.float32)
    _, full, _ = trained(Machine(), batch, steps=8, dtype=torch.float32)
    assert losses != full and losses == pytest.approx(full, rel=0.05) and losses[-1] < losses[0]
    before, scale = copy.deepcopy(model.state_dict()), trainer.scaler.get_scale()
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 1e38})
    trainer.step(batch, 1e-3, 0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert scale >= 2**10 and trainer.scaler.get_scale() < 6e37


def test_fp16_gradients_are_unscaled_before_anyone_looks(batch):
    norms = []
    for machine in (Machine(), Machine(half=True)):
        model = net()
        trainer = Trainer(model, adamw(model, 0.0), loss, machine, batch)
        trainer.step(batch, 0.0, 0, lambda model=model: norms.append(float(model[0].weight.grad.norm())))
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_state_goes_on_bit_for_bit(batch):
    machine = Machine(half=True)
    whole, _, _ = trained(machine, batch, steps=6, dtype=torch.float32)
    _, _, first = trained(machine, batch, steps=3, dtype=torch.float32)
    state = {k: v.clone() for k, v in first.state().items()}
    model = net()
    second = Trainer(model, adamw(model, 1e-2), loss, machine, batch)
    second.restore(state)
    assert second.scaler.state_dict() == first.scaler.state_dict()
    for step in range(3, 6):
        second.step(batch, 1e-3, step)
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("limit", ["", "100MB"])
def test_a_loss_that_is_not_finite_changes_nothing(batch, limit):
    model = net()
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(model, adamw(model, 1e-2), loss, Machine(memory_limit=limit), batch)
    with pytest.raises(TrainingError, match="the loss is nan at learning rate 0.1"):
        trainer.step((batch[0] * torch.nan, batch[1]), 0.1, 0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_teacher_in_half_precision_is_listened_to_inside(batch):
    """With the teacher as most of the memory it is the first that gives way."""
    teacher = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 2048), nn.Linear(2048, 256), nn.Identity()).eval()
    model = nn.Sequential(nn.Linear(64, 8), nn.Identity(), nn.Linear(8, 256), nn.Linear(256, 4))
    few = batch[0][:8], batch[1][:8]
    undivided = Trainer(model, adamw(model, 0.0), imitate, Machine(memory_limit="1GB"), few, teacher)
    limit = str(int(undivided.choice.predicted_peak * 0.8))
    trainer = Trainer(model, adamw(model, 0.0), imitate, Machine(memory_limit=limit), few, teacher)
    assert trainer.choice.half_teacher and not undivided.choice.half_teacher
    value = trainer.step(few, 0.0, 0)
    assert value == pytest.approx(undivided.step(few, 0.0, 0), rel=1e-2)


def test_no_gpu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match="device=cuda: torch .*; use device=cpu"):
        Machine.of("cuda", "fp32", "")
    assert Machine.of("auto", "fp32", "") == Machine()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Machine.of("auto", "fp16", "").device.type == "cuda"
