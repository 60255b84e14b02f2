"""Runs that are killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def killed():
    """``killed(folder, die_at, **settings)``: the tiny run of these settings dies at its n-th write; how it ended."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("tiny.py")), "serve"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    def run(folder, die_at, **settings):
        server.stdin.write(json.dumps({"folder": str(folder), "die_at": die_at, "settings": settings}) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    yield run
    server.stdin.close()
    server.wait()
