"""Work in forks of a process that never trained: autograd's threads do not survive a fork, so tests may not fork."""

import json
import os
import subprocess
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def serve(job):
    """For every line of stdin, a JSON list of keywords: ``job(**keywords)`` of each, all at once, each in a fork.

    A line of stdout tells how each ended: its exit code, or minus the signal. A fork is far cheaper than a new Python.
    """
    torch.set_num_threads(1)
    for line in sys.stdin:
        children = []
        for keywords in json.loads(line):
            child = os.fork()
            if child == 0:
                os.dup2(2, 1)
                try:
                    job(**keywords)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            children.append(child)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children]), flush=True)


@contextmanager
def server(module):
    """``python -m MODULE serve``, which calls :func:`serve`; gives a function from keywords to how each job ended."""
    with subprocess.Popen(
        [sys.executable, "-m", module, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip

        def ask(*jobs):
            process.stdin.write(json.dumps(jobs) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
