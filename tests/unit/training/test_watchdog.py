"""The watchdog ends a process that hangs, and says where it and every other rank are."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
DEADLINE_SECONDS = 2.0

PROGRAM = f"""
import sys, time
from pathlib import Path
from datetime import timedelta
from torch.distributed import FileStore, TCPStore
from megatron_eso.training.guards.watchdog import Watchdog

folder, rank, work = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
def wait_for_the_other():
    time.sleep(60)
def hold_the_lock():
    import re
    re.match("(a*)*b", "a" * 40)
def meet_the_other():
    store.wait(["the other"], timedelta(seconds=60))
store = FileStore(str(folder / "store"), 2)
if work == "rendezvous":
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
watchdog = Watchdog(folder / f"rank_{{rank}}.log", {{"train step": {DEADLINE_SECONDS}}},
    interval_seconds=0.2, grace_seconds=1.0, rank=rank, num_ranks=2,
    store=store)
with watchdog:
    print("ready", flush=True)
    while work == "steps":
        with watchdog.deadline("train step", "7"):
            time.sleep(0.01)
    if work == "stuck":
        with watchdog.deadline("train step", "7"):
            # The interpreter's lock is held: no other thread of this process runs.
            hold_the_lock()
    with watchdog.deadline("train step", "7"):
        meet_the_other() if work == "rendezvous" else wait_for_the_other()
"""


def start(folder: Path, rank: int, work: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", PROGRAM, str(folder), str(rank), work]
    with (folder / f"stderr_{rank}").open("w") as stderr:
        process = subprocess.Popen(
            arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_frozen_rank_ends_the_others_and_is_named(tmp_path: Path) -> None:
    frozen = start(tmp_path, 1, "steps")
    try:
        time.sleep(1.0)  # some heartbeats
        frozen.send_signal(signal.SIGSTOP)
        waiting = start(tmp_path, 0, "wait")
        began = time.monotonic()
        assert waiting.wait(timeout=60) == 1
        assert time.monotonic() - began > DEADLINE_SECONDS / 2
    finally:
        frozen.kill()
        frozen.wait()
    report = (tmp_path / "rank_0.log").read_text()
    assert "watchdog: rank 0 on " in report
    assert "in phase 'train step 7'" in report
    assert "in wait_for_the_other" in report
    assert f"watchdog: rank 1 on {socket.gethostname()} (process {frozen.pid})" in report
    assert "SILENT" in report.splitlines()[-1]
    assert (tmp_path / "stderr_0").read_text() == report


def test_a_working_rank_is_left_alone(tmp_path: Path) -> None:
    process = start(tmp_path, 0, "steps")
    time.sleep(DEADLINE_SECONDS + 1)
    assert process.poll() is None
    process.kill()
    process.wait()
    assert not (tmp_path / "rank_0.log").exists()
    assert (tmp_path / "stderr_0").read_text() == ""


def test_a_stuck_interpreter_is_ended_with_its_stack(tmp_path: Path) -> None:
    assert start(tmp_path, 0, "stuck").wait(timeout=60) == 1
    assert "in hold_the_lock" in (tmp_path / "stderr_0").read_text()


def test_a_log_that_cannot_be_written_keeps_nobody_alive(tmp_path: Path) -> None:
    """Stand in for a file system that hangs: to open a pipe that nobody reads never returns."""
    os.mkfifo(tmp_path / "rank_0.log")
    assert start(tmp_path, 0, "wait").wait(timeout=60) == 1
    assert "in wait_for_the_other" in (tmp_path / "stderr_0").read_text()


def test_a_store_that_is_busy_does_not_hide_a_hang(tmp_path: Path) -> None:
    """A rank waits in the store, whose connection it holds, for one that never comes."""
    process = start(tmp_path, 0, "rendezvous")
    assert process.wait(timeout=60) == 1
    report = (tmp_path / "rank_0.log").read_text()
    assert "watchdog: rank 0 on " in report
    assert "in meet_the_other" in report
    assert "watchdog: rank 1: never heard of" in report
