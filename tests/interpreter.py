"""Tests of kernels in Triton's interpreter, on a CPU.

It is chosen by an environment variable before triton is imported, for the whole process: a file of such tests runs
itself in a process of its own (`run_in_the_interpreter`), and the other tests stay as they are.
"""

import os
import subprocess
import sys

import pytest

from moba_hf.ops import engines

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_in_the_interpreter(path: str) -> None:
    """Run the tests of a file there, with the same Python; skips where this Triton's interpreter cannot run them."""
    if (reason := engines.load("triton").interpreter_problem()) is not None:
        pytest.skip(reason)
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout[-3000:])
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
