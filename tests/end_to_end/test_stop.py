"""Whatever stops a run: all ranks save the same step, report it, and continue bitwise."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.runs.steps import list_checkpoints
from megatron_eso.training.guards.stop import END_TIME_VARIABLE, REASONS, SIGNALS, StopRequests
from tests.ranks.loop import run_loop, run_until_stopped
from tests.support.killed_job import compare_runs
from tests.support.processes import HANG_SECONDS
from tests.support.torchrun import (
    NUM_RANKS,
    find_rank,
    launch,
    read_log,
    read_records,
    until_step,
)
from tests.support.training import OVERLAPPED, Overrides
from tests.support.world import World

STEPS_AFTERWARDS = 5
OVERRIDES: Overrides = OVERLAPPED | {
    "train.num_steps": 100_000,  # no job ends by itself, however late it is stopped
    "model.hidden_dropout": 0.1,
    # At every step, so that every stop leaves a validation to the next job.
    "validation.interval": 1,
    "validation.num_samples": 2,
    "checkpoint.end_margin_minutes": 1,
}
# The launcher ends with the signal that it has received; the ranks end with 0.
LAUNCHER_CODE_AFTER_SIGNAL = 1

Launcher = subprocess.Popen[bytes]


def signal_a_rank(launcher: Launcher) -> None:
    """Send signals to a rank until it has ended: also while it saves and leaves."""
    rank, number_sent = find_rank(launcher, 1), 0
    while launcher.poll() is None:
        try:
            rank.send_signal((signal.SIGUSR1, signal.SIGTERM)[number_sent % 2])
        except psutil.NoSuchProcess:
            break
        number_sent += 1
        time.sleep(0.002)
    print(f"{number_sent} signals")


def terminate_the_launcher(launcher: Launcher) -> None:
    launcher.send_signal(signal.SIGTERM)


def interrupt_the_launcher(launcher: Launcher) -> None:
    """Send what Ctrl-C sends."""
    launcher.send_signal(signal.SIGINT)


WAYS: list[tuple[str, int, Callable[[Launcher], None]]] = [
    ("SIGTERM or SIGUSR1", 0, signal_a_rank),
    ("SIGTERM", LAUNCHER_CODE_AFTER_SIGNAL, terminate_the_launcher),
    ("SIGINT", LAUNCHER_CODE_AFTER_SIGNAL, interrupt_the_launcher),
]
WAYS_WITHOUT_LAUNCHER: list[tuple[str, bool, int]] = [
    ("the file requeue is in the run directory", True, 0),
    ("the allocation ends", False, 1),
]
NUM_JOBS = len(WAYS) + len(WAYS_WITHOUT_LAUNCHER) + 1


def read_stop(run: Path, reason: str, reached: int) -> int:
    """Check that a run was stopped for a reason, and return the step, which it has saved."""
    status = RunDirectory(run).read_status()
    assert status is not None
    assert status.state == "interrupted", status
    assert status.reason in reason.split(" or ")
    assert status.step > reached
    assert list_checkpoints(run / "checkpoints")[-1].name == f"step_{status.step:08d}"
    print(f"{reason}: stopped after step {status.step}")
    return status.step


@pytest.mark.parallel
@pytest.mark.slow
def test_a_stopped_run_continues_bitwise(world: World, tiny_data: Path, tmp_path: Path) -> None:
    run, straight, reached = tmp_path / "run", tmp_path / "straight", 0
    # What reaches processes: the launcher, or one rank.
    for reason, expected_code, stop in WAYS:
        launcher = launch(run, tiny_data, OVERRIDES)
        ranks = [find_rank(launcher, rank) for rank in range(NUM_RANKS)]
        until_step(run, launcher, reached + 1)
        stop(launcher)
        assert launcher.wait(HANG_SECONDS) == expected_code, read_log(run)[-3000:]
        assert not any(rank.is_running() for rank in ranks)
        reached = read_stop(run, reason, reached)
    # What rank 0 looks at: a file, the clock.
    for reason, is_file, end_minutes in WAYS_WITHOUT_LAUNCHER:
        arguments = (run, tiny_data, OVERRIDES, is_file, end_minutes)
        world.run(run_until_stopped, NUM_RANKS, *arguments)
        reached = read_stop(run, reason, reached)
    # To the end, and as if nothing had stopped it.
    num_steps = reached + STEPS_AFTERWARDS
    for each in (run, straight):
        world.run(run_loop, NUM_RANKS, each, tiny_data, OVERRIDES | {"train.num_steps": num_steps})
    compare_runs(run, straight, num_steps=num_steps)
    status = RunDirectory(run).read_status()
    assert status is not None
    assert status.restarts == NUM_JOBS - 1
    assert not (run / "requeue").exists()
    check_curves(run, num_steps)


def check_curves(run: Path, num_steps: int) -> None:
    """TensorBoard shows each step once, with the numbers of metrics.jsonl."""
    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    records = read_records(run)
    for tag in ("train/loss", "train/grad_norm", "val/nelbo", "val_raw/nelbo"):
        shown = {event.step: event.value for event in accumulator.Scalars(tag)}
        assert len(accumulator.Scalars(tag)) == len(shown), f"{tag}: steps are doubled"
        expected = {record["step"]: record[tag] for record in records if tag in record}
        assert shown == pytest.approx(expected, rel=1e-6), tag  # TensorBoard keeps float32
        first = 0 if tag.startswith("val") else 1
        assert sorted(shown) == list(range(first, num_steps + 1))
    texts = accumulator.Tensors("config/text_summary")
    assert len(texts) == NUM_JOBS  # as each job read it


def test_a_signal_is_reported_by_its_name_and_ignored_afterwards() -> None:
    for number in SIGNALS:
        previous = signal.getsignal(number)
        try:
            with StopRequests(RunDirectory(Path("/nonexistent")), 0.0) as stop:
                os.kill(os.getpid(), number)
                assert REASONS[stop._received] == signal.Signals(number).name
            os.kill(os.getpid(), number)
        finally:
            signal.signal(number, previous)


def test_an_end_within_the_margin_is_reported(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of this allocation is in 1970."""
    monkeypatch.setenv(END_TIME_VARIABLE, "60")
    with StopRequests(RunDirectory(Path("/nonexistent")), 60.0) as stop:
        assert REASONS[stop.received()] == "the allocation ends"
    assert "minutes are left until checkpoint.end_margin_minutes = 1 before" in caplog.text
