"""Runs the tests on the fake GPU, each module in a process of its own.

torch counts the devices of a process at its first backward pass: a process that has trained on the
CPU has no place for the fake GPU, and one that has simulated cannot save checkpoints.
"""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("module", ["dry_run_memory.py", "simulated_steps.py"])
def test_on_the_fake_gpu(module: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(FOLDER / module)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout[-20000:] + finished.stderr[-2000:]
