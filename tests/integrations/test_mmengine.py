"""CPDHook in a real mmsegmentation training run, built from a config, on pictures of 32 pixels."""

import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch

import cpd_fast as cpd
from cpd_fast.errors import ScoreError


@pytest.fixture(scope="module")
def mm():
    """mmengine and mmseg; the compiled operators of mmcv are not needed, and are refused."""
    pytest.importorskip("mmengine", reason="needs mmengine (tried with 0.10.7)")
    pytest.importorskip("mmcv", reason="needs mmcv-lite (tried with 2.1.0)")

    def refuse(*_args, **_kwargs):
        raise RuntimeError("mmcv-lite has no compiled operators")

    stub = types.ModuleType("mmcv._ext")
    stub.__file__ = __file__
    stub.__spec__ = ModuleSpec("mmcv._ext", None)  # no loader: mmengine then asks it for nothing
    stub.__getattr__ = lambda name: refuse if not name.startswith("__") else getattr(types, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mmcv._ext", stub)
        pytest.importorskip("mmseg.models", reason="needs mmsegmentation (tried with 1.2.2) and ftfy")
        from mmseg.utils import register_all_modules

        register_all_modules()
        yield __import__("mmengine")


def config(folder, steps, norm=None, resume=False, **hook):
    norm = norm or {"type": "BN", "requires_grad": True}
    head = {"num_classes": 3, "norm_cfg": norm, "align_corners": False, "in_channels": 32, "in_index": 3}
    head |= {"type": "FCNHead", "channels": 16, "num_convs": 1, "concat_input": False}
    loss = {"type": "CrossEntropyLoss", "use_sigmoid": False}
    model = {
        "type": "EncoderDecoder",
        "data_preprocessor": {"type": "SegDataPreProcessor", "size": (32, 32), "mean": [0.0] * 3, "std": [1.0] * 3},
        "backbone": {
            "type": "ResNetV1c", "depth": 18, "base_channels": 4, "stem_channels": 8, "norm_cfg": norm,
            "strides": (1, 2, 2, 2), "norm_eval": False,
        },
        "decode_head": {**head, "loss_decode": loss},
        "auxiliary_head": {**head, "in_channels": 16, "in_index": 2, "loss_decode": {**loss, "loss_weight": 0.4}},
        "train_cfg": {},
        "test_cfg": {"mode": "whole"},
    }  # fmt: skip
    return {
        "default_scope": "mmseg",
        "model": model,
        "work_dir": str(folder),
        "train_dataloader": {
            "batch_size": 4, "num_workers": 0, "dataset": {"type": "SquaresForCPD"},
            "sampler": {"type": "InfiniteSampler", "shuffle": False},
            "collate_fn": {"type": "pseudo_collate"},
        },
        "optim_wrapper": {"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 0.01}},
        "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": steps},
        "default_hooks": {"checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 3}},
        "custom_imports": {"imports": ["cpd_fast.integrations.mmengine"]},
        "custom_hooks": [{
            "type": "CPDHook", "input_shape": (1, 3, 32, 32), "target": {"macs": 0.4}, "criterion": {"type": "Random"},
            "schedule": {"type": "Greedy", "interval": 2, "steps": 3}, **hook,
        }],
        "log_level": "ERROR",
        "resume": resume,
        "randomness": {"seed": 0},
    }  # fmt: skip


@pytest.fixture(scope="module")
def squares(mm):
    from mmengine.structures import PixelData
    from mmseg.registry import DATASETS
    from mmseg.structures import SegDataSample

    class SquaresForCPD(torch.utils.data.Dataset):
        metainfo = {"classes": ("a", "b", "c"), "palette": [[0] * 3] * 3}

        def __len__(self):
            return 8

        def __getitem__(self, i):
            g = torch.Generator().manual_seed(i)
            sample = SegDataSample(gt_sem_seg=PixelData(data=torch.randint(3, (1, 32, 32), generator=g)))
            sample.set_metainfo({"img_shape": (32, 32), "ori_shape": (32, 32)})
            return {"inputs": torch.rand(3, 32, 32, generator=g), "data_samples": sample}

    DATASETS.register_module(module=SquaresForCPD, force=True)


def train(folder, steps, **hook):
    from mmengine.config import Config
    from mmengine.runner import Runner

    folder.mkdir(exist_ok=True)
    Config(config(folder, steps, **hook)).dump(folder / "config.py")
    runner = Runner.from_cfg(Config.fromfile(folder / "config.py"))
    runner.train()
    (found,) = [h for h in runner.hooks if type(h).__name__ == "CPDHook"]
    return runner.model, found


def test_a_training_run_from_its_config_prunes_and_compacts(squares, tmp_path):
    model, hook = train(tmp_path / "whole", 6)
    assert hook.pruner.done and hook.pruner.iteration == 6
    before = type(model)
    small = hook.compact()
    assert type(small) is before and type(model) is before
    x = torch.randn(2, 3, 32, 32)
    size = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert size(small.auxiliary_head) < size(model.auxiliary_head) and size(small) < 0.8 * size(model)
    model.eval(), small.eval()
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)  # tensor mode, masked against compacted
        maps = small.extract_feat(x)
        assert small.auxiliary_head(maps).shape == (2, 3, 2, 2)


def watchers(model):
    from cpd_fast.integrations._replay import Replay

    return [h for h in model._forward_pre_hooks.values() if isinstance(getattr(h, "__self__", None), Replay)]


def test_the_papers_criterion_looks_at_the_loss_of_the_last_batch(squares, tmp_path, monkeypatch):
    # MMEngine 0.10.7 writes methods into its checkpoints, which torch.load has refused since 2.6
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    model, hook = train(tmp_path / "whole", 6, criterion={"type": "HessianTrace"})
    assert hook.pruner.done and hook.pruner.scores.criterion.startswith("HessianTrace")
    assert hook._replay._call is None and not watchers(model)  # the last batch is let go
    half, unfinished = train(tmp_path / "halves", 3, criterion={"type": "HessianTrace"})
    assert not watchers(unfinished.compact()) and watchers(half)
    resumed, again = train(tmp_path / "halves", 6, resume=True, criterion={"type": "HessianTrace"})
    assert again.pruner.plan == hook.pruner.plan
    small = hook.compact()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_the_loss_looked_at_is_the_one_trained_on(squares, tmp_path, monkeypatch):
    """Main and auxiliary head, with their weights; batch norm as in eval mode."""
    from mmengine.model import BaseModel

    from cpd_fast.integrations import _replay

    trained, looked = [], []
    parse, call = BaseModel.parse_losses, _replay.Replay.loss

    def parsed(self, losses):
        trained.append(parse(self, losses))
        return trained[-1]

    def replayed(self):
        looked.append((call(self), set(trained.pop()[1])))
        return looked[-1][0]

    monkeypatch.setattr(BaseModel, "parse_losses", parsed)
    monkeypatch.setattr(_replay.Replay, "loss", replayed)
    norm = {"type": "BN", "requires_grad": True, "eps": 1e12}  # nothing but biases comes through in either mode
    train(
        tmp_path,
        4,
        norm=norm,
        criterion={"type": "HessianTrace"},
        schedule={"type": "Greedy", "interval": 4, "steps": 1},
    )
    loss, names = looked[0]
    assert {"decode.loss_ce", "aux.loss_ce"} <= names
    assert loss.item() == pytest.approx(trained[-1][0].item(), rel=1e-4)


def test_a_call_that_gives_no_losses_is_named(mm):
    from cpd_fast.integrations._replay import Replay
    from cpd_fast.integrations.mmengine import _loss_of

    model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    pruner = cpd.Pruner(model, torch.zeros(1, 2), cpd.Target(macs=0.9), cpd.HessianTrace())
    replay = Replay(pruner, lambda out: _loss_of(model, out), "CPDHook")
    with pytest.raises(ScoreError, match="CPDHook.*not called in train mode"):
        replay.loss()
    with torch.no_grad():
        model(torch.zeros(1, 2))
    with pytest.raises(ScoreError, match="not called in train mode"):
        replay.loss()
    model(torch.zeros(1, 2))
    with pytest.raises(ScoreError, match="no dict of losses but Tensor; use criterion"):
        replay.loss()


def test_nothing_to_compact_before_training(mm):
    from cpd_fast.integrations.mmengine import CPDHook

    with pytest.raises(RuntimeError, match="nothing to compact before training"):
        CPDHook(input_shape=(1, 3, 32, 32), target={"macs": 0.5}, criterion={"type": "Magnitude"}).compact()
