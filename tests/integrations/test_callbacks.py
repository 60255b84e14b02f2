"""The callbacks in the real Lightning and the real Hugging Face Trainer, on tiny data; a timm-style script."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cpd_fast as cpd
from cpd_fast.errors import ScoreError

ROOT = Path(__file__).resolve().parents[2]
X = torch.zeros(1, 3, 8, 8)
DATA = [(torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)), i % 4) for i in range(24)]


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def same_as_masked(masked, small):
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(x), masked.eval()(x), rtol=1e-5, atol=1e-6)  # hooks mask its calls
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in masked.parameters())


@pytest.fixture(scope="module")
def pl():
    try:
        return pytest.importorskip("lightning.pytorch", reason="needs Lightning (tried with 2.6)")
    except RuntimeError as e:  # a torchvision built for another torch
        pytest.skip(str(e))


def test_lightning(pl, tmp_path):
    from cpd_fast.integrations.lightning import CPDCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, _):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def fit(epochs, checkpoint=None):
        torch.manual_seed(1)
        schedule = cpd.Greedy(interval=2, steps=4)
        callback = CPDCallback(X, cpd.Target(macs=0.5), network="net", schedule=schedule)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        saver = pl.callbacks.ModelCheckpoint(tmp_path / f"{epochs}", filename="at", save_on_train_epoch_end=True)
        module = Module()
        trainer = pl.Trainer(max_epochs=epochs, callbacks=[callback, saver], default_root_dir=tmp_path, **quiet)
        trainer.fit(module, torch.utils.data.DataLoader(DATA, 6), ckpt_path=checkpoint)
        return module, callback

    module, callback = fit(2)  # 8 steps
    assert callback.pruner.done and callback.pruner.iteration == 8
    same_as_masked(module.net, callback.compact())
    fit(1)
    resumed, again = fit(2, tmp_path / "1" / "at.ckpt")
    assert again.pruner.plan == callback.pruner.plan
    assert all(torch.equal(v, resumed.net.state_dict()[k]) for k, v in module.net.state_dict().items())
    with pytest.raises(RuntimeError, match="nothing to compact before Trainer.fit"):
        CPDCallback(X, cpd.Target(macs=0.5)).compact()


@pytest.mark.parametrize("returns", ["loss", "dict"])
def test_lightning_gives_criteria_the_loss_of_the_last_batch(pl, tmp_path, monkeypatch, returns):
    from cpd_fast.integrations import lightning as integration

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, _):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            modes.append(self.net.training)
            self.log("loss", loss.detach())
            return loss if returns == "loss" else {"loss": loss}

        def log(self, name, value):
            logged.append(value)
            super().log(name, value)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    class Broken(Module):
        def training_step(self, batch, index):
            return super().training_step(batch, index) if self.net.training else None

    def fit(module, criterion):
        callback = CPDCallback(
            X, cpd.Target(macs=0.5), "net", criterion=criterion, schedule=cpd.Greedy(interval=2, steps=3)
        )
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = pl.Trainer(max_steps=6, callbacks=[callback], enable_checkpointing=False, **quiet)
        trainer.fit(module, torch.utils.data.DataLoader(DATA, 6))
        return callback

    modes, logged, looked, again = [], [], [], integration._loss_again

    def watched(module, batch, index):
        looked.append((batch[1].tolist(), index))
        return again(module, batch, index)

    monkeypatch.setattr(integration, "_loss_again", watched)
    CPDCallback = integration.CPDCallback
    module = Module()
    callback = fit(module, cpd.HessianTrace())
    assert callback.pruner.done and callback.pruner.scores.criterion.startswith("HessianTrace")
    labels = [y for _, y in DATA]
    assert all(index in (1, 3) and batch == labels[6 * index : 6 * index + 6] for batch, index in looked)
    assert len(logged) == modes.count(True) == 6 and False in modes
    same_as_masked(module.net, callback.compact())
    with pytest.raises(ScoreError, match="training_step returned NoneType; use Taylor"):
        fit(Broken(), cpd.GroupFisher())


def test_lightning_with_curvature_by_manual_optimization(pl, tmp_path):
    """A look at the very batch and mode of the training step, for one more forward and backward."""

    class Module(pl.LightningModule):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.net = net()
            schedule = cpd.Greedy(interval=2, steps=4)
            self.pruner = cpd.Pruner(self.net, X, cpd.Target(macs=0.5), cpd.HessianTrace(), schedule, probe_every=1)

        def training_step(self, batch, _):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.pruner.backward(lambda: F.cross_entropy(self.net(batch[0]), batch[1]))
            self.pruner.step()
            optimizer.step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    module = Module()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=2, default_root_dir=tmp_path, enable_checkpointing=False, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(DATA, 6))
    assert module.pruner.done and module.pruner.scores.info["engine"] == "finite_difference"
    same_as_masked(module.net, module.pruner.compact())


class Wrapped(nn.Module):
    """What Trainer expects: keyword arguments in, loss and logits out."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, pixel_values, labels=None):
        logits = self.net(pixel_values)
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_huggingface(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from cpd_fast.integrations.huggingface import CPDTrainerCallback

    rows = [{"pixel_values": x, "labels": y} for x, y in DATA]

    def train(folder, steps, resume=False, loss=None, **how):
        torch.manual_seed(1)
        model = Wrapped()
        schedule = cpd.Greedy(interval=2, steps=3)
        callback = CPDTrainerCallback({"pixel_values": X}, cpd.Target(macs=0.5), schedule=schedule, **how)
        arguments = transformers.TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=6, save_steps=3, use_cpu=True, report_to=[],
            disable_tqdm=True, lr_scheduler_type="constant", logging_strategy="no", seed=2,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=rows, callbacks=[callback], compute_loss_func=loss
        )
        trainer.train(resume_from_checkpoint=resume or None)
        return model, callback

    model, callback = train(tmp_path / "whole", 6)
    assert callback.pruner.done and callback.pruner.iteration == 6
    same_as_masked(model, callback.compact())
    train(tmp_path / "halves", 3)
    resumed, again = train(tmp_path / "halves", 6, resume=True)
    assert again.pruner.plan == callback.pruner.plan
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in model.state_dict().items())
    (tmp_path / "halves" / "checkpoint-6" / "cpd_pruner.pt").unlink()
    with pytest.raises(ScoreError, match="cpd_pruner.pt is missing: this checkpoint was made without pruning"):
        train(tmp_path / "halves", 7, resume=True)
    model, callback = train(tmp_path / "curved", 6, criterion=cpd.HessianTrace())
    assert callback.pruner.done and callback.pruner.scores.criterion.startswith("HessianTrace")
    assert callback._replay._call is None  # the last batch is let go
    same_as_masked(model, callback.compact())

    def elsewhere(logits, labels, num_items_in_batch=None):
        return F.cross_entropy(logits, labels)

    with pytest.raises(ScoreError, match="the model returned none.*compute_loss_func"):
        train(tmp_path / "elsewhere", 2, loss=elsewhere, criterion=cpd.GroupFisher())


def test_timm_script(tmp_path, monkeypatch, capsys):
    pytest.importorskip("timm")
    weights = tmp_path / "small.safetensors"
    arguments = ["--model", "resnet10t", "--size", "32", "--batch", "4", "--steps", "6", "--synthetic"]
    monkeypatch.setattr(sys, "argv", ["timm_train.py", *arguments, "--prune-macs", "0.5", "--out", str(weights)])
    runpy.run_path(str(ROOT / "examples" / "timm_train.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert weights.exists() and "MACs" in printed
