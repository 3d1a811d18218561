"""Whatever stops a run: all ranks save the same step, report it, and go on bitwise."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.runs.steps import list_checkpoints
from megatron_eso.training.guards.stop import REASONS, SIGNALS, StopRequests
from tests.support.processes import HANG_SECONDS
from tests.support.torchrun import (
    NUM_RANKS,
    find_rank,
    launch,
    read_log,
    read_records,
    until_step,
)
from tests.support.training import OVERLAPPED, Overrides, read_checkpoint

STEPS_AFTERWARDS = 5
OVERRIDES: Overrides = OVERLAPPED | {
    "train.num_steps": 100_000,  # no job ends by itself, however late it is stopped
    "model.hidden_dropout": 0.1,
    # At every step, so that every stop leaves a validation to the next job.
    "validation.interval": 1,
    "validation.num_samples": 2,
    "checkpoint.end_margin_minutes": 1,
}
MARGIN_SECONDS = 60
# The launcher ends with the signal that it was given; the ranks end with 0.
LAUNCHER_CODE_AFTER_SIGNAL = 1

Launcher = subprocess.Popen[bytes]


def signal_a_rank(run: Path, launcher: Launcher) -> None:
    """Again and again until it is gone: while it saves and leaves, too."""
    rank, number_sent = find_rank(launcher, 1), 0
    while launcher.poll() is None:
        try:
            rank.send_signal((signal.SIGUSR1, signal.SIGTERM)[number_sent % 2])
        except psutil.NoSuchProcess:
            break
        number_sent += 1
        time.sleep(0.002)
    print(f"{number_sent} signals")


def terminate_the_launcher(run: Path, launcher: Launcher) -> None:
    launcher.send_signal(signal.SIGTERM)


def interrupt_the_launcher(run: Path, launcher: Launcher) -> None:
    """As Ctrl-C does."""
    launcher.send_signal(signal.SIGINT)


def write_the_file(run: Path, launcher: Launcher) -> None:
    (run / "requeue").touch()


def wait_for_the_end(run: Path, launcher: Launcher) -> None:
    """The allocation ends while it runs: see the environment."""


WAYS: list[tuple[str, Callable[[Path, Launcher], None]]] = [
    ("SIGTERM or SIGUSR1", signal_a_rank),
    ("SIGTERM", terminate_the_launcher),
    ("SIGINT", interrupt_the_launcher),
    ("the file requeue is in the run directory", write_the_file),
    ("the allocation ends", wait_for_the_end),
]


@pytest.mark.slow
def test_a_stopped_run_goes_on_bitwise(tiny_data: Path, tmp_path: Path) -> None:
    run, straight, reached = tmp_path / "run", tmp_path / "straight", 0
    for reason, stop in WAYS:
        environment = {}
        if stop is wait_for_the_end:
            environment["SLURM_JOB_END_TIME"] = str(int(time.time()) + MARGIN_SECONDS + 1)
        launcher = launch(run, tiny_data, OVERRIDES, **environment)
        ranks = [find_rank(launcher, rank) for rank in range(NUM_RANKS)]
        until_step(run, launcher, reached + 1)
        stop(run, launcher)
        code = launcher.wait(HANG_SECONDS)
        status = RunDirectory(run).read_status()
        assert status.state == "interrupted", read_log(run)[-3000:]
        assert status.reason in reason.split(" or ")
        is_signalled = stop in (terminate_the_launcher, interrupt_the_launcher)
        expected = LAUNCHER_CODE_AFTER_SIGNAL if is_signalled else 0
        assert code == expected, read_log(run)[-3000:]
        assert not any(rank.is_running() for rank in ranks)
        assert reached + 1 <= status.step
        reached = status.step
        newest = list_checkpoints(run / "checkpoints")[-1]
        assert newest.name == f"step_{reached:08d}"
        print(f"{reason}: stopped after step {reached}")
    assert "minutes are left until checkpoint.end_margin_minutes = 1 before" in read_log(run)
    num_steps = reached + STEPS_AFTERWARDS
    overrides = OVERRIDES | {"train.num_steps": num_steps}
    for each in (run, straight):
        assert launch(each, tiny_data, overrides).wait(HANG_SECONDS) == 0, read_log(each)[-3000:]
    status = RunDirectory(run).read_status()
    assert (status.state, status.restarts) == ("finished", len(WAYS))
    assert not (run / "requeue").exists()
    assert read_records(run) == read_records(straight)
    name = f"step_{num_steps:08d}"
    expected_tensors = read_checkpoint(straight / "checkpoints" / name)
    found = read_checkpoint(run / "checkpoints" / name)
    assert expected_tensors.keys() == found.keys()
    for key, tensor in expected_tensors.items():
        assert torch.equal(found[key], tensor), key
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
    assert len(texts) == len(WAYS) + 1  # as each job saw it


def test_a_signal_is_told_by_its_name_and_means_nothing_afterwards() -> None:
    for number in SIGNALS:
        previous = signal.getsignal(number)
        try:
            with StopRequests(RunDirectory(Path("/nonexistent")), 0.0) as stop:
                os.kill(os.getpid(), number)
                assert REASONS[stop._received] == signal.Signals(number).name
            os.kill(os.getpid(), number)
        finally:
            signal.signal(number, previous)
