"""Commands under torchrun: training jobs of two ranks, to be interrupted, and others."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.support.processes import HANG_SECONDS
from tests.support.training import Overrides, tiny_arguments

NUM_RANKS = 2
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}")


def run_module(*arguments: str, ranks: int = 1) -> str:
    """Run a module to its end, under torchrun if there are several ranks; return its output."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    prefix = launcher if ranks > 1 else []
    finished = subprocess.run(
        [sys.executable, *prefix, "-m", *arguments], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def launch(
    run: Path, data: Path, overrides: Overrides, **environment: str
) -> subprocess.Popen[bytes]:
    """Start the training command on two ranks; their output goes to `run/log`."""
    run.mkdir(parents=True, exist_ok=True)
    arguments = tiny_arguments(run, data, overrides)
    with (run / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *LAUNCHER, "-m", "pretrain.train", *arguments],
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )


def find_rank(launcher: subprocess.Popen[bytes], rank: int) -> psutil.Process:
    """Wait for the process of a rank, and return it."""
    deadline = time.monotonic() + HANG_SECONDS
    while time.monotonic() < deadline:
        assert launcher.poll() is None
        for process in psutil.Process(launcher.pid).children():
            with contextlib.suppress(psutil.Error):  # it is starting or has ended
                if process.environ().get("RANK") == str(rank):
                    return process
        time.sleep(0.02)
    raise AssertionError(f"there is no rank {rank}")


def until_step(run: Path, launcher: subprocess.Popen[bytes], step: int) -> None:
    """Wait until a job has recorded a step, or fail where it ends before."""
    deadline = time.monotonic() + HANG_SECONDS
    while True:
        code = launcher.poll()  # read first: a job may record the step and end after it
        if any(record["step"] >= step for record in read_records(run)):
            return
        assert code is None, read_log(run)[-3000:]
        assert time.monotonic() < deadline, read_log(run)[-3000:]
        time.sleep(0.02)


def read_log(run: Path) -> str:
    """Return the output of launcher and ranks."""
    return (run / "log").read_text()


def read_records(run: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl without what depends on the clock."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [
        {key: value for key, value in record.items() if not key.startswith("perf/")}
        for record in records
    ]
