"""A run folder belongs to one command and one process, and tells what is wrong with it."""

import os
import subprocess

import pytest
import torch

from cpd_fast.errors import RunFolderError
from cpd_fast.recipes import RunFolder
from cpd_fast.recipes.run_folder import CHECKPOINT, read_settings


def test_second_process_is_refused(tmp_path):
    with RunFolder(tmp_path, {"seed": 0}), pytest.raises(RunFolderError, match="another process is running"):
        RunFolder(tmp_path, {"seed": 0})
    RunFolder(tmp_path, {"seed": 0}).close()


def test_folder_of_something_else(tmp_path):
    (tmp_path / "holiday.jpg").write_text("")
    with pytest.raises(RunFolderError, match=r"not empty and no run folder \(it holds holiday\.jpg\)"):
        RunFolder(tmp_path, {})


def test_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written: (File exists|Not a directory)"):
        RunFolder(tmp_path / "run", {})


def test_read_only_folder(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)  # root may write everywhere, so the permission bits would prove nothing
    with pytest.raises(RunFolderError, match="Permission denied; change its permissions or choose another --run-dir"):
        RunFolder(tmp_path, {})


def test_really_full_file_system(tmp_path):
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True)
    if mount.returncode:
        pytest.skip("cannot mount a small tmpfs here")
    try:
        with RunFolder(tmp_path, {}) as run:
            run.save_checkpoint("teacher", 1, {"w": torch.ones(2000)}, {})
            with pytest.raises(RunFolderError, match="No space left on device; free some space"):
                run.save_checkpoint("teacher", 2, {"w": torch.ones(20000)}, {})
            stage, step, tensors, _ = run.load_checkpoint()
            assert (stage, step, float(tensors["w"].sum())) == ("teacher", 1, 2000.0)
    finally:
        del tensors  # they are mapped from the file
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_corrupt_checkpoint_is_an_error(tmp_path):
    with RunFolder(tmp_path, {}) as run:
        assert run.load_checkpoint() is None
        run.save_checkpoint("teacher", 1, {"w": torch.ones(4)}, {"plan": "x"})
        data = bytearray((tmp_path / CHECKPOINT).read_bytes())
        data[-1] ^= 1
        (tmp_path / CHECKPOINT).write_bytes(data)
        with pytest.raises(RunFolderError, match="corrupt.*delete .*checkpoint.safetensors to start this run over"):
            run.load_checkpoint()


def test_damaged_settings(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"run\.json is no JSON.*delete the folder to start over"):
        RunFolder(tmp_path, {})


def test_settings_that_the_folder_does_not_know_mean_what_runs_did_before(tmp_path):
    """A folder from before latency_threads and criterion were settings."""
    RunFolder(tmp_path, {"recipe": "cpd", "seed": 0}).close()
    RunFolder(tmp_path, {"recipe": "cpd", "seed": 0, "latency_threads": 1, "criterion": "HessianTrace"}).close()
    with pytest.raises(RunFolderError, match="latency_threads: it has 1, this command asks for 2"):
        RunFolder(tmp_path, {"recipe": "cpd", "seed": 0, "latency_threads": 2})
    with pytest.raises(RunFolderError, match="criterion: it has 'HessianTrace', this command asks for 'GateHessian'"):
        RunFolder(tmp_path, {"recipe": "cpd", "seed": 0, "criterion": "GateHessian"})
    assert read_settings(tmp_path)["criterion"] == "HessianTrace" and read_settings(tmp_path)["latency_threads"] == 1


def test_a_resumed_run_names_the_command_it_was_begun_with(tmp_path):
    for command in ("cpd-fast compress --seed 3", "cpd-fast resume run"):
        with RunFolder(tmp_path, {"seed": 3}, command) as folder:
            assert folder.command == "cpd-fast compress --seed 3"
