"""The watchdog ends a process that hangs, and reports where it and every other rank are."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[3]
DEADLINE_SECONDS, LOOK_SECONDS = 2.0, 0.2
NUM_STEPS = 5
GRACE_SECONDS = 1.0
"""For what cannot report. What can report gets so long that only a hang reaches the end."""

PROGRAM = f"""
import sys, threading, time
from types import SimpleNamespace
from pathlib import Path
from datetime import timedelta
from torch.distributed import FileStore, TCPStore
from megatron_eso.training.guards import watchdog as module

folder, rank, work = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
hang = timedelta(seconds={HANG_SECONDS})
def wait_for_the_other():
    with watchdog.deadline("train step", "7"):
        threading.Event().wait(hang.total_seconds())
def hold_the_lock():
    # The interpreter's lock is held: no other thread of this process runs.
    import re
    with watchdog.deadline("train step", "7"):
        re.match("(a*)*b", "a" * 40)
def meet_the_other():
    with watchdog.deadline("train step", "7"):
        store.wait(["the other"], hang)
class CountedClock:
    # It moves with the looks of the watchdog and with the steps, by no time that passes.
    def __init__(self):
        self.now, self.look = 0.0, threading.Event()
    def time(self):
        return self.now
    def monotonic(self):
        if threading.current_thread().name == "watchdog":
            if work == "looks":
                self.now += 1.0
            self.look.set()
        return self.now
def take_steps():
    for _ in range({NUM_STEPS}):
        with watchdog.deadline("train step", "7"):
            clock.now += 0.4 * {DEADLINE_SECONDS}
            clock.look.clear()
            clock.look.wait()
store = FileStore(str(folder / "store"), 2)
if work == "rendezvous":
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
if work in ("steps", "looks"):
    module.time = clock = CountedClock()
grace = {GRACE_SECONDS} if work in ("stuck", "no log") else hang.total_seconds()
watchdog = module.Watchdog(folder / f"rank_{{rank}}.log", {{"train step": {DEADLINE_SECONDS}}},
    interval_seconds={LOOK_SECONDS}, grace_seconds=grace, rank=rank, num_ranks=2, store=store)
with watchdog:
    print("ready", flush=True)
    match work:
        case "steps": take_steps()
        case "stuck": hold_the_lock()
        case "rendezvous": meet_the_other()
        case _: wait_for_the_other()
"""


Job = tuple[Path, subprocess.Popen[str]]


def start(folder: Path, rank: int, work: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", PROGRAM, str(folder), str(rank), work]
    with (folder / f"stderr_{rank}").open("w") as stderr:
        return subprocess.Popen(
            arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True
        )


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    """Start a process in its own folder for each kind of work; they import at the same time."""
    started: dict[str, Job] = {}
    for work in ("looks", "steps", "stuck", "no log", "rendezvous"):
        folder = tmp_path_factory.mktemp("watchdog")
        if work == "no log":
            os.mkfifo(folder / "rank_0.log")
        started[work] = folder, start(folder, 0, work)
    yield started
    for _, process in started.values():
        process.kill()
        process.communicate()


def test_a_frozen_rank_ends_the_others_which_name_it(tmp_path: Path) -> None:
    frozen = start(tmp_path, 1, "wait")
    try:
        assert frozen.stdout is not None
        assert frozen.stdout.readline() == "ready\n"
        frozen.send_signal(signal.SIGSTOP)
        assert start(tmp_path, 0, "wait").wait(HANG_SECONDS) == 1
    finally:
        frozen.kill()
        frozen.communicate()
    report = (tmp_path / "rank_0.log").read_text()
    found = re.search(r"watchdog: rank 0 on .* in 'train step 7' for (\d+) s", report)
    assert found is not None
    assert int(found[1]) >= DEADLINE_SECONDS
    assert "in wait_for_the_other" in report
    assert f"watchdog: rank 1 on {socket.gethostname()} (process {frozen.pid})" in report
    assert "SILENT" in report.splitlines()[-1]
    assert (tmp_path / "stderr_0").read_text() == report


def test_a_hang_ends_at_the_first_look_after_the_deadline(jobs: dict[str, Job]) -> None:
    """The clock of this job advances by a second at each look of the watchdog."""
    folder, process = jobs["looks"]
    assert process.wait(HANG_SECONDS) == 1
    assert "in 'train step 7' for 3 s" in (folder / "rank_0.log").read_text()


def test_a_working_rank_is_left_alone(jobs: dict[str, Job]) -> None:
    """Each step is looked at within its deadline, and all of them take longer than that."""
    folder, process = jobs["steps"]
    assert process.wait(HANG_SECONDS) == 0
    assert not (folder / "rank_0.log").exists()
    assert (folder / "stderr_0").read_text() == ""


def test_a_stuck_interpreter_is_ended_with_its_stack(jobs: dict[str, Job]) -> None:
    folder, process = jobs["stuck"]
    assert process.wait(HANG_SECONDS) == 1
    assert "in hold_the_lock" in (folder / "stderr_0").read_text()


def test_a_log_that_cannot_be_written_keeps_nobody_alive(jobs: dict[str, Job]) -> None:
    """As on a file system that hangs: opening a pipe that nobody reads does not return."""
    folder, process = jobs["no log"]
    assert process.wait(HANG_SECONDS) == 1
    assert "in wait_for_the_other" in (folder / "stderr_0").read_text()


def test_a_store_that_is_busy_does_not_hide_a_hang(jobs: dict[str, Job]) -> None:
    """A rank waits in the store, whose connection it holds, for one that never comes."""
    folder, process = jobs["rendezvous"]
    assert process.wait(HANG_SECONDS) == 1
    report = (folder / "rank_0.log").read_text()
    assert "watchdog: rank 0 on " in report
    assert "in meet_the_other" in report
    assert "watchdog: rank 1: no heartbeat yet" in report
