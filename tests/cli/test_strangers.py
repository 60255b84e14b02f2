"""A stranger's network on a stranger's pictures, with one command: real files, made here, from training to export."""

import json
import sys

import numpy as np
import pytest
import torch
import yaml

from cpd_fast import cli
from cpd_fast.cli.models import ModelError, load_weights, model_source
from cpd_fast.cli.shared import show_table
from cpd_fast.recipes import outcome

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

MODULE = """
import torch
from torch import nn

from cpd_fast.data import DataSplits, Split


class Net(nn.Module):
    def __init__(self, num_classes=2, dense=False):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1)
        self.head, self.dense = nn.Conv2d(16, num_classes, 1), dense

    def forward(self, x):
        x = self.head(self.b(self.norm(self.a(x)).relu()).relu())
        return x if self.dense else x.mean((2, 3))


def classifier(num_classes=2):
    return Net(num_classes)


def dense(num_classes=2):
    return Net(num_classes, dense=True)


def broken(num_classes=2):
    return "no network"


def data():
    images = torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8)
    split = Split(images, (images[:, 0].float().mean((1, 2)) > 127).byte())
    return DataSplits("noise", ("dark", "bright"), (), 127.0, 128.0, split, split, split)
"""
QUICK = {
    "teacher_steps": 4,
    "prune_steps": 4,
    "prune_events": 2,
    "finetune_steps": 2,
    "score_batches": 1,
    "batch_size": 4,
}
QUICK |= {"latency_runs": 3, "round_to": 2, "checkpoint_every": 2}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a module ``mine`` and folders ``photos`` (classes) and ``streets`` (masks)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for n in range(8):
            for name, channel in (("red", 0), ("blue", 2)):
                pixels = rng.integers(0, 100, (14, 14, 3), np.uint8)
                pixels[..., channel] += 100
                save(tmp_path / f"photos/{split}/{name}/{n}.png", pixels)
            pixels = rng.integers(0, 256, (14, 14, 3), np.uint8)
            save(tmp_path / f"streets/images/{split}/{n}.png", pixels)
            save(tmp_path / f"streets/masks/{split}/{n}.png", pixels[..., 0] // 128)
    return tmp_path


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def call(monkeypatch, capsys):
    """``call("compress", ...)`` -> exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["cpd-fast", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            cli.main()
        out, err = capsys.readouterr()
        return e.value.code or 0, out, err

    return run


def flags(**settings):
    return [part for k, v in settings.items() for part in (f"--{k.replace('_', '-')}", v)]


@pytest.fixture
def no_onnx(monkeypatch):
    from cpd_fast.errors import BackendError

    def refuse(*_, **__):
        raise BackendError("left out in this test")

    monkeypatch.setattr(outcome, "export_onnx", refuse)


def test_classifier_on_a_folder_of_pictures(here, call, no_onnx):
    """Compress by flags, stop halfway, resume, export, report: each by one command."""
    asked = flags(model="mine:classifier", data="photos", size=8, target_macs=0.5, run_dir="run", **QUICK)
    code, out, err = call("compress", *asked, "--json")
    assert code == 0, err
    assert err.startswith("Run folder: run\n") and err.endswith(f"Report: {here / 'run/report.html'}\n")
    assert "photos (image-folder): 16 train, 8 val, 8 test pictures of 3x8x8; 2 classes: blue, red\n" in err
    numbers = json.loads(out)
    assert numbers["model"] == "mine:classifier" and numbers["classes"] == ["blue", "red"]
    assert numbers["student"]["macs"] <= 0.5 * numbers["teacher"]["macs"] and numbers["memory_mib"] > 10
    assert [q[0] for q in numbers["quality"]] == ["teacher"] * 2 + ["prune"] * 2 + ["finetune"]
    assert "every other picture of val became test" in " ".join(numbers["notes"])
    code, again, err = call("resume", "run", "--json")
    assert code == 0 and json.loads(again) == numbers, err
    (here / "photos").rename(here / "moved")  # an export needs no data
    code, out, err = call("export", "run", "--format", "pt2", "--json")
    assert code == 0 and json.loads(out)["difference"] < 1e-4, err
    exported = torch.export.load(json.loads(out)["path"]).module()
    assert sum(p.numel() for p in exported.parameters()) == numbers["student"]["params"]


def test_recipe_and_flags_ask_for_the_same(here, call):
    """What --dry-run prints is a recipe that asks for the same again; flags win over it."""
    code, out, err = call("compress", *flags(model="mine:dense", data="streets", size=8, target_macs=0.6), "--dry-run")
    assert code == 0, err
    recipe = yaml.safe_load(out)
    assert recipe["target_macs"] == 0.6 and recipe["model"] == "mine:dense" and recipe["size"] == 8
    (here / "recipe.yaml").write_text(out)
    assert call("compress", "recipe.yaml", "--dry-run")[1] == out
    changed = yaml.safe_load(call("compress", "recipe.yaml", "--target-macs", 0.7, "--dry-run")[1])
    assert {k for k in recipe if recipe[k] != changed[k]} == {"target_macs"}
    assert set(recipe) | {"weights", "data_dir", "minutes"} == set(flag_names())  # those are written only when given


def test_other_targets_than_macs(here, call):
    """By flag or recipe; MACs are limited beside them only where asked for."""
    asked = flags(model="mine:dense", data="streets", size=8, target_latency_ms=0.6)
    recipe = yaml.safe_load(call("compress", *asked, "--dry-run")[1])
    assert (recipe["target_latency_ms"], recipe["target_macs"]) == (0.6, 1.0)
    assert recipe["run_dir"] == "runs/streets-latency0.6-seed0"
    (here / "recipe.yaml").write_text(
        "model: mine:dense\ndata: streets\nsize: 8\ntarget-params: 0.5\ntarget_macs: 0.7\n"
    )
    recipe = yaml.safe_load(call("compress", "recipe.yaml", "--dry-run")[1])
    assert (recipe["target_params"], recipe["target_macs"], recipe["target_latency_ms"]) == (0.5, 0.7, 1.0)
    assert recipe["run_dir"] == "runs/streets-params0.5-macs0.7-seed0"
    code, out, err = call("compress", *flags(**{**QUICK, "model": "mine:classifier", "data": "photos", "size": 8}),
                          "--target-params", 0.01, "--run-dir", "run")  # fmt: skip
    assert code == 1 and out == "" and "params=0.01 cannot be reached: the range is" in " ".join(err.split())
    assert not (here / "run/teacher.safetensors").exists()  # said before anything is trained


def test_every_flag_is_a_name_of_a_recipe_and_says_its_default(here, call):
    """The names, kinds and defaults that --help shows are those of the recipe: nothing is in one of them alone."""
    import typer

    from cpd_fast.cli import recipe

    settings = recipe.settings_fields()
    options = {p.name: p for p in typer.main.get_command(cli.app).commands["compress"].params}
    shown = {n: options[n] for n in flag_names()}
    assert shown.keys() == recipe.WHAT.keys() | settings.keys()
    for name, option in shown.items():
        assert option.opts == [f"--{name.replace('_', '-')}"] and option.help
        default = settings[name].default if name in settings else recipe.WHAT[name][1]
        assert default in (None, "") or option.help.endswith(f"default {default})"), name
        values = recipe.allowed(settings[name]) if name in settings else "names"
        assert values in ("names", "bytes") or f"({values}" in option.help, name


def flag_names():
    import inspect

    from cpd_fast.cli import compress

    own = {"recipe_file", "demo", "dry_run", "json", "tensorboard", "setting"}
    return [p for p in inspect.signature(compress.command).parameters if p not in own]


def test_segmentation_with_weights_from_a_recipe(here, call, no_onnx):
    import mine

    torch.save({"state_dict": {f"module.{k}": v for k, v in mine.dense(2).state_dict().items()}}, here / "w.pth")
    recipe = {"model": "mine:dense", "weights": "w.pth", "data": "streets", "size": 8, "run-dir": "run", **QUICK}
    (here / "recipe.yaml").write_text(yaml.safe_dump({k: v for k, v in recipe.items() if k != "teacher_steps"}))
    code, out, err = call("compress", "recipe.yaml", "--json")
    assert code == 0, err
    numbers = json.loads(out)
    assert numbers["is_segmentation"] and numbers["settings"]["teacher_steps"] == 0
    assert len(numbers["tiles"]) and numbers["classes"] == ["class 0", "class 1"]


def test_data_from_a_function(here, call, no_onnx):
    code, out, err = call(
        "compress", *flags(model="mine:classifier", data="mine:data", run_dir="run", **QUICK), "--json"
    )
    assert code == 0 and json.loads(out)["task"] == "noise", err


def test_tensorboard_reads_what_a_run_wrote(here, call, no_onnx):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    asked = flags(model="mine:classifier", data="mine:data", run_dir="run", **QUICK)
    _, out, err = call("compress", *asked, "--json", "--tensorboard")
    numbers = json.loads(out)
    assert f"Scalars: {here / 'run/tensorboard'}\n" in err
    events = reader.EventAccumulator(str(here / "run/tensorboard")).Reload()
    for stage in ("teacher", "prune", "finetune"):
        wanted = [(n, v) for n, (s, _, v) in enumerate(numbers["curve"]) if s == stage]
        assert [(e.step, pytest.approx(e.value)) for e in events.Scalars(f"loss/{stage}")] == wanted
    assert [pytest.approx(e.value) for e in events.Scalars("val/accuracy")] == [q[2] for q in numbers["quality"]]


def test_tensorboard_is_missed_before_training(here, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, out, err = call("compress", *flags(model="mine:classifier", data="mine:data", run_dir="run"), "--tensorboard")
    assert code == 1 and out == "" and "tensorboard is not installed; install it with: pip install" in err
    assert not (here / "run").exists()


def test_every_fault_of_a_recipe_is_listed(here, call):
    (here / "bad.yaml").write_text(
        "modle: mine:dense\ntarget_macs: 2\nsize: big\nweights: nowhere.pth\nprune_steps: 0\n"
        "data: nowhere\nmodel: resnet18\nlayout: rows\n"
    )
    code, out, err = call("compress", "bad.yaml")
    err = " ".join(err.split())
    assert code == 1 and out == ""
    for text in (
        "bad.yaml: 8 faults",
        "data 'nowhere' is unknown; choose one of climate, fashion-mnist",
        "model 'resnet18': expected timm/NAME",
        "layout 'rows' is unknown; choose one of auto, image-folder",
        "modle: no such setting, did you mean model?",
        "size='big': expected a whole number",
        "weights='nowhere.pth': no such file",
        "target_macs=2: expected a number from 0.001 to 1",
        "prune_steps=0: expected a whole number from 1",
    ):
        assert text in err, err


def test_a_model_that_is_not_there_is_listed_with_the_others(here, call):
    code, out, err = call("compress", *flags(model="mine:nothing", data="nowhere", size=8))
    err = " ".join(err.split())
    assert code == 1 and out == "" and "flags: 2 faults" in err
    assert "data 'nowhere' is unknown" in err and "module 'mine' has no attribute 'nothing'" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "expected names and values such as 'model: timm/resnet18', got list"),
        ("a: [", "not a YAML file"),
        ("!!python/object/apply:os.system ['true']", "not a YAML file"),
    ],
)
def test_recipes_that_are_none(here, call, text, message):
    (here / "bad.yaml").write_text(text)
    code, _, err = call("compress", "bad.yaml")
    assert code == 1 and message in " ".join(err.split())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"data": "photos"}, "data 'photos' has no network of its own: give model"),
        ({"model": "mine:nothing", "data": "photos"}, "mine:nothing: module 'mine' has no attribute 'nothing'"),
        ({"model": "nowhere:net", "data": "photos"}, "module nowhere cannot be imported"),
        ({"model": "mine:broken", "data": "photos"}, "mine:broken: returned a str, expected a torch.nn.Module"),
        ({"model": "mine:dense", "data": "photos"}, "expected logits of shape (2, 2) for 2 classes, got (2, 2, 8, 8)"),
        ({"model": "mine:classifier", "data": "streets"}, "segmentation needs a network with a map a class"),
        (
            {"model": "hf/photos", "data": "photos"},
            "photos holds no config.json; save_pretrained() makes such a folder",
        ),
        ({"model": "unknown", "data": "photos"}, "model 'unknown': expected timm/NAME, smp/DECODER:ENCODER, hf/FOLDER"),
        ({"data": "climate", "weights": "mine.py"}, "weights: give the model too"),
    ],
    ids=lambda v: "-".join(v.values()).replace("/", "_") if isinstance(v, dict) else "",
)
def test_faults_are_one_sentence(here, call, asked, message):
    code, out, err = call("compress", *flags(**{"size": 8, **asked}))
    assert code == 1 and out == "" and message in " ".join(err.split()) and "Traceback" not in err


def test_weights_must_fit(here):
    import mine
    from safetensors.torch import save_file

    five = mine.classifier(5)
    save_file(five.state_dict(), here / "five.safetensors")
    net = mine.classifier(2)
    assert load_weights(net, here / "five.safetensors", 2) == ["head.weight", "head.bias"]  # for other classes: fresh
    assert net.a.weight.equal(five.a.weight) and net.norm.running_var.equal(five.norm.running_var)
    save_file({"a.weight": torch.zeros(3, 3)}, here / "odd.safetensors")
    with pytest.raises(ModelError, match=r"does not fit the model: a\.weight: expected \(16, 3, 3, 3\), got \(3, 3\)"):
        load_weights(net, here / "odd.safetensors", 2)
    (here / "evil.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ModelError, match="no PyTorch file of tensors alone"):
        load_weights(net, here / "evil.pth", 2)


def test_transformers_folder(tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.SegformerConfig(
        num_labels=3, depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], decoder_hidden_size=16,
        num_attention_heads=[1, 1, 2, 2], architectures=["SegformerForSemanticSegmentation"],
    )  # fmt: skip
    saved = transformers.SegformerForSemanticSegmentation(config).eval()
    saved.save_pretrained(tmp_path / "segformer")
    (tmp_path / "segformer/preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1]}'
    )
    capsys.readouterr()
    source = model_source(f"hf/{tmp_path / 'segformer'}")
    model, x = source.build(3).eval(), torch.randn(1, 3, 32, 32)
    assert capsys.readouterr() == ("", "")
    assert tuple(model(x).shape) == (1, 3, 32, 32) and source.mean == (127.5,) * 3
    assert all(v.equal(saved.state_dict()[k]) for k, v in model.model.state_dict().items())


def test_bench_times_models_in_turns(call):
    code, out, err = call("bench", "fashion-mnist", "--backend", "eager", "--runs", 5, "--json")
    assert code == 0 and json.loads(out)["fashion-mnist"]["runs"] == 5, err
    code, _, err = call("bench", "fashion-mnist", "climate", "--backend", "eager", "--runs", 5)
    assert code == 1 and "networks take different inputs" in err


def test_doctor_as_json_says_why_not(call):
    code, out, _ = call("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["backend reference"] == "runs" and "compiled for" in found and "gpu" in found
    if not torch.cuda.is_available():
        assert found["backend cuda"].startswith("no: ") and found["latency onnxruntime-cuda"].startswith("no: ")


def test_help_reads_like_a_page(call):
    code, out, _ = call("compress", "--help")
    assert code == 0 and all(text in out for text in ("What is compressed", "--target-macs", "--layout", "RECIPE.yaml"))
    assert "Exit codes: 0 done" in " ".join(call("--help")[1].split())
    for command in ("compress", "resume", "report", "export", "comb", "bench", "settings", "doctor"):
        code, out, _ = call(command, "--help")
        assert code == 0 and "Raises" not in out and "Error:" not in out  # what only programmers want


def test_piped_tables_are_not_cut(capsys):
    show_table(("name", "value"), [("n" * 100, "v" * 100)])
    assert f"{'n' * 100}  {'v' * 100}" in capsys.readouterr().out


def test_run_that_is_none(call, tmp_path):
    for command in ("resume", "export", "report"):
        code, out, err = call(command, tmp_path)
        assert code == 1 and out == "" and "holds no r" in err
