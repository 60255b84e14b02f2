"""recipes.cpd by a preset, within a memory limit, in half precision: what comes out, and that nothing can stop it."""

import signal

import pytest
import torch

from cpd_fast import recipes, store
from cpd_fast.config import CompressConfig, ConfigError
from cpd_fast.errors import PlanError
from cpd_fast.recipes import in_loop
from cpd_fast.recipes.training import Trainer
from cpd_fast.types import PrunePlan

STEPS = {"prune_steps": 12, "prune_events": 3, "checkpoint_every": 5}
HOW = {
    "best": {"preset": "best", **STEPS},
    "published": {"preset": "published", **STEPS},
    "released": {"preset": "released", **STEPS, "prune_steps": 40},
    "limited": {"memory_limit": "650KiB", "batch_size": 32},
    "half": {"precision": "fp16", "preset": "best", **STEPS},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=list(HOW))
def finished(request, tiny, tmp_path_factory):
    return request.param, tiny.run(tmp_path_factory.mktemp("run") / request.param, **HOW[request.param])


def test_the_target_holds_and_removals_are_told(finished):
    how, whole = finished
    r = whole.results
    assert r.student.macs <= 0.5 * r.teacher.macs
    shares = [share for _, share in r.steps]
    assert shares == sorted(shares, reverse=True) and shares[-1] <= 0.5
    if how in ("best", "published"):
        assert [step for step, _ in r.steps] == [3, 7, 11]
    assert len(r.histograms) > 1 and (whole.run_dir / "scores.safetensors").is_file()


@pytest.mark.parametrize("die_at", [4, 6, 8])
def test_kill_9_and_the_same_call_end_alike(finished, tiny, killed, tmp_path, die_at):
    how, whole = finished
    assert killed(tmp_path / "run", die_at, **HOW[how]) == -signal.SIGKILL
    tiny.run(tmp_path / "run", **HOW[how])
    assert PrunePlan.load(tmp_path / "run" / "plan.json") == whole.plan
    name = "student.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (whole.run_dir / name).read_bytes()


def test_the_limit_divides_batches_and_is_told(tiny, tmp_path, monkeypatch, capsys):
    choices, init = [], Trainer.__init__

    def remember(self, *args):
        init(self, *args)
        choices.append(self.choice)

    monkeypatch.setattr(Trainer, "__init__", remember)
    tiny.run(tmp_path, quiet=False, **HOW["limited"])
    assert all(c.predicted_peak <= 650 * 2**10 for c in choices) and any(c.micro_batch for c in choices)
    assert "Memory, prune: micro-batches of" in " ".join(capsys.readouterr().err.split())


def test_half_precision_is_what_trains(tiny, tmp_path, monkeypatch):
    seen, step = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, *args: seen.append(self.scaler.is_enabled()) or step(self, *args))
    tiny.run(tmp_path, **HOW["half"])
    assert seen and all(seen)


def test_too_few_steps_for_the_released_rule(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(in_loop, "_removals", lambda *_: 1)
    with pytest.raises(PlanError, match=r"preset=released: after 1 removals in prune_steps=8 .* raise prune_steps"):
        tiny.run(tmp_path, preset="released", prune_steps=8)


def test_probes_keep_to_the_limit_and_say_so(tiny, tmp_path):
    result = tiny.run(tmp_path / "run", **HOW["published"], memory_limit="650KiB", batch_size=32)
    _, head = store.read_tensors(result.run_dir / "scores.safetensors", "cpd_fast.tensors", 1)
    assert head["info"]["micro_batch"] < 32
    assert head["info"]["predicted_peak"] <= head["info"]["memory_limit"] == 650 * 1024
    assert result.results.student.macs <= 0.5 * result.results.teacher.macs


def test_faults_of_the_settings():
    with pytest.raises(ConfigError) as e:
        CompressConfig(memory_limit="ten", device="tpu", precision="bf16", preset="mine")
    for part in ("memory_limit='ten': expected bytes", "device='tpu': expected one of auto, cpu, cuda"):
        assert part in str(e.value)
    assert "precision='bf16': expected one of fp32, fp16" in str(e.value) and "preset='mine'" in str(e.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("recipe", ["cpd", "eagleeye", "prune_then_distill"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_on_a_gpu(tiny, tmp_path, recipe, precision):
    small = {"candidates": 3, "calibration_batches": 2, "rounds": 2, "round_steps": 3}
    names = {n for n in small if recipe in CompressConfig.__dataclass_fields__[n].metadata["recipes"]}
    result = tiny.run(tmp_path, recipe=recipe, device="cuda", precision=precision, **{n: small[n] for n in names})
    assert result.results.student.macs <= 0.5 * result.results.teacher.macs
    assert {p.device.type for p in result.student.parameters()} == {"cpu"}
    assert isinstance(result, recipes.Result)
