"""A full disk is logged and nothing is lost; only a last save that fails ends the run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_eso.runs.file_index import find_damage, read_file_index
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.runs.steps import list_checkpoints, step_number
from tests.support.processes import HANG_SECONDS
from tests.support.training import Overrides, tiny_arguments

DISK_BYTES = 24 * 2**20
STATUS_BYTES = 2**18
"""Room for status.json, not for a checkpoint."""

SETTINGS: Overrides = {
    "train.num_steps": 100_000,
    "checkpoint.interval": 5,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_best": "false",  # or two are there where the one before was the best
    "validation.interval": 10,
    "validation.num_samples": 4,
}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a small file system."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("A FULL DISK IS NOT TESTED: it takes root to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path, *, leave: int) -> Path:
    """Take all space but some; what was taken before stays so."""
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with filler.open("ab", buffering=0) as file:
        file.write(bytes(max(0, free - leave)))
    return filler


def wait_for(happened: Callable[[], object], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not happened():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)


def logged_step(log: Path) -> int:
    return max(map(int, re.findall(r"step (\d+)/", log.read_text())), default=0)


def count_failures(log: Path) -> int:
    return log.read_text().count("could not be saved")


def saved_steps(run: Path) -> list[int]:
    return [step_number(path) for path in list_checkpoints(run / "checkpoints")]


@pytest.mark.slow
def test_a_full_disk_loses_nothing(small_disk: Path, tiny_data: Path, tmp_path: Path) -> None:
    run, log = small_disk / "run", tmp_path / "log"
    command = [sys.executable, "-m", "pretrain.train", *tiny_arguments(run, tiny_data, SETTINGS)]
    with log.open("wb") as stream:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
    try:
        # Full: a save fails, and the run continues.
        wait_for(lambda: saved_steps(run), process, log)
        filler = fill(small_disk, leave=0)
        wait_for(lambda: "could not be saved" in log.read_text(), process, log)
        kept, full_at = saved_steps(run), logged_step(log)
        assert kept
        wait_for(lambda: logged_step(log) > full_at + 12, process, log)
        for checkpoint in list_checkpoints(run / "checkpoints"):
            assert not list(find_damage(checkpoint, read_file_index(checkpoint)))
        # Room again: the next save succeeds.
        filler.unlink()
        wait_for(lambda: max(saved_steps(run), default=0) > full_at, process, log)
        # Full at the end. Once a save has failed, nothing is removed that could make room for it.
        num_failures = count_failures(log)
        fill(small_disk, leave=STATUS_BYTES)
        wait_for(lambda: count_failures(log) > num_failures, process, log)
        fill(small_disk, leave=STATUS_BYTES)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(HANG_SECONDS) == 1
    finally:
        process.kill()
        process.wait()
    # What is reported, what is on the disk, and that no record is missing.
    text = log.read_text()
    assert "make room" in text
    assert "stay in memory until there is room" in text
    assert "Traceback" not in text.split("could not be saved")[-1]
    status = RunDirectory(run).read_status()
    assert status.state == "failed"
    assert "make room" in status.reason
    (last,) = list_checkpoints(run / "checkpoints")
    assert not list(find_damage(last, read_file_index(last)))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", last.name]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == list(range(1, len(steps) + 1))
    assert steps[-1] > full_at
    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == steps
    validated = [line["step"] for line in lines if "val/nelbo" in line]
    assert validated == list(range(0, steps[-1] + 1, 10))
