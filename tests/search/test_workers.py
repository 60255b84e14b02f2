"""Several real processes on one study: one is killed, and no candidate is lost or counted twice."""

import os
import signal
import subprocess
import sys

import pytest

from tests.forks import ROOT, server
from tests.search import worker

pytest.importorskip("optuna")


@pytest.fixture(scope="module")
def in_forks():
    """``in_forks({"storage": ..., "log": ...}, ...)``: every worker in a process of its own; how each ended."""
    with server("tests.search.worker") as ask:
        yield ask


def test_three_workers_one_killed(in_forks, tmp_path):
    storage, log = str(tmp_path / "s.db"), tmp_path / "log"
    job = {"storage": storage, "log": str(log)}
    slow = {**job, "pause": 0.5}  # so that the one in between gets to its second candidate
    assert in_forks(slow, {**job, "die_at": 2}, slow) == [0, -signal.SIGKILL, 0]
    found = worker.work(storage, log)  # finds it finished
    assert [c.number for c in found.candidates] == sorted({c.number for c in found.candidates})
    assert len(found.candidates) == worker.N and all(c.state == "done" for c in found.candidates)
    alone = worker.work(None, os.devnull)
    assert {c.number: c.value for c in found.candidates} == {c.number: c.value for c in alone.candidates}
    evaluations = len(log.read_text().splitlines())
    assert evaluations == worker.N + 1  # the killed one's candidate twice, every other once
    assert len({c.worker for c in found.candidates}) >= 2


def test_a_killed_search_goes_on_at_once_when_it_is_alone(in_forks, tmp_path):
    storage, log = str(tmp_path / "s.db"), tmp_path / "log"
    assert in_forks({"storage": storage, "log": str(log), "die_at": 3, "heartbeat_s": 1000}) == [-signal.SIGKILL]
    found = worker.work(storage, log, heartbeat_s=1000, alone=True)
    assert [c.value for c in found.candidates] == [c.value for c in worker.work(None, os.devnull).candidates]
    assert len(log.read_text().splitlines()) == worker.N + 1


def test_a_candidate_that_kills_every_worker_is_given_up(in_forks, tmp_path):
    storage, log = str(tmp_path / "s.db"), tmp_path / "log"
    for _ in range(4):
        assert in_forks({"storage": storage, "log": str(log), "die_at": 1, "alone": True}) == [-signal.SIGKILL]
    found = worker.work(storage, log, alone=True)
    assert found.failed[0].number == 0 and found.failed[0].error == "its worker died each time"
    assert len(found.candidates) == worker.N and len(found.failed) == 1


def test_two_ranks_of_gloo_share_the_candidates(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517", "-m"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "tests.search.worker", str(tmp_path / "s.db"), str(tmp_path / "out")],
        cwd=ROOT, env={**env, "PYTHONHASHSEED": "0"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (mine, *first), (yours, *second) = ((tmp_path / f"out.{r}").read_text().split() for r in (0, 1))
    assert first == second and int(first[0]) == worker.N
    assert int(mine) >= 2 and int(yours) >= 2 and int(mine) + int(yours) == worker.N
    assert float(first[1]) == pytest.approx(worker.work(None, os.devnull).value, rel=1e-6)
