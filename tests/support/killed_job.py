"""Jobs to be killed: torchrun, what a job script does for it, and `kill -9` at random instants."""

import contextlib
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import psutil
import torch

from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.runs.steps import list_checkpoints
from tests.support.processes import HANG_SECONDS, kill_tree
from tests.support.torchrun import LAUNCHER, read_records
from tests.support.training import (
    Overrides,
    read_checkpoint,
    tiny_arguments,
)

MAX_RESTARTS = 100
MOMENTS = ("start", "resume", "step", "save", "publication")
STARTED = re.compile(r"resuming from|starting from")

SCHEDULE: Overrides = {
    "train.num_steps": 100_000,  # no run ends before its last kill, however late that is
    "checkpoint.interval": 2,
    "checkpoint.keep_last": 2,
    "checkpoint.keep_best": "false",
    "validation.interval": 10,
    "validation.num_samples": 8,
}


class Job:
    """A run under torchrun, and what a job script does for it: start it until it has finished."""

    def __init__(self, run: Path, data: Path, overrides: Overrides) -> None:
        self.run = run
        self.log = run.with_name(f"{run.name}.log")
        self.log.touch()
        self.num_starts = 0
        self._arguments = tiny_arguments(run, data, SCHEDULE | overrides)
        self._log_read = 0
        self.start()

    def start(self) -> None:
        """Start torchrun; its log lies next to the run directory."""
        launcher = [*LAUNCHER, f"--max-restarts={MAX_RESTARTS}"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "pretrain.train", *self._arguments],
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        self.num_starts += 1

    def finish(self, num_steps: int) -> None:
        """Start the job again after the last kill, and wait for the end of the run."""
        self._arguments.append(f"train.num_steps={num_steps}")
        self.start()
        while (code := self.process.wait(HANG_SECONDS)) != 0:
            assert self.num_starts < MAX_RESTARTS, f"code {code}: {self.read_tail()}"
            self.start()

    def keep_running(self) -> None:
        """Start torchrun again where it has ended."""
        code = self.process.poll()
        assert code != 0, f"finished too early: {self.read_tail()}"
        if code is not None:
            self.start()

    def wait_for(self, happened: Callable[[], object], *, poll_seconds: float = 0.01) -> None:
        """Wait until something happens, and keep the job running."""
        deadline = time.monotonic() + HANG_SECONDS
        while not happened():
            assert time.monotonic() < deadline, self.read_tail()
            self.keep_running()
            time.sleep(poll_seconds)

    def read_tail(self) -> str:
        return self.log.read_text()[-5000:]

    def forget_log(self) -> None:
        """Have `has_started` mean a start after this."""
        self._log_read = self.log.stat().st_size

    def has_started(self) -> bool:
        """Whether ranks that started after `forget_log` have come as far as the checkpoint."""
        with self.log.open() as log:
            log.seek(self._log_read)
            return STARTED.search(log.read()) is not None

    def last_step(self) -> int:
        return max((record["step"] for record in read_records(self.run)), default=0)

    def find_ranks(self) -> dict[int, psutil.Process]:
        """Find the training processes that are there now, by rank."""
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.Error, KeyError):
                    found[int(child.environ()["RANK"])] = child
        return found


def wait_for_moment(moment: str, job: Job, draw: random.Random) -> None:
    """Wait for an instant within the kind that `moment` names."""
    folder = job.run / "checkpoints"
    if moment == "start":  # imports, rendezvous, the model's construction
        time.sleep(draw.uniform(0.0, 4.0))
        return
    job.wait_for(job.has_started)
    if moment == "resume":
        time.sleep(draw.uniform(0.0, 0.3))
        return
    target = job.last_step() + draw.randrange(1, 5)
    job.wait_for(lambda: job.last_step() >= target)
    if moment == "step":
        time.sleep(draw.uniform(0.0, 0.1))
    elif moment == "save":
        job.wait_for(lambda: list(folder.glob("step_*.tmp")), poll_seconds=0.0)
        time.sleep(draw.uniform(0.0, 0.03))
    else:  # between the first of the last files and the end of the removal of old ones
        job.wait_for(lambda: list(folder.glob("step_*.tmp/metadata.json")), poll_seconds=0.0)
        time.sleep(draw.uniform(0.0, 0.01))


def kill(
    job: Job, draw: random.Random, number: int, moment: str, victim: int | Literal["all"]
) -> None:
    """Kill a rank or everything at a random instant within the kind that `moment` names."""
    job.keep_running()
    wait_for_moment(moment, job, draw)
    if isinstance(victim, int):
        job.wait_for(lambda: kill_rank(job, victim), poll_seconds=0.0)
    else:
        kill_tree(job.process)
    job.forget_log()
    unfinished = [path.name for path in (job.run / "checkpoints").glob("step_*.*")]
    print(f"kill {number}: {victim} at {moment}, step {job.last_step()}, left {unfinished}")


def kill_rank(job: Job, rank: int) -> bool:
    """Kill a rank if it is there, and return whether it was."""
    process = job.find_ranks().get(rank)
    if process is None:
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
        return True
    return False


def report_restarts(job: Job, num_kills: int) -> None:
    """Print who has started the run again."""
    num_lives = len(STARTED.findall(job.log.read_text()))
    print(
        f"{num_kills} kills; came back by the job script {job.num_starts - 1} times, by torchrun "
        f"at least {max(0, num_lives - job.num_starts)} times"
    )


def compare_runs(found: Path, expected: Path, *, num_steps: int) -> None:
    """Check that two runs have the same records and, bitwise, the same last checkpoint."""
    assert RunDirectory(found).read_status().state == "finished"
    assert read_records(found) == read_records(expected)
    name = f"step_{num_steps:08d}"
    tensors = read_checkpoint(found / "checkpoints" / name)
    for key, tensor in read_checkpoint(expected / "checkpoints" / name).items():
        assert torch.equal(tensors.pop(key), tensor), key
    assert not tensors
    names = sorted(path.name for path in (found / "checkpoints").iterdir())
    assert names == sorted(["latest", *(p.name for p in list_checkpoints(found / "checkpoints"))])
